"""Measures, and writes the numbers of README.md between their markers. Nothing else writes them.

    python bench/readme.py [--cpu 0] [--cpu-time] [--quick] [--readme README.md]

``make readme`` makes the environment that this needs and calls it. oneDNN is measured where
FASTNORM_ONEDNN names the program built from onednn_norms.cpp. --quick measures a few shapes
for a short time: to see whether this script works, not for a README that is to be read.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import errors
import must_show
import nt_copy
from rich.console import Console
from rich.progress import track

from fastnorm import bench, contenders, timing

FORWARD = [*bench.SHAPES, (16384, 4096)]
BACKWARD = [(1, 768), (32, 768), (4096, 768), (32768, 768)]
QUICK = [(1, 768), (32, 768)]
ROWS, IMAGES = (4096, 768), (8, 256, 28, 28)
OPS = {
    ROWS: [
        "rms_norm",
        "rms_norm_backward",
        "add_layer_norm",
        "adaptive_layer_norm",
    ],
    IMAGES: [
        "group_norm",
        "group_norm_backward",
        "instance_norm",
        "instance_norm_backward",
        "batch_norm",
        "batch_norm_training",
        "batch_norm_training_backward",
    ],
}
QUICK_OPS = {(32, 768): OPS[ROWS], (1, 8, 4, 4): OPS[IMAGES]}

Times = dict[str, float]  # seconds a call, by contender
NEW = {
    "fastnorm": "fastnorm new",
    "torch": "torch new",
    "ONNX Runtime": "onnxruntime new",
    "NumPy": "numpy new",
    "`x.copy()`": "copy new",
}
OUT = {
    "fastnorm": "fastnorm out",
    "`LayerNorm` object": "fastnorm object out",
    "ONNX Runtime, bound": "onnxruntime out",
    "Numba": "numba out",
    "Numba, fastmath": "numba fastmath out",
    "oneDNN, C++": "onednn out",
    "`np.copyto`": "copy out",
    "non-temporal copy": nt_copy.NAME,
}
COPIES = ("copy new", "copy out", nt_copy.NAME)
BACKWARD_NEW = {name: NEW[name] for name in ("fastnorm", "torch", "NumPy")}
OPS_NEW = {**BACKWARD_NEW, "`x.copy()`": NEW["`x.copy()`"]}


def measure(op: str, shape: tuple[int, ...], least: float, clock: Callable[[], float]) -> Times:
    """Medians of every contender, oneDNN and the non-temporal copy where they can be had."""
    case = contenders.Case(op, shape, "float32")
    found = contenders.contenders(case)
    if op == "layer_norm":
        nt_copy.add_to(found, case)
    times = timing.interleave(found, seconds=0, least=least, clock=clock)
    medians = {name: statistics.median(rounds) for name, rounds in times.items()}
    program = os.environ.get("FASTNORM_ONEDNN")
    if program and op == "layer_norm":
        medians["onednn out"] = statistics.median(must_show.onednn_times(program, shape)[1])
    return medians


def time_table(
    columns: dict[str, str],
    found: dict[str, Times],
    more: Sequence[list[str]] = (),
    first: str = "rows, columns",
) -> str:
    """Markdown: calls down, contenders across, microseconds; the fastest of a row is bold."""
    present = {
        head: name for head, name in columns.items() if any(name in t for t in found.values())
    }
    rows = [[first, *present]]
    for what, times in found.items():
        racing = [times[name] for name in present.values() if name in times and name not in COPIES]
        cells = [_cell(times.get(name), min(racing), name) for name in present.values()]
        rows.append([what, *cells])
    return _markdown([*rows, *more])


def numbers(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


def _cell(seconds: float | None, fastest: float, name: str) -> str:
    if seconds is None:
        return ""
    text = _microseconds(seconds)
    return f"**{text}**" if seconds == fastest and name not in COPIES else text


def _microseconds(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def error_rows(found: dict[float, dict[str, float]]) -> list[list[str]]:
    """Rows of the table of new outputs: the largest errors at some distances from 0."""
    providers = ("fastnorm", "torch", "onnxruntime", "numpy")
    return [
        [
            f"largest error, mean {mean:,.0f} × std",
            *[errors.number(found[mean][provider]) for provider in providers],
            "",
        ]
        for mean in (0.0, 1e3, 1e6)
    ]


def _markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def headline(times: Times, found: dict[float, dict[str, float]]) -> str:
    ours, torch = times["fastnorm new"], times["torch new"]
    mean = 1e6
    return (
        f"One row of 768 floats takes {ours * 1e6:.2f} µs from Python, "
        f"{torch / ours:.0f} times less than `torch.nn.functional.layer_norm`; and where the mean "
        f"is a million times the standard deviation the largest error is "
        f"{errors.number(found[mean]['fastnorm'])}, not {errors.number(found[mean]['torch'])}."
    )


def conditions(options: argparse.Namespace) -> str:
    here = bench.machine()
    versions = ", ".join(f"{name} {v}" for name, v in here["versions"].items() if v)
    clock = "CPU time" if options.cpu_time else "wall time"
    onednn = ""
    if os.environ.get("FASTNORM_ONEDNN"):
        onednn = " oneDNN runs in a process of its own, in turns with this one."
    arguments = " ".join(sys.argv[1:])
    command = f"make readme ARGS='{arguments}'" if arguments else "make readme"
    return (
        f"{here['cpu']}, {here['isa']}, one thread on one CPU, {here['system']}, "
        f"Python {here['python']}; {versions}. Microseconds a call, {clock}, medians of "
        f"{timing.ROUNDS} rounds, all of a row in one process and in turns, float32 with weight "
        f"and bias, arrays at a cache line.{onednn} Command: `{command}`."
    )


def write(path: Path, blocks: dict[str, str]) -> None:
    """Replaces what stands between <!-- numbers: NAME --> and <!-- end -->."""
    text = path.read_text()
    for name, block in blocks.items():
        head, begin, rest = text.partition(f"<!-- numbers: {name} -->\n")
        _, end, tail = rest.partition("<!-- end -->")
        if not end:
            raise SystemExit(f"{path}: wanted a block 'numbers: {name}'")
        text = f"{head}{begin}{block}\n{end}{tail}"
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--cpu", type=int, default=min(os.sched_getaffinity(0)))
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that is in use")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--readme", type=Path, default=root / "README.md")
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.cpu})
    clock = time.process_time if options.cpu_time else time.perf_counter
    least = 0.002 if options.quick else 0.02

    def all_times(op: str, shapes: list[tuple[int, int]]) -> dict[str, Times]:
        console = Console(stderr=True)
        return {
            numbers(shape): measure(op, shape, least, clock)
            for shape in track(shapes, op, console=console)
        }

    forward = all_times("layer_norm", QUICK if options.quick else FORWARD)
    backward = all_times("layer_norm_backward", QUICK if options.quick else BACKWARD)
    ops = {
        f"{op}, {numbers(shape)}": measure(op, shape, least, clock)
        for shape, names in (QUICK_OPS if options.quick else OPS).items()
        for op in track(names, "other ops", console=Console(stderr=True))
    }
    found = errors.errors_by_mean("layer_norm", errors.QUICK_COLS if options.quick else errors.COLS)
    blocks = {
        "headline": headline(forward[numbers((1, 768))], found),
        "new": time_table(NEW, forward, error_rows(found)),
        "out": time_table(OUT, forward),
        "backward": time_table(BACKWARD_NEW, backward),
        "ops": time_table(OPS_NEW, ops, first="op, shape"),
        "conditions": conditions(options),
    }
    write(options.readme, blocks)


if __name__ == "__main__":
    main()
