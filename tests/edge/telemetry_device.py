"""A device that only records: ``python -m tests.edge.telemetry_device PREFIX COUNT [sync]``.

It prints its id, then ``recorded N`` when the records PREFIX-0 … PREFIX-(N-1) were handed over, and ``committed N``
when they are on the disk; with ``sync`` after each one. At the end it waits to be killed. COUNT 0 records nothing,
sends what waits until nothing does, prints ``empty`` and ends.
"""

from __future__ import annotations

import os
import sys
import time

from edge.config import load_settings
from edge.telemetry.service import Telemetry
from edge.telemetry.span import RequestRecord


def record_of(response_id: str) -> RequestRecord:
    """A request with that id."""
    return RequestRecord(
        operation="chat",
        request_model="tiny",
        response_model="tiny",
        started_unix_ns=time.time_ns(),
        duration_s=0.1,
        queue_s=0.0,
        prefill_s=0.05,
        ttft_s=0.06,
        input_tokens=3,
        output_tokens=5,
        cached_tokens=0,
        finish_reasons=("stop",),
        response_id=response_id,
        stream=False,
    )


def say(text: str) -> None:
    """Tell the test."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main(prefix: str, count: int, *, sync_each: bool) -> None:
    """Record, or send what waits."""
    telemetry = Telemetry(load_settings(os.environ, {"metrics_interval_s": 0.2}))
    telemetry.start()
    say(f"device {telemetry.device_id}")
    for number in range(count):
        telemetry.record(record_of(f"{prefix}-{number}"))
        if sync_each:
            telemetry.sync()
            say(f"committed {number + 1}")
    say(f"recorded {count}")
    if count:
        time.sleep(60)
        return
    while telemetry.flush(1.0).rows:
        pass
    say("empty")
    telemetry.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sync_each="sync" in sys.argv[3:])
