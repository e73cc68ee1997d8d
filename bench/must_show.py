"""The side-by-side table: fastnorm next to its peers at the shapes it makes promises for.

    python bench/must_show.py [--only 32x768] [--cpu 0] [--cpu-time] [--json FILE]

float32, one thread pinned to one CPU, all contenders of a shape interleaved in one process, medians
of 15 rounds of at least 20 ms each; for a ratio the median of the rounds' ratios. Everything is
measured twice: with arrays at a cache line, and at 16 modulo 64 as NumPy often has them. A mark
says whether the promise was kept here; nothing fails by it, for timings depend on the machine.

oneDNN is measured where FASTNORM_ONEDNN names the program built from onednn_layer_norm.cpp: that
program and this process take turns, five times at each shape.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import nt_copy
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fastnorm
from fastnorm import bench, contenders, timing

NEW, OUT, OBJECT = "fastnorm new", "fastnorm out", "fastnorm object out"
TORCH, NUMPY, NT_COPY = "torch new", "numpy new", nt_copy.NAME
ALIGNMENTS = (64, 16)


@dataclass(frozen=True)
class Promise:
    """One of three: ours is `faster` times faster than the peer, takes at most `within` times as
    long, or at most `seconds`."""

    rows: int
    cols: int
    ours: str
    peer: str = ""
    faster: float = 0.0
    within: float = 0.0
    seconds: float = 0.0
    op: str = "layer_norm"
    any_alignment: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def wanted(self) -> str:
        if self.seconds:
            return f"≤ {timing.duration(self.seconds)}"
        return f"≥ {self.faster:g}×" if self.faster else f"≤ {self.within:g}×"

    def figure(self, times: dict[str, list[float]]) -> float:
        """What is compared with the number in `wanted`."""
        ours = times[self.ours]
        if self.seconds:
            return statistics.median(ours)
        if self.faster:
            return timing.median_ratio(times[self.peer], ours)
        return timing.median_ratio(ours, times[self.peer])

    def kept(self, figure: float) -> bool:
        return figure >= self.faster if self.faster else figure <= (self.within or self.seconds)

    def text(self, figure: float) -> str:
        return timing.duration(figure) if self.seconds else f"{figure:.2f}×"


BACKWARD = "layer_norm_backward"
PROMISES = [
    Promise(1, 128, NEW, TORCH, faster=5),
    Promise(1, 128, NEW, NUMPY, faster=20),
    Promise(1, 768, NEW, TORCH, faster=5),
    Promise(1, 768, NEW, NUMPY, faster=20),
    Promise(1, 768, OUT, TORCH, faster=12),
    Promise(1, 768, OUT, seconds=200e-9),
    Promise(1, 768, OBJECT, OUT, faster=1),
    Promise(1, 4096, NEW, TORCH, faster=3.5),
    Promise(1, 4096, NEW, NUMPY, faster=10),
    Promise(32, 768, NEW, TORCH, faster=1.6),
    Promise(512, 768, NEW, TORCH, faster=1.15),
    Promise(512, 768, OUT, "copy out", within=1.15),
    Promise(4096, 768, NEW, TORCH, faster=1.08),
    Promise(4096, 768, OUT, "copy out", within=1.15),
    Promise(65536, 8, NEW, TORCH, faster=6),
    Promise(65536, 32, NEW, TORCH, faster=2.5),
    Promise(8192, 128, NEW, TORCH, faster=1.5),
    *[
        promise
        for shape, torch, copy in (((32768, 768), 4.5, 1.25), ((16384, 4096), 3.3, 1.35))
        for promise in (
            Promise(*shape, OUT, TORCH, faster=torch, any_alignment=True),
            Promise(*shape, OUT, NT_COPY, within=copy, any_alignment=True),
            Promise(*shape, OUT, "onnxruntime out", faster=1.8, any_alignment=True),
            Promise(*shape, OUT, "numba out", faster=1.8, any_alignment=True),
            Promise(*shape, OUT, "numba fastmath out", faster=1.8, any_alignment=True),
            Promise(*shape, NEW, "copy new", within=1.1),
        )
    ],
    Promise(32768, 768, NEW, TORCH, faster=1.8),
    Promise(1, 768, NEW, TORCH, faster=8, op=BACKWARD),
    Promise(32, 768, NEW, TORCH, faster=1.25, op=BACKWARD),
    Promise(4096, 768, NEW, TORCH, faster=1.25, op=BACKWARD),
    Promise(32768, 768, NEW, TORCH, faster=3.5, op=BACKWARD),
]

ONEDNN_FASTER = {
    (1, 128): 3,
    (1, 768): 3,
    (1, 4096): 1.3,
    (32, 768): 0.93,
    (512, 768): 0.93,
    (4096, 768): 0.93,
    (65536, 8): 3.5,
    (65536, 32): 1.4,
    (8192, 128): 0.93,
    (32768, 768): 1.5,
    (16384, 4096): 1.5,
}
ONEDNN_TURNS = 5


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    what: str
    ours: str
    peer: str
    our_time: str
    peer_time: str
    wanted: str
    figures: list[str]  # for each alignment
    kept: bool


# ---- promises about calls -----------------------------------------------------------------------


def measure(op: str, shape: tuple[int, int], clock: Callable[[], float]) -> list[Line]:
    """Every promise about one op at one shape."""
    promises = [p for p in PROMISES if (p.op, p.shape) == (op, shape)]
    by_alignment = [_times(op, shape, align, promises, clock) for align in ALIGNMENTS]
    return [
        _line(promise, by_alignment)
        for promise in promises
        if all({promise.ours, promise.peer} - {""} <= times.keys() for times in by_alignment)
    ]


def _times(
    op: str,
    shape: tuple[int, int],
    align: int,
    promises: list[Promise],
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    case = contenders.Case(op, shape, "float32", align)
    wanted = {name for p in promises for name in (p.ours, p.peer)}
    libraries = {name.partition(" ")[0] for name in wanted}
    providers = contenders.PROVIDERS.keys() & libraries
    found = contenders.contenders(case, providers=providers)
    found = {name: found[name] for name in found.keys() & wanted}
    if NT_COPY in wanted:
        nt_copy.add_to(found, case)
    return timing.interleave(found, seconds=0, least=0.02, clock=clock)


def _line(promise: Promise, by_alignment: list[dict[str, list[float]]]) -> Line:
    figures = [promise.figure(times) for times in by_alignment]
    binding = figures if promise.any_alignment else figures[:1]
    medians = {name: statistics.median(t) for name, t in by_alignment[0].items()}
    return Line(
        what=f"{promise.op.removeprefix('layer_norm_')} {promise.shape}",
        ours=promise.ours.removeprefix("fastnorm").lstrip(),
        peer=promise.peer,
        our_time=timing.duration(medians[promise.ours]),
        peer_time=timing.duration(medians[promise.peer]) if promise.peer else "",
        wanted=promise.wanted,
        figures=[promise.text(figure) for figure in figures],
        kept=all(promise.kept(figure) for figure in binding),
    )


def onednn_times(program: str, shape: tuple[int, int]) -> tuple[list[float], list[float]]:
    """This process, from Python with out, and oneDNN's in turns: seconds a call of each turn."""
    case = contenders.Case("layer_norm", shape, "float32")
    ours = {OUT: contenders.contenders(case, providers=("fastnorm",))[OUT]}
    command = [program, f"{shape[0]}x{shape[1]}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    our_times, their_times = [], []
    for _ in range(ONEDNN_TURNS):
        answer = subprocess.run(command, env=environment, check=True, capture_output=True)
        their_times.append(float(answer.stdout.split()[1]))
        times = timing.interleave(ours, seconds=0, rounds=9, least=0.02)[OUT]
        our_times.append(statistics.median(times))
    return our_times, their_times


def measure_onednn(program: str, shape: tuple[int, int]) -> Line:
    """The promise about one shape, from Python with out against oneDNN's primitive."""
    our_times, their_times = onednn_times(program, shape)
    figure = timing.median_ratio(their_times, our_times)
    return Line(
        what=f"layer_norm {shape}",
        ours="out",
        peer="oneDNN primitive",
        our_time=timing.duration(statistics.median(our_times)),
        peer_time=timing.duration(statistics.median(their_times)),
        wanted=f"≥ {ONEDNN_FASTER[shape]:g}×",
        figures=[f"{figure:.2f}×", ""],
        kept=figure >= ONEDNN_FASTER[shape],
    )


# ---- promises about the process -----------------------------------------------------------------


def two_threads() -> Line:
    """One thread's time over that of two."""
    case = contenders.Case("layer_norm", (4096, 768), "float32")
    names = contenders.contenders(case, providers=("fastnorm",))[OUT].names
    names = names | {"set_num_threads": fastnorm.set_num_threads}
    call = "layer_norm(x, cols, weight, bias, eps, out=y)"
    found = {
        str(n): contenders.Contender("fastnorm", "out", f"set_num_threads({n}); {call}", names)
        for n in (1, 2)
    }
    times = timing.interleave(found, seconds=0, least=0.02)
    fastnorm.set_num_threads(1)
    figure = timing.median_ratio(times["1"], times["2"])
    return Line(
        what="layer_norm (4096, 768)",
        ours="out, two threads",
        peer="one thread",
        our_time=timing.duration(statistics.median(times["2"])),
        peer_time=timing.duration(statistics.median(times["1"])),
        wanted="≥ 1.8×",
        figures=[f"{figure:.2f}×", ""],
        kept=figure >= 1.8,
    )


def import_time() -> Line:
    """What importing fastnorm adds to importing NumPy: the median of nine processes."""
    code = (
        "import time, numpy; start = time.perf_counter(); import fastnorm; "
        "print(time.perf_counter() - start)"
    )
    runs = [
        float(
            subprocess.run(
                [sys.executable, "-I", "-c", code], check=True, capture_output=True
            ).stdout
        )
        for _ in range(9)
    ]
    median = statistics.median(runs)
    return _absolute("import fastnorm, after numpy", "", median, 10e-3)


def busy_neighbour() -> Line:
    """The 99th percentile of 100,000 calls while another Python thread computes."""
    case = contenders.Case("layer_norm", (1, 768), "float32")
    x, cols, weight, bias = case.x, case.shape[1], case.weight, case.bias
    layer_norm, clock, stop = fastnorm.layer_norm, time.perf_counter_ns, threading.Event()

    def compute() -> None:
        while not stop.is_set():
            sum(range(1000))

    neighbour = threading.Thread(target=compute)
    neighbour.start()
    taken = []
    for _ in range(100_000):
        start = clock()
        layer_norm(x, cols, weight, bias)
        taken.append(clock() - start)
    stop.set()
    neighbour.join()
    return _absolute(
        "(1, 768), another thread busy",
        "new, 99th %",
        float(np.percentile(taken, 99)) * 1e-9,
        20e-6,
    )


def _absolute(what: str, ours: str, figure: float, limit: float) -> Line:
    text = timing.duration(figure)
    wanted = f"≤ {timing.duration(limit)}"
    return Line(what, ours, "", text, "", wanted, [text, ""], figure <= limit)


# ---- the script ---------------------------------------------------------------------------------


def lines(options: argparse.Namespace) -> Iterator[Line]:
    only, clock = options.only, time.process_time if options.cpu_time else time.perf_counter
    if only is None:
        yield import_time()
        if len(os.sched_getaffinity(0)) > 1:
            yield two_threads()
        else:
            print("two threads: not measured, there is one CPU", file=sys.stderr)
    os.sched_setaffinity(0, {options.cpu})
    if only is None:
        yield busy_neighbour()
    cases = dict.fromkeys((p.op, p.shape) for p in PROMISES if only in (None, p.shape))
    for op, shape in track(list(cases), "calls", console=Console(stderr=True)):
        yield from measure(op, shape, clock)
    program = os.environ.get("FASTNORM_ONEDNN")
    if program is None:
        print("oneDNN: not measured, FASTNORM_ONEDNN is not set", file=sys.stderr)
        return
    shapes = [shape for shape in ONEDNN_FASTER if only in (None, shape)]
    for shape in track(shapes, "oneDNN", console=Console(stderr=True)):
        yield measure_onednn(program, shape)


def show(found: list[Line]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("what", "ours", "peer"):
        table.add_column(heading, no_wrap=True)
    for heading in ("our time", "its time", "wanted", "at 64", "at 16", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in found:
        table.add_row(
            line.what,
            line.ours,
            line.peer,
            line.our_time,
            line.peer_time,
            line.wanted,
            *line.figures,
            "kept" if line.kept else "MISSED",
            style=None if line.kept else "red",
        )
    Console(width=140).print(table)
    kept = sum(line.kept for line in found)
    print(f"{kept} of {len(found)} kept. {bench.machine_line()}")


def _shape(text: str) -> tuple[int, int]:
    rows, cols = map(int, text.split("x"))
    return rows, cols


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=_shape, metavar="ROWSxCOLS", help="one shape")
    parser.add_argument(
        "--cpu", type=int, default=min(os.sched_getaffinity(0)), help="the CPU to pin to"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU time, for a machine whose CPUs other programs use too",
    )
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    found = list(lines(options))
    show(found)
    if options.json:
        text = {"machine": bench.machine(), "lines": [asdict(line) for line in found]}
        options.json.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
