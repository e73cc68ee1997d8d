"""``python -m fastnorm bench``: this machine, fastnorm next to the libraries that are installed."""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fastnorm
from fastnorm import cases, contenders, timing

# By the code path they exercise: one row, rows in cache, narrow rows, memory.
SHAPES = [
    *[(1, 128), (1, 768), (1, 4096), (32, 768), (512, 768), (4096, 768)],
    *[(65536, 8), (65536, 32), (8192, 128), (32768, 768)],
]
QUICK_SHAPES = [(1, 768), (32, 768), (512, 768), (16384, 8)]
# Of arrays with channels: one image, some that fit in the cache, many that do not.
IMAGES = [(1, 64, 56, 56), (8, 256, 28, 28), (32, 64, 112, 112)]
QUICK_IMAGES = IMAGES[:2]


@dataclass(frozen=True)
class Result:
    """One contender at one shape."""

    op: str
    dtype: str
    shape: tuple[int, ...]
    align: int
    threads: int
    provider: str
    output: str
    statement: str
    seconds: float  # a call, median of the rounds
    ratio: float  # to fastnorm's call with the same kind of output, median of the rounds' ratios
    gigabytes_per_second: float
    error: float | None  # largest, see fastnorm.accuracy; None for the copy
    rounds: list[float]

    @property
    def name(self) -> str:
        return str(self.shape)


def measure(
    case: cases.Case,
    threads: int = 1,
    seconds: float = 3.0,
    rounds: int = timing.ROUNDS,
    least: float = 0.0,
    tick: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Result]:
    """Times every contender for the case, and finds its largest error."""
    found = contenders.contenders(case, threads)
    errors = {
        name: None if contender.provider == "copy" else case.largest_error(contender.results())
        for name, contender in found.items()
    }
    times = timing.interleave(found, seconds, rounds, least, tick, clock)
    results = []
    for name, contender in found.items():
        ours = times.get(f"fastnorm {contender.output}", times["fastnorm new"])
        median = statistics.median(times[name])
        moved = 2 * case.x.nbytes if contender.provider == "copy" else case.bytes_moved
        results.append(
            Result(
                op=case.op,
                dtype=case.dtype.name,
                shape=case.shape,
                align=case.align,
                threads=threads,
                provider=contender.provider,
                output=contender.output,
                statement=contender.statement,
                seconds=median,
                ratio=timing.median_ratio(times[name], ours),
                gigabytes_per_second=moved / median / 1e9,
                error=errors[name],
                rounds=times[name],
            )
        )
    return results


