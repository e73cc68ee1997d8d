"""The largest errors of fastnorm and of its peers, on rows that are hard.

    python bench/errors.py [--quick] [--large] [--json FILE]

Ten distributions of unit standard deviation are moved to means from 0 to 1e7 and rounded to
float32; rows have from 1 to 1,000,000 elements. Then come single rows at the ends of the range of
their type. Errors are counted as fastnorm.accuracy says, against the float64 reference: 1e-6 is
what fastnorm allows itself, a number near 1 means that no digit is right.

The same for batch, group and instance norm, whose units are what rows are there; with --large, of
100,000,000 elements too (which takes some 10 GB).

Last, every op in every type, at a mean of 1: errors over what fastnorm allows itself, which for the
half types is mostly the one rounding of the result, so 1 is as good as can be.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastnorm import _core, accuracy, bench, cases, contenders

Array = NDArray[Any]
PROVIDERS = ("fastnorm", "torch", "onnxruntime", "numpy")

COLS = (1, 2, 3, 7, 16, 33, 64, 100, 768, 1024, 1025, 4096, 16384, 65537, 1_000_000)
QUICK_COLS = (1, 3, 64, 768, 1025, 16384)
TYPES_COLS = (3, 64, 768, 1025)
BACKWARD_COLS = tuple(n for n in COLS if n < 100_000)
MEANS = (0.0, 1.0, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7)
# Elements of a plane: three times as many are a unit of group and of batch norm.
PLANES = tuple(n for n in COLS if n < 100_000)
ON_CHANNELS = (
    *("batch_norm_training", "group_norm", "instance_norm"),
    *("batch_norm_training_backward", "group_norm_backward", "instance_norm_backward"),
)
LARGE = 10_000, 10_000


def _spikes(rng: np.random.Generator, n: int) -> Array:
    return np.where(rng.random(n) < 0.01, 1e4, 0) + rng.standard_normal(n)


def _outlier(rng: np.random.Generator, n: int) -> Array:
    row = rng.standard_normal(n)
    row[n // 2] = 1e6
    return row


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "uniform": lambda rng, n: rng.random(n),
    "sorted": lambda rng, n: np.sort(rng.standard_normal(n)),
    "lognormal": lambda rng, n: rng.lognormal(0, 2, n),
    "Cauchy": lambda rng, n: rng.standard_cauchy(n),
    "spikes": _spikes,
    "one outlier": _outlier,
    "alternating": lambda rng, n: np.where(np.arange(n) % 2, 0.3, -0.3),
    "ramp": lambda rng, n: np.arange(n) / n,
    "two values": lambda rng, n: np.where(rng.random(n) < 0.5, 0.7, -0.1),
}


def _row(kind: str, n: int, mean: float) -> Array:
    row = DISTRIBUTIONS[kind](np.random.default_rng(n), n)
    unit: Array = (row - row.mean()) / (row.std() or 1.0)
    return unit + mean


HARD_ROWS: dict[str, tuple[str, Array, float]] = {
    name: (dtype, row, eps)
    for name, dtype, row, eps in (
        ("±3e38 in turn", "float32", np.where(np.arange(256) % 2, 3e38, -3e38), 1e-5),
        ("99 × -3e38, one 3e38", "float32", np.r_[np.full(99, -3e38), 3e38], 1e-5),
        ("1e30 × normal", "float32", 1e30 * _row("normal", 256, 0), 1e-5),
        ("1e-30 × normal, eps 0", "float32", 1e-30 * _row("normal", 256, 0), 0.0),
        ("1e-38 × normal, eps 0", "float32", 1e-38 * _row("normal", 256, 0), 0.0),
        ("constant 1234, n = 256", "float32", np.full(256, 1234.0), 1e-5),
        ("constant 3, eps 0", "float32", np.full(256, 3.0), 0.0),
        ("1e6, n = 1", "float32", np.full(1, 1e6), 1e-5),
        ("1e6 + 1e-1 × normal, n = 256", "float32", _row("normal", 256, 1e7) / 10, 1e-5),
        ("[40000 .. 40003]", "float32", np.arange(40000.0, 40004.0), 1e-5),
        ("float64: 1e200 × normal", "float64", 1e200 * _row("normal", 256, 0), 1e-5),
        ("float64: 1e-200 × normal, eps 0", "float64", 1e-200 * _row("normal", 256, 0), 0.0),
    )
}


def errors_by_mean(op: str, cols: Iterable[int]) -> dict[float, dict[str, float]]:
    """For each mean the largest error of each provider, of all that the op returns.

    weight = 1 and bias = 0.
    """
    worst: dict[float, dict[str, float]] = {mean: {} for mean in MEANS}
    for n in cols:
        for mean in MEANS:
            for provider, error in _errors(_case(op, n, mean)).items():
                worst[mean][provider] = max(worst[mean].get(provider, 0.0), error)
    return worst


def hard_row_errors() -> dict[str, dict[str, float]]:
    """For each hard row the error of each provider."""
    found = {}
    for name, (dtype, row, eps) in HARD_ROWS.items():
        case = contenders.Case("layer_norm", (1, len(row)), dtype, eps=eps)
        case.x[0], case.weight[:], case.bias[:] = row, 1, 0
        found[name] = _errors(case)
    return found


def errors_by_type(cols: Iterable[int]) -> dict[str, dict[str, float]]:
    """For each op and type the largest error of each provider, over what is allowed."""
    worst: dict[str, dict[str, float]] = {}
    for n in cols:
        for op in dict.fromkeys((*_core.OPS, *cases.CHANNELS)):
            for dtype in _core.DTYPES:
                of = worst.setdefault(f"{op}, {dtype}", {})
                for provider, error in _errors(_case(op, n, 1.0, dtype)).items():
                    ratio = error / cases.allowed_error(op, dtype)
                    of[provider] = max(of.get(provider, 0.0), ratio)
    return worst


def _case(op: str, n: int, mean: float, dtype: str = "float32") -> contenders.Case:
    if op in cases.CHANNELS:
        return _channels_case(op, n, mean, dtype)
    case = contenders.Case(op, (len(DISTRIBUTIONS), n), dtype)
    case.weight[:], case.bias[:] = 1, 0
    for x, kind in zip(case.x, DISTRIBUTIONS, strict=True):
        x[:] = _row(kind, n, mean)
    return case


def _channels_case(op: str, n: int, mean: float, dtype: str) -> contenders.Case:
    """Each unit is of one distribution: channels of batch norm, samples of the others.

    Of three channels, group norm makes one group.
    """
    count, axis = (3, 1) if op.startswith("batch_norm") else (len(DISTRIBUTIONS), 0)
    case = contenders.Case(op, (count, len(DISTRIBUTIONS) if axis else 3, n), dtype)
    case.weight[:], case.bias[:] = 1, 0
    units = np.moveaxis(case.x, axis, 0)
    for unit, kind in zip(units, DISTRIBUTIONS, strict=True):
        unit[...] = _row(kind, unit.size, mean).reshape(unit.shape)
    return case


def large_errors() -> dict[str, dict[str, float]]:
    """Of units of 100,000,000 elements, by op and mean."""
    found = {}
    for op in (name for name in ON_CHANNELS if not name.endswith("_backward")):
        for mean in (0.0, 1e6):
            case = contenders.Case(op, (1, 1, *LARGE), "float32")
            case.weight[:], case.bias[:] = 1, 0
            case.x += np.float32(mean)
            found[f"{op}, mean {mean:g} × std"] = _errors(case)
    return found


def _errors(case: contenders.Case) -> dict[str, float]:
    found = contenders.contenders(case, providers=PROVIDERS)
    calls = [contender for contender in found.values() if contender.output == "new"]
    with np.errstate(all="ignore"):
        results = [call.results() for call in calls]
    if case.op == "layer_norm":  # one reference for all
        ys = [y for (y,) in results]
        errors = accuracy.layer_norm_errors(ys, case.x, case.weight, case.bias, case.eps)
    else:
        errors = [case.largest_error(arrays) for arrays in results]
    return {call.provider: error for call, error in zip(calls, errors, strict=True)}


def number(error: float | None) -> str:
    """An error as fastnorm.accuracy counts it, where a NaN is infinitely wrong."""
    if error is None:
        return ""
    if error == 0:
        return "0"
    return "NaN" if math.isinf(error) else f"{error:.1e}"


def show(title: str, first: str, rows: dict[Any, dict[str, float]]) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for provider in PROVIDERS:
        table.add_column(provider, justify="right")
    for name, errors in rows.items():
        text = name if isinstance(name, str) else f"{name:g}"
        table.add_row(text, *[number(errors.get(provider)) for provider in PROVIDERS])
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer lengths")
    parser.add_argument("--large", action="store_true", help="units of 100,000,000 elements too")
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    console = Console(stderr=True)
    cols = QUICK_COLS if options.quick else COLS
    backward_cols = QUICK_COLS if options.quick else BACKWARD_COLS
    forward = errors_by_mean("layer_norm", track(cols, "forward", console=console))
    backward = errors_by_mean(
        "layer_norm_backward", track(backward_cols, "backward", console=console)
    )
    planes = QUICK_COLS if options.quick else PLANES
    channels = {op: errors_by_mean(op, track(planes, op, console=console)) for op in ON_CHANNELS}
    large = large_errors() if options.large else {}
    hard = hard_row_errors()
    types = errors_by_type(track(TYPES_COLS, "types", console=console))
    count = f"{len(DISTRIBUTIONS)} distributions, n up to"
    show(f"layer_norm, {count} {max(cols):,}", "mean / std", forward)
    show(f"layer_norm_backward, {count} {max(backward_cols):,}", "mean / std", backward)
    for op, errors in channels.items():
        show(f"{op}, {count} {3 * max(planes):,}", "mean / std", errors)
    if large:
        show(f"Units of {LARGE[0] * LARGE[1]:,} elements", "op", large)
    show("layer_norm, hard rows", "row", hard)
    show(f"Errors over what is allowed, n up to {max(TYPES_COLS)}", "op, type", types)
    print(bench.machine_line())
    if options.json:
        text: dict[str, Any] = {"forward": forward, "backward": backward, "hard": hard}
        text |= {"types": types, "channels": channels, "large": large}
        options.json.write_text(json.dumps({"machine": bench.machine(), **text}, indent=1) + "\n")


if __name__ == "__main__":
    main()
