"""Gateway down, 200 requests, the device killed, everything back: each record once, on a link that loses replies."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.edge.telemetry_parts import Fault, FaultProxy, GatewayProcess
from tests.support import RunningAppliance, chat_body, start_appliance, stop, wait_until

NUM_REQUESTS = 200


def test_two_hundred_requests_arrive_exactly_once(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path / "gateway")
    with FaultProxy(gateway.url, one_in_five_lost) as link:
        home = tmp_path / "device"
        device = start_appliance(home, "--gateway-url", link.url)
        ids = ask_many(device)
        time.sleep(2)  # the acceptance's own words: killed two seconds after the last
        device.process.kill()
        device.process.wait()
        gateway.start()
        device = start_appliance(home, "--gateway-url", link.url)
        try:
            (device_id,) = {(home / "device-id").read_text().strip()}
            wait_until(lambda: len(gateway.response_ids(device_id)) >= NUM_REQUESTS, timeout_s=90)
            arrived = gateway.response_ids(device_id)
        finally:
            stop(device.process)
            gateway.stop()
    assert sorted(arrived) == sorted(ids)


def one_in_five_lost(request_number: int) -> Fault:
    return "lose_reply" if request_number % 5 == 4 else "pass"


def ask_many(device: RunningAppliance) -> list[str]:
    def ask(i: int) -> str:
        with device.client() as http:
            reply = http.post("/v1/chat/completions", json=chat_body(f"Say {i}.", max_tokens=2))
        return reply.raise_for_status().json()["id"]

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, range(NUM_REQUESTS)))