def machine() -> dict[str, Any]:
    """What the numbers depend on: the CPU, the system and every version."""
    return {
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "isa": fastnorm._core.isa_active(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": contenders.versions(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


# ---- the command --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    if options.plot:
        import matplotlib.figure  # noqa: F401  (said before the measurement, not after it)
    shapes = options.shapes or default_shapes(options.op, options.quick)
    seconds = options.seconds or (0.5 if options.quick else 3.0)
    results = _measure_all(shapes, seconds, options)
    if options.json != "-":
        _show(results, options, Console())
    if options.json:
        timing.write_json(machine(), results, options.json)
    if options.plot:
        plot(results, options.plot)
        print(f"plot: {options.plot}", file=sys.stderr)
    return 0


def default_shapes(op: str, quick: bool) -> Sequence[tuple[int, ...]]:
    if op in cases.CHANNELS:
        return QUICK_IMAGES if quick else IMAGES
    return QUICK_SHAPES if quick else SHAPES


def _measure_all(
    shapes: Sequence[tuple[int, ...]], seconds: float, options: argparse.Namespace
) -> list[Result]:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    results = []
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=len(shapes) * timing.ROUNDS)
        for shape in shapes:
            case = cases.Case(options.op, shape, options.dtype, options.align)
            progress.update(task, description=f"{case.op} {case.name}")
            if not console.is_terminal:
                print(f"{case.op} {case.name} ...", file=sys.stderr, flush=True)
            results += measure(
                case, options.threads, seconds, tick=lambda: progress.update(task, advance=1)
            )
    return results


def _show(results: list[Result], options: argparse.Namespace, console: Console) -> None:
    count = "one thread" if options.threads == 1 else f"{options.threads} threads"
    align = f"arrays at {options.align % 64} modulo 64" if options.align != 64 else "arrays aligned"
    title = f"{options.op}, {options.dtype}, {count}, {align}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("shape", "library", "output"):
        table.add_column(heading, no_wrap=True)
    for heading in ("time", "ratio", "GB/s", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for before, result in zip([None, *results], results, strict=False):
        first = before is None or before.shape != result.shape
        if first and before is not None:
            table.add_section()
        table.add_row(
            result.name if first else "",
            result.provider,
            result.output,
            timing.duration(result.seconds),
            f"{result.ratio:.2f}",
            f"{result.gigabytes_per_second:.1f}",
            "" if result.error is None else f"{result.error:.1e}",
            style="bold" if result.provider.startswith("fastnorm") else None,
        )
    console.print(table)
    console.print(
        f"Medians of {timing.ROUNDS} rounds, in one process, in turns. ratio: the time over that "
        "of fastnorm with the same kind of output (below 1: faster than fastnorm). error: the "
        "largest, against float64; fastnorm promises at most "
        f"{cases.allowed_error(options.op, options.dtype):.1g}.\n{machine_line()}",
        highlight=False,
        soft_wrap=True,
        style="dim",
    )


def machine_line() -> str:
    """What `machine` says, as a line to print."""
    here = machine()
    found = [f"{name} {version}" for name, version in here["versions"].items() if version]
    absent = [name for name, version in here["versions"].items() if not version]
    missing = f"; not installed: {', '.join(absent)}" if absent else ""
    return (
        f"{here['cpu']} ({here['isa']}, {here['cpus']} CPUs), Python {here['python']}, "
        f"{', '.join(found)}{missing}."
    )


# ---- the plot -----------------------------------------------------------------------------------

COLORS = {
    "fastnorm": "#111111",
    "fastnorm object": "#7a7a7a",
    "numpy": "#1f77b4",
    "torch": "#d62728",
    "onnxruntime": "#9467bd",
    "numba": "#2ca02c",
    "numba fastmath": "#98df8a",
    "copy": "#ff9f1c",
}


def plot(results: list[Result], path: str) -> None:
    """Each contender's time over fastnorm's, a column for each shape."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(result.name for result in results))
    providers = list(dict.fromkeys(result.provider for result in results))
    figure = Figure(figsize=(max(6.5, 1.5 + 0.95 * len(shapes)), 5.2), layout="constrained")
    axes = figure.add_subplot()
    _draw_ratios(axes, results, shapes, providers)
    _label(axes, results, shapes)
    handles = _legend_handles(providers)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=math.ceil(len(handles) / 2), fontsize=8
    )
    figure.savefig(path, dpi=150)


def _draw_ratios(axes: Any, results: list[Result], shapes: list[str], providers: list[str]) -> None:
    axes.axhline(1, color=COLORS["fastnorm"], linewidth=1.2, zorder=1)
    shift = {p: 0.7 * (i / max(1, len(providers) - 1) - 0.5) for i, p in enumerate(providers)}
    for result in results:
        color = COLORS.get(result.provider)
        axes.plot(
            shapes.index(result.name) + shift[result.provider],
            result.ratio,
            marker="s" if result.output == "out" else "o",
            markerfacecolor=color if result.output == "out" else "white",
            markeredgecolor=color,
            markersize=6.5,
        )
    for i in range(1, len(shapes)):
        axes.axvline(i - 0.5, color="0.9", linewidth=0.8, zorder=0)


def _label(axes: Any, results: list[Result], shapes: list[str]) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_ylabel("time / fastnorm's time with the same kind of output")
    ours = {r.name: r.seconds for r in reversed(results) if r.provider == "fastnorm"}
    axes.set_xticks(
        range(len(shapes)), [f"{s}\n{timing.duration(ours[s])}" for s in shapes], fontsize=8
    )
    axes.set_xlabel("the shape, and what fastnorm takes with a new output")
    axes.grid(axis="y", which="major", color="0.9")
    first = results[0]
    axes.set_title(
        f"{first.op}, {first.dtype}, {first.threads} thread{'s' * (first.threads > 1)}; "
        "above the line: slower than fastnorm",
        fontsize=10,
        loc="left",
    )


def _legend_handles(providers: list[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", ls="", color=COLORS.get(p), label=p) for p in providers]
    for marker, face, label in (("o", "white", "new output"), ("s", "0.4", "into out")):
        handles.append(
            Line2D([], [], marker=marker, ls="", mfc=face, mec="0.4", color="0.4", label=label)
        )
    return handles
