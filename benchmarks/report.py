"""Samples to rows, and rows to JSON, to a table and to plots."""

from __future__ import annotations

import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from .comparison import Agreement, Verdict, agreement, geometric_mean, judge, median, percentile, same_server_spread
from .measure import Answers, Footprint, Sample
from .peers import BenchError


class Side(msgspec.Struct, frozen=True):
    """One server in one row: medians and percentiles over its undisturbed measures. Times in seconds."""

    value: float
    first_token_p50: float
    first_token_p95: float
    gap_p50: float
    gap_p95: float
    cpu_per_token: float
    num_prompt: float
    cached_share: float
    errors: int


class Row(msgspec.Struct, frozen=True):
    """One workload at one number of clients.

    Attributes:
        metric: `tok_s`, or a time.
        ratio: Median of the rounds' ratios; above 1 ours is faster, also where the metric is a time.
        ratios: Of each round, the disturbed ones left out unless there are no others.
        spread: How far from 1 such a median lies between two measures of the same server, at most, 95 times in 100.
        rounds: Rounds that count, and all.
    """

    workload: str
    clients: int
    metric: str
    ours: Side
    peer: Side
    ratio: float
    ratios: list[float]
    spread: float
    verdict: Verdict
    equal_share: float
    prefix_share: float
    rounds: tuple[int, int]
    others_cores: float
    is_disturbed: bool


class Report(msgspec.Struct, frozen=True):
    """Everything a run gives."""

    machine: dict[str, str]
    commands: dict[str, str]
    versions: dict[str, str]
    model: str
    started: str
    rows: list[Row]
    memory: list[Footprint]
    samples: list[Sample]
    answers: list[Answers]


Round = list[Sample]


def _mean(samples: Sequence[Sample], metric: str) -> float:
    return geometric_mean([s.metrics[metric] for s in samples])


def _repeats(rounds: Sequence[Round], metric: str, names: Sequence[str]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for samples in rounds:
        for name in names:
            mine = [s.metrics[metric] for s in samples if s.server == name]
            if len(mine) == 2:
                found.append((mine[0], mine[1]))
    return found


def _ratio(samples: Round, metric: str, ours: str, peer: str) -> float:
    a = _mean([s for s in samples if s.server == ours], metric)
    b = _mean([s for s in samples if s.server == peer], metric)
    return b / a if metric.endswith("_s") and metric != "tok_s" else a / b


def _side(samples: Sequence[Sample], metric: str) -> Side:
    first = [t for s in samples for t in s.first_token_s]
    gaps = [g for s in samples for g in s.gaps_s]
    output = sum(s.num_output for s in samples)
    prompt = sum(s.num_prompt for s in samples)
    return Side(
        value=median([s.metrics[metric] for s in samples]),
        first_token_p50=percentile(first, 0.5),
        first_token_p95=percentile(first, 0.95),
        gap_p50=percentile(gaps, 0.5),
        gap_p95=percentile(gaps, 0.95),
        cpu_per_token=sum(s.cpu_s for s in samples) / output if output else math.nan,
        num_prompt=prompt / max(1, sum(s.num_requests for s in samples)),
        cached_share=sum(s.num_cached for s in samples) / prompt if prompt else math.nan,
        errors=sum(len(s.errors) for s in samples),
    )


def _agreement(answers: Sequence[Answers], sample: Sample, ours: str, peer: str) -> Agreement:
    mine = [a for a in answers if (a.workload, a.clients) == (sample.workload, sample.clients)]
    ours_texts = [t for a in mine if a.server == ours for t in a.texts]
    return agreement(ours_texts, [t for a in mine if a.server == peer for t in a.texts])


def _row(rounds: Sequence[Round], answers: Sequence[Answers], metric: str, ours: str, peer: str) -> Row:
    clean = [r for r in rounds if not any(s.is_disturbed for s in r)]
    used = clean or list(rounds)
    flat = [s for r in used for s in r]
    ratios = [_ratio(r, metric, ours, peer) for r in used]
    spread = same_server_spread(_repeats(used, metric, (ours, peer)), rounds=len(used))
    ratio = median(ratios)
    same = _agreement(answers, flat[0], ours, peer)
    return Row(
        workload=flat[0].workload,
        clients=flat[0].clients,
        metric=metric,
        ours=_side([s for s in flat if s.server == ours], metric),
        peer=_side([s for s in flat if s.server == peer], metric),
        ratio=ratio,
        ratios=ratios,
        spread=spread,
        verdict=judge(ratio, spread),
        equal_share=same.equal_share,
        prefix_share=same.prefix_share,
        rounds=(len(clean), len(rounds)),
        others_cores=max(s.others_cores for s in flat),
        is_disturbed=not clean,
    )


def make_rows(samples: Sequence[Sample], answers: Sequence[Answers], *, ours: str, peer: str) -> list[Row]:
    """A row for each workload, number of clients and metric, in the order in which they were measured."""
    groups: dict[tuple[str, int], dict[int, Round]] = defaultdict(lambda: defaultdict(list))
    for s in samples:
        groups[s.workload, s.clients][s.round].append(s)
    return [
        _row(list(rounds.values()), answers, metric, ours, peer)
        for rounds in groups.values()
        for metric in next(iter(rounds.values()))[0].metrics
    ]


def batching_gain(rows: Sequence[Row]) -> float:
    """What 8 clients get from our server together, against one alone; NaN where either was not measured."""
    short = {r.clients: r.ours.value for r in rows if r.workload == "short"}
    return short[8] / short[1] if {1, 8} <= short.keys() else math.nan


def _milliseconds(seconds: float) -> str:
    return "–" if math.isnan(seconds) else f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.1f}"


