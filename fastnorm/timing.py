"""Timing contenders side by side.

They run in one process, in turns: each round times every contender once, in an order that rotates,
so that a machine that slows down slows all of them. What is reported is the median over the rounds,
and for a ratio the median of the rounds' ratios.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

ROUNDS = 15


class Timed(Protocol):
    """A line of Python, and the names it uses."""

    @property
    def statement(self) -> str: ...
    @property
    def names(self) -> dict[str, Any]: ...


def interleave(
    contenders: Mapping[str, Timed],
    seconds: float,
    rounds: int = ROUNDS,
    least: float = 0.0,
    tick: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds a call of each contender, one number a round.

    seconds is shared out evenly over all contenders and rounds; a contender runs for at least
    `least` seconds a round, and at least once. tick is called after each round. A clock of CPU time
    leaves out what other processes took; it is of use with one thread only.
    """
    share = max(seconds / (rounds * len(contenders)), least)
    timers = {
        name: timeit.Timer(contender.statement, timer=clock, globals=contender.names)
        for name, contender in contenders.items()
    }
    loops = {name: _loops(timer, share) for name, timer in timers.items()}
    times: dict[str, list[float]] = {name: [] for name in timers}
    order = list(timers)
    for _ in range(rounds):
        for name in order:
            times[name].append(timers[name].timeit(loops[name]) / loops[name])
        order.append(order.pop(0))
        tick()
    return times


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """The median over the rounds of times / base."""
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


def write_json(machine: Mapping[str, Any], results: Sequence[Any], path: str) -> None:
    """Dataclasses of results, and where they were measured; "-" is the standard output."""
    found = {"machine": machine, "command": sys.argv, "results": [asdict(r) for r in results]}
    text = json.dumps(found, indent=1)
    if path == "-":
        print(text)
    else:
        Path(path).write_text(text + "\n")


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    units = ("ns", 1e-9), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)
    unit, size = next((u for u in units if seconds < 999.5 * u[1]), units[-1])
    return f"{seconds / size:#.3g}".rstrip(".") + f" {unit}"


def _loops(timer: timeit.Timer, share: float) -> int:
    """How many calls fill `share` seconds. The first call only warms up."""
    timer.timeit(1)
    loops = 1
    while (taken := timer.timeit(loops)) < share / 4:
        loops *= 4 if taken * 10 < share else 2
    return max(1, round(loops * share / taken))
