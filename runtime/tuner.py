"""`python -m runtime.tuner MODEL SECONDS PARENT_PID`: the throw-away process in which `edge tune` measures.

Each line of its output is one `Measure`, the last one the `Tuning` that they give. The host's speed changes by half or
double for seconds at a time, so settings are compared within a round, each round against its own default.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import msgspec

from edge.hardware.memory import available_bytes, usable_cores
from runtime.backends.llama_cpp import LlamaBackend, LlamaOptions
from runtime.batch import Batch, Chunk
from runtime.request import Request, RequestId
from runtime.sequence import Sequence
from runtime.tuning import Measure, Tuning
from runtime.worker import die_with_parent

PROMPT_TOKENS = 512
ANSWER_TOKENS = 24
UBATCHES = (512, 256, 128)
MIN_GAIN = 1.05
"""A setting has to be so much faster than the default to be taken: less is noise."""
MAX_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Setting:
    """One combination to measure."""

    ubatch_tokens: int
    flash_attention: bool | None
    threads: int
    kv_q8: bool = False


class Bench:
    """Measures settings on one model until the time is over.

    Args:
        measure: Gives the speeds of a setting.
        clock: Seconds, monotonic; measuring stops at `deadline`.
        report: Told of each measure.
    """

    def __init__(
        self, measure: Callable[[Setting], Measure], *, clock: Callable[[], float], deadline: float,
        report: Callable[[Measure], None],
    ) -> None:  # fmt: skip
        self._measure = measure
        self._clock = clock
        self._deadline = deadline
        self._report = report
        self._last_s = 0.0
        self.found: dict[Setting, list[Measure]] = {}

    def _run(self, setting: Setting) -> bool:
        """Measure, unless another one like the last would pass the deadline."""
        begin = self._clock()
        if self.found and begin + self._last_s > self._deadline:
            return False
        measure = self._measure(setting)
        self._last_s = self._clock() - begin
        self.found.setdefault(setting, []).append(measure)
        self._report(measure)
        return True

    def tune(self, cores: int) -> Tuning:
        """The fastest settings of the grid that there was time for."""
        default = Setting(UBATCHES[0], None, cores)
        counts = sorted({cores, max(1, cores // 2), 1} | {2**i for i in range(1, 6) if 2**i < cores}, reverse=True)
        threads = [replace(default, threads=n) for n in counts]
        self._rounds(threads, share=0.4)
        prefill = self._best(threads, default, lambda m: m.prefill_tok_s)
        decode = self._best(threads, default, lambda m: m.decode_tok_s)
        base = prefill
        shapes = [replace(base, ubatch_tokens=u, flash_attention=f) for u in UBATCHES for f in (None, True, False)]
        self._rounds([base, replace(base, flash_attention=True, kv_q8=True), *shapes[1:]], share=1.0)
        shape = self._best(shapes, base, _speed)
        return Tuning(
            prefill_threads=prefill.threads, decode_threads=decode.threads, ubatch_tokens=shape.ubatch_tokens,
            flash_attention=shape.flash_attention, measures=tuple(self._middle(s) for s in self.found),
        )  # fmt: skip

    def _rounds(self, settings: list[Setting], *, share: float) -> None:
        """Measure each in turn, again and again, until `share` of the time that is left is used."""
        now = self._clock()
        end = now + (self._deadline - now) * share
        for _ in range(MAX_ROUNDS):
            for setting in settings:
                if (self._clock() >= end and setting in self.found) or not self._run(setting):
                    return

    def _best(self, settings: list[Setting], default: Setting, speed: Callable[[Measure], float]) -> Setting:
        """The fastest by the median of its rounds against the default's; the default unless it is clearly beaten."""
        gains = {s: self._gain(s, default, speed) for s in settings if s in self.found and s != default}
        best = max(gains, key=lambda s: gains[s], default=default)
        return best if gains.get(best, 0.0) >= MIN_GAIN else default

    def _gain(self, setting: Setting, default: Setting, speed: Callable[[Measure], float]) -> float:
        rounds = zip(self.found[setting], self.found.get(default, []), strict=False)
        return median([speed(m) / speed(d) for m, d in rounds] or [0.0])

    def _middle(self, setting: Setting) -> Measure:
        measures = self.found[setting]
        return msgspec.structs.replace(
            measures[0],
            prefill_tok_s=round(median(m.prefill_tok_s for m in measures), 1),
            decode_tok_s=round(median(m.decode_tok_s for m in measures), 1),
        )


def _speed(m: Measure) -> float:
    """Of a request with 512 tokens of prompt and 128 of answer."""
    return 640 / (512 / m.prefill_tok_s + 128 / m.decode_tok_s)


def measure(path: Path, setting: Setting) -> Measure:
    """Read a prompt and go on from it, in a context of its own."""
    options = LlamaOptions(
        setting.threads, 1, PROMPT_TOKENS, 1024, available_bytes(), ubatch_tokens=setting.ubatch_tokens,
        flash_attention=setting.flash_attention, kv_q8=setting.kv_q8,
    )  # fmt: skip
    backend = LlamaBackend(path, options)
    try:
        for _ in backend.settle():
            pass  # as it will be served
        size = backend.facts.vocab_size
        tokens = [i * 7919 % size for i in range(PROMPT_TOKENS + ANSWER_TOKENS)]
        sequence = Sequence(Request(RequestId(0), tuple(tokens), 1), 0)

        def seconds(start: int, length: int) -> float:
            begin = time.monotonic()
            backend.decode(Batch((), (Chunk(sequence, 0, start, tokens[start : start + length], num_logits=1),)))
            return time.monotonic() - begin

        seconds(0, 16)  # touches the weights and the buffers
        backend.clear()
        prefill = seconds(0, PROMPT_TOKENS)
        decode = median(seconds(PROMPT_TOKENS + i, 1) for i in range(ANSWER_TOKENS))
    finally:
        backend.close()
    return Measure(
        ubatch_tokens=setting.ubatch_tokens, flash_attention=setting.flash_attention, threads=setting.threads,
        kv_type="q8_0" if setting.kv_q8 else "f16", prefill_tok_s=PROMPT_TOKENS / prefill, decode_tok_s=1 / decode,
    )  # fmt: skip


def main() -> None:
    """Measure and print."""
    path, seconds = Path(sys.argv[1]), float(sys.argv[2])
    die_with_parent(int(sys.argv[3]))

    def report(line: msgspec.Struct) -> None:
        sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
        sys.stdout.buffer.flush()

    bench = Bench(lambda s: measure(path, s), clock=time.monotonic, deadline=time.monotonic() + seconds, report=report)
    report(bench.tune(usable_cores()))


if __name__ == "__main__":
    main()