def _pair(p50: float, p95: float) -> str:
    return f"{_milliseconds(p50)} / {_milliseconds(p95)}"


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _value(row: Row, side: Side) -> str:
    return f"{side.value:.1f} tok/s" if row.metric == "tok_s" else f"{_milliseconds(side.value)} ms"


def _name(row: Row) -> str:
    if row.metric == "tok_s":
        return f"{row.workload} ×{row.clients}"
    return f"{row.workload}{f' ×{row.clients}' if row.clients > 1 else ''}: {row.metric.removesuffix('_s')}"


Column = tuple[str, Callable[[Row], str]]
RATIO_COLUMNS: tuple[Column, ...] = (
    ("workload", _name),
    ("slm-edge", lambda r: _value(r, r.ours)),
    ("llama-server", lambda r: _value(r, r.peer)),
    ("ratio", lambda r: f"{r.ratio:.2f}"),
    ("A/A spread", lambda r: f"±{r.spread * 100:.1f} %"),
    ("says", lambda r: r.verdict),
    ("rounds", lambda r: f"{r.rounds[0]} of {r.rounds[1]}" + (", disturbed" if r.is_disturbed else "")),
    ("others", lambda r: f"{r.others_cores:.2f}"),
    ("same text", lambda r: f"{_share(r.equal_share)} ({_share(r.prefix_share)})"),
)
LATENCY_COLUMNS: tuple[Column, ...] = (
    ("workload", _name),
    ("first token p50 / p95, ms", lambda r: _pair(r.ours.first_token_p50, r.ours.first_token_p95)),
    ("llama-server", lambda r: _pair(r.peer.first_token_p50, r.peer.first_token_p95)),
    ("between tokens p50 / p95, ms", lambda r: _pair(r.ours.gap_p50, r.ours.gap_p95)),
    ("llama-server", lambda r: _pair(r.peer.gap_p50, r.peer.gap_p95)),
    ("CPU ms/token", lambda r: _milliseconds(r.ours.cpu_per_token)),
    ("llama-server", lambda r: _milliseconds(r.peer.cpu_per_token)),
    ("cached share", lambda r: f"{_share(r.ours.cached_share)} / {_share(r.peer.cached_share)}"),
)
_STYLES = {"faster": "green", "slower": "red"}


def _tables(report: Report) -> list[tuple[str, tuple[Column, ...], list[Row]]]:
    loads = [r for r in report.rows if r.metric == "tok_s"]
    return [("Ratios", RATIO_COLUMNS, report.rows), ("Latency and CPU", LATENCY_COLUMNS, loads)]


def _memory_cells(f: Footprint) -> list[str]:
    sizes = [f"{n / 1e6:.0f}" for n in (f.resident, f.proportional, f.anonymous)]
    return [f.workload, f.server, str(f.context_tokens), *sizes]


_MEMORY_HEADS = ["after", "server", "cells", "resident MB", "PSS MB", "anonymous MB"]


