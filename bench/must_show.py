"""The side-by-side table: fastnorm next to its peers at the shapes it makes promises for.

    python bench/must_show.py [--topic rms_norm] [--only 1x768] [--cpu 0] [--cpu-time]
        [--json FILE]

The promises are in promises.py, by topic. One thread pinned to one CPU, all contenders of a shape
interleaved in one process, medians of 15 rounds of at least 20 ms each; for a ratio the median of
the rounds' ratios. Everything is measured twice: with arrays at a cache line, and at 16 modulo 64
as NumPy often has them. Before that, each contender has to compute the same function, on the first
rows or on all channels. A mark says whether the promise was kept here; nothing fails by it, for
timings depend on the machine.

oneDNN is measured where FASTNORM_ONEDNN names the program built from onednn_norms.cpp: that
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
from typing import Any, NamedTuple

import nt_copy
import numpy as np
import variants
from promises import NT_COPY, ONEDNN, OUT, PROMISES, OneDnn, Promise, Shape
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fastnorm
from fastnorm import bench, cases, contenders, timing

ALIGNMENTS = (64, 16)
ONEDNN_TURNS = 5
PROCESS = "process"  # the topic of what is no call's time
# The rows that are checked, and how many times worse than fastnorm's a peer's results may be.
CHECKED_ROWS, PEER_ERROR = 512, 10


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


class Timings(NamedTuple):
    """What is measured together: the calls of one op at one shape and type."""

    op: str
    shape: Shape
    dtype: str

    @property
    def name(self) -> str:
        op = "backward" if self.op == "layer_norm_backward" else self.op
        dtype = "" if self.dtype == "float32" else f" {self.dtype}"
        return f"{op}{dtype} {self.shape}"


# ---- promises about calls -----------------------------------------------------------------------


def measure(what: Timings, promises: list[Promise], clock: Callable[[], float]) -> list[Line]:
    """Every promise about one op at one shape."""
    wanted = {name for p in promises for name in (p.ours, p.peer)} - {""}
    check(what, wanted)
    by_alignment = []
    for align in ALIGNMENTS:
        found = build(what, align, wanted).found
        by_alignment.append(timing.interleave(found, seconds=0, least=0.02, clock=clock))
    return [
        _line(what, promise, by_alignment)
        for promise in promises
        if all({promise.ours, promise.peer} - {""} <= times.keys() for times in by_alignment)
    ]


def build(what: Timings, align: int, wanted: set[str]) -> variants.Timed:
    """Those of the wanted contenders whose libraries are here."""
    if what.op in variants.OPS:
        made = variants.of_op(what.op, what.shape, what.dtype, align)
        found = {name: made.found[name] for name in made.found.keys() & wanted}
        return variants.Timed(found, made.error)
    case = cases.Case(what.op, what.shape, what.dtype, align)
    providers = contenders.PROVIDERS.keys() & {name.partition(" ")[0] for name in wanted}
    found = contenders.contenders(case, providers=providers)
    found = {name: found[name] for name in found.keys() & wanted}
    if NT_COPY in wanted:
        nt_copy.add_to(found, case)
    allowed = PEER_ERROR * cases.allowed_error(what.op, what.dtype)
    return variants.Timed(found, lambda results: case.largest_error(results) / allowed)


def check(what: Timings, wanted: set[str]) -> None:
    """Ends the script where a contender computes another function than its peers."""
    if what.op not in cases.CHANNELS:
        what = what._replace(shape=(min(CHECKED_ROWS, what.shape[0]), *what.shape[1:]))
    made = build(what, ALIGNMENTS[0], wanted)
    for name, contender in made.found.items():
        if contender.provider in ("copy", "nt copy", "dense"):
            continue
        error = made.error(contender.results())
        if not error <= 1:  # or NaN
            sys.exit(f"{what.name}: {name} computes another function: {error:.2g} is not ≤ 1")


def _line(what: Timings, promise: Promise, by_alignment: list[dict[str, list[float]]]) -> Line:
    figures = [promise.figure(times) for times in by_alignment]
    binding = figures if promise.any_alignment else figures[:1]
    medians = {name: statistics.median(t) for name, t in by_alignment[0].items()}
    return Line(
        what=what.name,
        ours=promise.ours.removeprefix("fastnorm").lstrip(),
        peer=promise.peer,
        our_time=timing.duration(medians[promise.ours]),
        peer_time=timing.duration(medians[promise.peer]) if promise.peer else "",
        wanted=promise.wanted,
        figures=[promise.text(figure) for figure in figures],
        kept=all(promise.kept(figure) for figure in binding),
    )


class OneDnnTimes(NamedTuple):
    """Seconds a call of each turn."""

    ours: list[float]
    theirs: list[float]
    version: str


def onednn_times(
    program: str, shape: Shape, op: str = "layer_norm", dtype: str = "float32"
) -> OneDnnTimes:
    """This process, from Python with out, and oneDNN's in turns."""
    case = cases.Case(op, shape, dtype)
    ours = {OUT: contenders.contenders(case, providers=("fastnorm",))[OUT]}
    command = [program, op, dtype, "x".join(map(str, shape))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = OneDnnTimes([], [], "")
    for _ in range(ONEDNN_TURNS):
        answer = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        _, seconds, version, *_ = answer.stdout.split()
        found = found._replace(version=version)
        found.theirs.append(float(seconds))
        times = timing.interleave(ours, seconds=0, rounds=9, least=0.02)[OUT]
        found.ours.append(statistics.median(times))
    return found


def measure_onednn(program: str, promise: OneDnn) -> Line:
    """The promise about one shape, from Python with out against oneDNN's primitive."""
    times = onednn_times(program, promise.shape, promise.op, promise.dtype)
    figure = timing.median_ratio(times.theirs, times.ours)
    return Line(
        what=Timings(promise.op, promise.shape, promise.dtype).name,
        ours="out",
        peer=f"oneDNN {times.version}",
        our_time=timing.duration(statistics.median(times.ours)),
        peer_time=timing.duration(statistics.median(times.theirs)),
        wanted=f"≥ {promise.faster:g}×",
        figures=[f"{figure:.2f}×", ""],
        kept=figure >= promise.faster,
    )


# ---- promises about the process -----------------------------------------------------------------


def two_threads() -> Line:
    """One thread's time over that of two."""
    case = cases.Case("layer_norm", (4096, 768), "float32")
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
    case = cases.Case("layer_norm", (1, 768), "float32")
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
    clock = time.process_time if options.cpu_time else time.perf_counter
    whole_process = options.only is None and options.topic in (None, PROCESS)
    if whole_process:
        yield import_time()
        if len(os.sched_getaffinity(0)) > 1:
            yield two_threads()
        else:
            print("two threads: not measured, there is one CPU", file=sys.stderr)
    os.sched_setaffinity(0, {options.cpu})
    if whole_process:
        yield busy_neighbour()
    promises: dict[Timings, list[Promise]] = {}
    for promise in _chosen(PROMISES, options):
        what = Timings(promise.op, promise.shape, promise.dtype)
        promises.setdefault(what, []).append(promise)
    for what in track(list(promises), "calls", console=Console(stderr=True)):
        yield from measure(what, promises[what], clock)
    yield from _onednn_lines(_chosen(ONEDNN, options))


def _chosen(by_topic: dict[str, list[Any]], options: argparse.Namespace) -> list[Any]:
    return [
        promise
        for topic, promises in by_topic.items()
        for promise in promises
        if options.topic in (None, topic) and options.only in (None, promise.shape)
    ]


def _onednn_lines(promises: list[OneDnn]) -> Iterator[Line]:
    program = os.environ.get("FASTNORM_ONEDNN")
    if program is None:
        print("oneDNN: not measured, FASTNORM_ONEDNN is not set", file=sys.stderr)
        return
    for promise in track(promises, "oneDNN", console=Console(stderr=True)):
        try:
            yield measure_onednn(program, promise)
        except subprocess.CalledProcessError:  # it has said why
            what = Timings(promise.op, promise.shape, promise.dtype)
            print(f"{what.name}: not measured, this oneDNN has none here", file=sys.stderr)


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


def _shape(text: str) -> Shape:
    return tuple(map(int, text.split("x")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topic", choices=(PROCESS, *PROMISES), help="a part of the table")
    parser.add_argument("--only", type=_shape, metavar="ROWSxCOLS", help="one shape, or NxCxHxW")
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
