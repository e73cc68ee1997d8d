"""``python -m fastnorm demo``: layer norm, batch norm and neither, in training on real data.

A network 64 -> 128 -> 128 -> 10 learns scikit-learn's handwritten digits by plain stochastic
gradient descent, at batch sizes 1, 4 and 64, with layer norm, batch norm or no norm before each
ReLU. All start from the same weights and see the same batches, the same number of images each.
What each has learned is tested in both modes: in inference mode, where batch norm uses its running
statistics, and in training mode, in batches of the size that was trained with. Every batch that is
normalised, in training and in tests, is checked against the float64 reference.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fastnorm import accuracy, cases, contenders, demo_report, timing
from fastnorm.demo_network import OPS, WIDTHS
from fastnorm.demo_report import Speed
from fastnorm.demo_training import BATCH_SIZES, NORMS, RATES, Setting, digits, measure_setting

EPOCHS, QUICK_EPOCHS = 10, 3
SEEDS, QUICK_SEEDS = (1, 2, 3, 4, 5), (1, 2)


# ---- the command --------------------------------------------------------------------------------


def run(plot_path: str, quick: bool = False) -> int:
    """Trains, checks, prints and draws; 0 where every check passed, else 1."""
    epochs, seeds = (QUICK_EPOCHS, QUICK_SEEDS) if quick else (EPOCHS, SEEDS)
    data = digits()
    which = [(norm, size) for size in BATCH_SIZES for norm in NORMS]
    trainings = len(which) * (len(RATES) + len(seeds) - 1)
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=trainings + len(BATCH_SIZES) * len(OPS))

        def tick() -> None:
            progress.update(task, advance=1)

        settings = []
        for norm, size in which:
            progress.update(task, description=f"batch size {size}, {NORMS[norm]}")
            setting = measure_setting(norm, size, data, epochs, seeds, tick)
            settings.append(setting)
            if not console.is_terminal:
                right = setting.mean("in_inference")
                print(f"{setting.name}: {right:.1%} right", file=sys.stderr, flush=True)
        progress.update(task, description="speed")
        speeds = measure_speed(0.1 if quick else 0.3, tick)
    demo_report.show(Console(), settings, speeds, data)
    demo_report.draw(settings, speeds, plot_path)
    print(f"\nplot: {plot_path}")
    return report(settings)


def report(settings: list[Setting]) -> int:
    """Says whether every checked batch was right: 0 where they were, else 1."""
    checked = [setting.checks for setting in settings]
    counts = {"forward": 0, "backward": 0}
    for checks in checked:
        for op, count in checks.counts.items():
            counts["backward" if op.endswith("_backward") else "forward"] += count
    bound = accuracy.bound(np.float32)
    if all(checks.passed for checks in checked):
        print(
            f"All {counts['forward']:,} normalised batches and {counts['backward']:,} gradients "
            f"that were checked are within {bound:.0e} of the float64 reference."
        )
        return 0
    for setting in settings:
        if not setting.checks.passed:
            errors = ", ".join(f"{op} {e:.1e}" for op, e in setting.checks.errors.items())
            print(f"FAILED: {setting.name}: errors {errors}; allowed {bound:.0e}")
    return 1


# ---- speed --------------------------------------------------------------------------------------


def measure_speed(seconds: float, tick: Callable[[], None]) -> list[Speed]:
    """fastnorm next to the NumPy expression, at the shapes that were trained with."""
    speeds = []
    for batch_size in BATCH_SIZES:
        for op in OPS:
            case = cases.Case(op, (batch_size, WIDTHS[1]), "float32")
            found = contenders.contenders(case, providers=("fastnorm", "numpy"))
            times = timing.interleave(found, seconds)
            ours, numpy = times["fastnorm new"], times["numpy new"]
            medians = statistics.median(ours), statistics.median(numpy)
            speeds.append(Speed(batch_size, op, *medians, timing.median_ratio(numpy, ours)))
            tick()
    return speeds