def render_tables(report: Report) -> list[Table]:
    """For a terminal."""
    tables: list[Table] = []
    for title, columns, rows in _tables(report):
        table = Table(title=title)
        for head, _ in columns:
            table.add_column(head, justify="left" if head == "workload" else "right")
        for row in rows:
            table.add_row(*(cell(row) for _, cell in columns), style=_STYLES.get(row.verdict, ""))
        tables.append(table)
    memory = Table(*_MEMORY_HEADS, title="Memory")
    for footprint in report.memory:
        memory.add_row(*_memory_cells(footprint))
    return [*tables, memory]


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render_markdown(report: Report) -> str:
    """For a page of documentation."""
    parts = [f"{name}: `{command}`" for name, command in report.commands.items()]
    for title, columns, rows in _tables(report):
        cells = [[cell(row) for _, cell in columns] for row in rows]
        parts += [f"## {title}", _markdown_table([head for head, _ in columns], cells)]
    parts += ["## Memory", _markdown_table(_MEMORY_HEADS, [_memory_cells(f) for f in report.memory])]
    return "\n\n".join(parts) + "\n"


def require_plotting() -> None:
    """Make sure, before the measuring, that its plots can be drawn.

    Raises:
        BenchError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("Plots need matplotlib: install the extra slm-edge[quantize], or give --no-plots.")


def _figure() -> Any:
    """A figure that draws without a display and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    from matplotlib import rcParams

    rcParams["svg.hashsalt"] = path.stem  # the same rows draw the same file
    figure.savefig(path, format="svg", metadata={"Date": None})


_TICKS = (0.25, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 20)


def draw_ratios(rows: Sequence[Row], path: Path) -> None:
    """Ratio of every row with its spread, on a logarithmic axis; right of the line ours is faster."""
    figure = _figure()
    axes = figure.subplots()
    shown = [r for r in rows if not math.isnan(r.ratio)][::-1]
    for i, row in enumerate(shown):
        color = {"faster": "tab:green", "slower": "tab:red"}.get(row.verdict, "tab:gray")
        spread = 0.0 if math.isnan(row.spread) else row.spread
        axes.plot([1 / (1 + spread), 1 + spread], [i, i], color="lightgray", linewidth=9, solid_capstyle="butt")
        axes.plot(row.ratios, [i] * len(row.ratios), "|", color=color, markersize=9)
        axes.plot(row.ratio, i, "o", color=color, alpha=0.4 if row.is_disturbed else 1.0)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(shown)), [_name(r) + (" (disturbed)" if r.is_disturbed else "") for r in shown])
    low, high = min([r.ratio for r in shown], default=1), max([r.ratio for r in shown], default=1)
    kept = [t for t in _TICKS if low * 0.8 <= t <= high * 1.25]
    axes.set_xticks(kept, [f"{t:g}" for t in kept], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("ratio to llama-server; gray: what two measures of the same server differ by")
    _save(figure, path)


def draw_clients(rows: Sequence[Row], path: Path, *, names: tuple[str, str]) -> None:
    """Throughput and time to first token of the short workload over the number of clients."""
    figure = _figure()
    left, right = figure.subplots(1, 2)
    short = sorted((r for r in rows if r.workload == "short"), key=lambda r: r.clients)
    clients = [r.clients for r in short]
    for name, sides in zip(names, ([r.ours for r in short], [r.peer for r in short]), strict=True):
        left.plot(clients, [s.value for s in sides], "o-", label=name)
        right.plot(clients, [s.first_token_p95 * 1e3 for s in sides], "o-", label=name)
    for axes, label in ((left, "tokens a second"), (right, "first token, 95th percentile, ms")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(clients, [str(c) for c in clients])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("clients")
        axes.set_ylabel(label)
        axes.grid(visible=True, alpha=0.3)
    left.legend()
    _save(figure, path)


def write(report: Report, out: Path, *, names: tuple[str, str], plots: bool) -> list[Path]:
    """Write `serve.json`, `serve.md` and the plots; gives what was written."""
    out.mkdir(parents=True, exist_ok=True)
    encoded = msgspec.json.format(msgspec.json.encode(report), indent=1)
    (out / "serve.json").write_bytes(encoded + b"\n")
    (out / "serve.md").write_text(render_markdown(report), "utf-8")
    written = [out / "serve.json", out / "serve.md"]
    if plots:
        draw_ratios(report.rows, out / "serve-ratios.svg")
        draw_clients(report.rows, out / "serve-clients.svg", names=names)
        written += [out / "serve-ratios.svg", out / "serve-clients.svg"]
    return written
