"""Samples to rows."""

from __future__ import annotations

from pathlib import Path

import msgspec

from benchmarks.measure import Answers, Footprint, Sample
from benchmarks.merge import merged
from benchmarks.report import Report, batching_gain, make_rows, render_markdown, render_tables, write
from tests.benchmarks.near import approx

OURS, PEER = "slm-edge", "llama-server"
ANSWERS = [Answers("short", 8, name, ["an answer"]) for name in (OURS, PEER)]


def sample(server: str, number: int, prompts: int, value: float, **more: object) -> Sample:
    made = Sample(
        workload="short",
        clients=8,
        round=number,
        prompts=prompts,
        server=server,
        metrics={"tok_s": value},
        num_prompt=40,
        num_cached=10,
        num_output=64,
        cpu_s=0.64,
        loadgen_cpu_s=0.01,
        others_cores=0.02,
        first_token_s=[0.1, 0.3],
        gaps_s=[0.01, 0.02],
        num_requests=1,
        errors=[],
    )
    return msgspec.structs.replace(made, **more)


def a_round(number: int, ours: tuple[float, float], peer: tuple[float, float], **more: object) -> list[Sample]:
    return [sample(OURS, number, i, v, **more) for i, v in enumerate(ours)] + [
        sample(PEER, number, i, v, **more) for i, v in enumerate(peer)
    ]


def test_the_ratio_is_the_median_over_rounds() -> None:
    samples = a_round(0, (110, 110), (100, 100)) + a_round(1, (60, 60), (50, 50)) + a_round(2, (90, 90), (100, 100))
    (row,) = make_rows(samples, ANSWERS, ours=OURS, peer=PEER)
    assert row.ratio == approx(1.1)
    assert row.ratios == approx([1.1, 1.2, 0.9])
    assert (row.spread, row.verdict, row.rounds, row.equal_share) == (0.0, "faster", (3, 3), 1.0)
    assert row.ours.cpu_per_token == approx(0.01)
    assert row.ours.first_token_p50 == approx(0.2)


def test_inside_the_spread_nothing_is_claimed() -> None:
    (row,) = make_rows(a_round(0, (100, 120), (112, 90)), ANSWERS, ours=OURS, peer=PEER)
    assert row.ratio > 1.05
    assert row.verdict == "no difference"


def test_of_times_the_smaller_is_the_better() -> None:
    samples = a_round(0, (1, 1), (2, 2))
    times = [msgspec.structs.replace(s, metrics={"exec to first token_s": s.metrics["tok_s"]}) for s in samples]
    (row,) = make_rows(times, ANSWERS, ours=OURS, peer=PEER)
    assert row.ratio == approx(2.0)


def test_disturbed_rounds_are_left_out_unless_there_are_no_others() -> None:
    disturbed = a_round(0, (50, 50), (100, 100), others_cores=0.5)
    (row,) = make_rows(disturbed + a_round(1, (100, 100), (100, 100)), ANSWERS, ours=OURS, peer=PEER)
    assert row.ratios == approx([1.0])
    assert (row.rounds, row.is_disturbed) == ((1, 2), False)
    (alone,) = make_rows(disturbed, ANSWERS, ours=OURS, peer=PEER)
    assert alone.ratios == approx([0.5])
    assert (alone.rounds, alone.is_disturbed) == ((0, 1), True)


def test_batching_gain_is_ours_alone() -> None:
    one = [msgspec.structs.replace(s, clients=1) for s in a_round(0, (100, 100), (1, 1))]
    rows = make_rows([*one, *a_round(0, (150, 150), (1, 1))], ANSWERS, ours=OURS, peer=PEER)
    assert batching_gain(rows) == approx(1.5)


def test_a_server_that_gave_nothing_makes_no_claim() -> None:
    (row,) = make_rows(a_round(0, (100, 100), (0, 0), first_token_s=[], gaps_s=[]), ANSWERS, ours=OURS, peer=PEER)
    assert row.verdict == "not measured"


def test_what_is_written_can_be_read_and_is_the_same_twice(tmp_path: Path) -> None:
    samples = a_round(0, (110, 110), (100, 100))
    rows = make_rows(samples, ANSWERS, ours=OURS, peer=PEER)
    memory = [Footprint("short", OURS, 8192, 300 << 20, 290 << 20, 200 << 20)]
    report = Report(
        {"cpu": "x"},
        {OURS: "edge serve"},
        {OURS: "1"},
        "m",
        "2026-11-20T08:00:00+00:00",
        rows,
        memory,
        samples,
        ANSWERS,
    )
    first = {p.name: p.read_bytes() for p in write(report, tmp_path / "a", names=(OURS, PEER), plots=True)}
    second = {p.name: p.read_bytes() for p in write(report, tmp_path / "b", names=(OURS, PEER), plots=True)}
    assert first == second
    assert msgspec.json.decode(first["serve.json"], type=Report) == report
    assert first["serve-ratios.svg"].lstrip().startswith(b"<?xml")
    assert "| short ×8 | 110.0 tok/s | 100.0 tok/s | 1.10 | ±0.0 % | faster |" in render_markdown(report)
    assert [t.row_count for t in render_tables(report)] == [1, 1, 1]


def test_rounds_of_several_runs_add_up() -> None:
    def run(samples: list[Sample]) -> Report:
        return Report({}, {}, {}, "m", "2026-11-20T08:00:00+00:00", [], [], samples, [])

    report = merged([run(a_round(0, (110, 110), (100, 100))), run(a_round(0, (130, 130), (100, 100)))])
    assert report.rows[0].ratios == approx([1.1, 1.3])
