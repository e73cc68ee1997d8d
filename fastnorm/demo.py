"""``python -m fastnorm demo``: layer norm inside the training of a small network on real data.

A network 64 -> 128 -> 128 -> 10 learns scikit-learn's handwritten digits by plain stochastic
gradient descent, at batch sizes 1, 4 and 64, with and without layer norm before each ReLU. With and
without start from the same weights and see the same batches at the same learning rate. Every batch
that is normalised, in training and in evaluation, is checked against the float64 reference.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits

import fastnorm
from fastnorm import accuracy, contenders, timing

Array = NDArray[Any]

BATCH_SIZES = (1, 4, 64)
WIDTHS = (64, 128, 128, 10)
EPOCHS, QUICK_EPOCHS = 10, 3
SEED = 1
GOOD = 0.95


def learning_rate(batch_size: int) -> np.float32:
    """The mean gradient of a smaller batch is noisier by the root of its size."""
    return np.float32(0.1 * np.sqrt(batch_size / 64))


# ---- data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    images: Array  # (count, 64) float32 in [0, 1]
    labels: Array  # (count,) int


def digits() -> tuple[Split, Split]:
    """Three quarters to learn from, one quarter to test on."""
    data = load_digits()
    order = np.random.default_rng(SEED).permutation(len(data.target))
    images, labels = (data.data / 16).astype(np.float32)[order], data.target[order]
    cut = 3 * len(labels) // 4
    return Split(images[:cut], labels[:cut]), Split(images[cut:], labels[cut:])


# ---- layer norm, checked ------------------------------------------------------------------------


@dataclass
class Checks:
    """The largest errors so far, in the units of `fastnorm.accuracy`."""

    forward: float = 0.0
    backward: float = 0.0
    forward_count: int = 0
    backward_count: int = 0

    @property
    def passed(self) -> bool:
        return max(self.forward, self.backward) <= accuracy.bound(np.float32)

    def add_forward(self, error: float) -> None:
        self.forward, self.forward_count = max(self.forward, error), self.forward_count + 1

    def add_backward(self, error: float) -> None:
        self.backward, self.backward_count = max(self.backward, error), self.backward_count + 1


class CheckedLayerNorm:
    """fastnorm.LayerNorm, each of whose calls is compared with the float64 reference."""

    def __init__(self, width: int, checks: Checks) -> None:
        self.layer = fastnorm.LayerNorm(width)
        self.checks = checks

    def forward(self, x: Array) -> tuple[Array, Any]:
        y, saved = self.layer.forward(x)
        layer = self.layer
        error = accuracy.layer_norm_error(y, x, layer.weight, layer.bias, layer.eps)
        self.checks.add_forward(error)
        return y, (x, saved)

    def backward(self, dy: Array, saved: Any) -> tuple[Array, dict[str, Array]]:
        x, saved = saved
        dx, grads = self.layer.backward(dy, saved)
        errors = accuracy.layer_norm_backward_errors(
            (dx, grads["weight"], grads["bias"]), dy, x, self.layer.weight, self.layer.eps
        )
        self.checks.add_backward(max(errors))
        return dx, grads


# ---- the network --------------------------------------------------------------------------------


class Network:
    """Dense layers with ReLU between them, and layer norm before each ReLU where asked."""

    def __init__(self, norms: list[CheckedLayerNorm] | None) -> None:
        rng = np.random.default_rng(SEED)
        self.weights = [
            (rng.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs)).astype(np.float32)
            for inputs, outputs in pairwise(WIDTHS)
        ]
        self.biases = [np.zeros(outputs, np.float32) for outputs in WIDTHS[1:]]
        self.norms = norms

    def forward(self, x: Array) -> tuple[Array, list[Any]]:
        """Logits (batch, 10), and what backward needs of each layer."""
        tape = []
        for i in range(len(WIDTHS) - 2):
            z, saved = x @ self.weights[i] + self.biases[i], None
            if self.norms:
                z, saved = self.norms[i].forward(z)
            h = np.maximum(z, 0)
            tape.append((x, saved, h))
            x = h
        return x @ self.weights[-1] + self.biases[-1], [*tape, (x, None, None)]

    def step(self, images: Array, labels: Array, rate: np.float32) -> float:
        """One step down the gradient of the batch's mean cross-entropy, which is returned."""
        logits, tape = self.forward(images)
        loss, d = cross_entropy(logits, labels)
        for i in reversed(range(len(self.weights))):
            x, saved, h = tape[i]
            if h is not None:
                d = d * (h > 0)
                if self.norms:
                    d, grads = self.norms[i].backward(d, saved)
                    for name, parameter in self.norms[i].layer.parameters().items():
                        parameter -= rate * grads[name]
            dweight, dbias = x.T @ d, d.sum(0)
            d = d @ self.weights[i].T
            self.weights[i] -= rate * dweight
            self.biases[i] -= rate * dbias
        return loss

    def accuracy(self, split: Split) -> float:
        logits, _ = self.forward(split.images)
        return float(np.mean(logits.argmax(1) == split.labels))


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """The batch's mean loss, and its gradient with respect to the logits."""
    rows = np.arange(len(labels))
    d = np.exp(logits - logits.max(1, keepdims=True))
    d /= d.sum(1, keepdims=True)
    loss = -np.mean(np.log(np.maximum(d[rows, labels], np.finfo(np.float32).tiny)))
    d[rows, labels] -= 1
    return float(loss), d / np.float32(len(labels))


@dataclass
class Run:
    """One training: what happened in each epoch."""

    batch_size: int
    layer_norm: bool
    checks: Checks = field(default_factory=Checks)
    loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)

    @property
    def with_or_without(self) -> str:
        return "with" if self.layer_norm else "without"

    @property
    def name(self) -> str:
        return f"batch size {self.batch_size}, {self.with_or_without} layer norm"

    @property
    def epochs_to_good(self) -> int | None:
        reached = [i for i, value in enumerate(self.test_accuracy, 1) if value >= GOOD]
        return reached[0] if reached else None

    def train(self, train: Split, test: Split, epochs: int) -> Iterator[None]:
        """Trains; yields after each epoch."""
        norms = [CheckedLayerNorm(width, self.checks) for width in WIDTHS[1:-1]]
        network = Network(norms if self.layer_norm else None)
        rate = learning_rate(self.batch_size)
        shuffles = np.random.default_rng(SEED)
        for _ in range(epochs):
            order = shuffles.permutation(len(train.labels))
            whole = len(order) - len(order) % self.batch_size
            losses = [
                network.step(train.images[batch], train.labels[batch], rate)
                for batch in order[:whole].reshape(-1, self.batch_size)
            ]
            self.loss.append(statistics.fmean(losses))
            self.test_accuracy.append(network.accuracy(test))
            yield


# ---- the command --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Medians of one op at one batch size, in seconds a call."""

    batch_size: int
    op: str
    fastnorm: float
    numpy: float
    ratio: float


def run(plot_path: str, quick: bool = False) -> int:
    """Trains, checks, prints and draws; 0 where every check passed, else 1."""
    epochs = QUICK_EPOCHS if quick else EPOCHS
    train, test = digits()
    runs = [Run(size, layer_norm) for size in BATCH_SIZES for layer_norm in (False, True)]
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=len(runs) * epochs + 2 * len(BATCH_SIZES))

        def tick() -> None:
            progress.update(task, advance=1)

        for one in runs:
            progress.update(task, description=one.name)
            for _ in one.train(train, test, epochs):
                tick()
            if not console.is_terminal:
                print(f"{one.name}: {one.test_accuracy[-1]:.1%} right", file=sys.stderr, flush=True)
        progress.update(task, description="speed")
        speeds = measure_speed(0.2 if quick else 0.5, tick)
    show_learning(Console(), runs, train, test)
    print()
    show_calls(Console(), runs, speeds)
    draw(runs, speeds, plot_path)
    print(f"\nplot: {plot_path}")
    return report(runs)


def measure_speed(seconds: float, tick: Callable[[], None]) -> list[Speed]:
    """fastnorm next to the NumPy expression, at the shapes that were trained with."""
    speeds = []
    for batch_size in BATCH_SIZES:
        for op in ("layer_norm", "layer_norm_backward"):
            case = contenders.Case(op, (batch_size, WIDTHS[1]), "float32")
            found = contenders.contenders(case, providers=("fastnorm", "numpy"))
            times = timing.interleave(found, seconds)
            ours, numpy = times["fastnorm new"], times["numpy new"]
            speeds.append(
                Speed(
                    batch_size,
                    op,
                    statistics.median(ours),
                    statistics.median(numpy),
                    timing.median_ratio(numpy, ours),
                )
            )
            tick()
    return speeds


def report(runs: list[Run]) -> int:
    """Says whether every checked batch was right: 0 where they were, else 1."""
    checked = [one.checks for one in runs if one.layer_norm]
    forward = sum(checks.forward_count for checks in checked)
    backward = sum(checks.backward_count for checks in checked)
    bound = accuracy.bound(np.float32)
    if all(checks.passed for checks in checked):
        print(
            f"All {forward:,} normalised batches and {backward:,} gradients are within {bound:.0e} "
            "of the float64 reference."
        )
        return 0
    for one in runs:
        if not one.checks.passed:
            print(
                f"FAILED: {one.name}: error {one.checks.forward:.1e} forward, "
                f"{one.checks.backward:.1e} backward, allowed {bound:.0e}"
            )
    return 1


# ---- what is shown ------------------------------------------------------------------------------


NOTE: dict[str, Any] = {"style": "dim", "highlight": False, "soft_wrap": True}
STYLE: dict[str, Any] = {"title_justify": "left", "box": box.SIMPLE_HEAD, "pad_edge": False}
WITH, WITHOUT, NUMPY = "#c1440e", "#4a6fa5", "#9aa5b1"


def show_learning(console: Console, runs: list[Run], train: Split, test: Split) -> None:
    """What each network learned, and what layer norm did for it."""
    learned = Table(
        title=f"{len(runs[0].loss)} epochs on {len(train.labels)} handwritten digits, tested on "
        f"{len(test.labels)} others",
        **STYLE,
    )
    headings = "batch size", "layer norm", "test accuracy", f"epochs to {GOOD:.0%}", "training loss"
    for heading in headings:
        learned.add_column(heading, justify="right")
    for one in runs:
        learned.add_row(
            str(one.batch_size),
            one.with_or_without,
            f"{one.test_accuracy[-1]:.1%}",
            str(one.epochs_to_good or "not reached"),
            f"{one.loss[-1]:.4f}",
            end_section=one.layer_norm,
        )
    console.print(learned)
    gains = [
        f"{100 * (having.test_accuracy[-1] - lacking.test_accuracy[-1]):+.1f} at batch size "
        f"{having.batch_size}"
        for lacking, having in zip(runs[::2], runs[1::2], strict=True)
    ]
    step = 1 / len(test.labels)
    console.print(
        f"Layer norm changed the test accuracy, in percentage points, by {', '.join(gains)}. One "
        "seed, the same learning rate with and without; one test image is "
        f"{step:.1%}, so differences below a percent mean little.",
        **NOTE,
    )


def show_calls(console: Console, runs: list[Run], speeds: list[Speed]) -> None:
    """The calls' largest errors and their speed, for each batch size."""
    checked = Table(title="Layer norm: largest errors of all batches, and speed", **STYLE)
    for heading in ("batch", "pass", "checked", "largest error", "fastnorm", "NumPy", "ratio"):
        checked.add_column(heading, justify="right")
    for speed in speeds:
        forward = speed.op == "layer_norm"
        checks = next(o.checks for o in runs if o.layer_norm and o.batch_size == speed.batch_size)
        checked.add_row(
            f"({speed.batch_size}, {WIDTHS[1]})" if forward else "",
            "forward" if forward else "backward",
            f"{checks.forward_count if forward else checks.backward_count:,}",
            f"{checks.forward if forward else checks.backward:.1e}",
            timing.duration(speed.fastnorm),
            timing.duration(speed.numpy),
            f"{speed.ratio:.1f}×",
            end_section=not forward,
        )
    console.print(checked)
    console.print(
        f"Errors are against the float64 reference; {accuracy.bound(np.float32):.1e} is allowed. "
        "Times are of one call with a new output, on one thread, next to the usual expression in "
        "NumPy.",
        **NOTE,
    )


def draw(runs: list[Run], speeds: list[Speed], path: str) -> None:
    """Test accuracy and training loss for each batch size, and the speed of the calls."""
    figure = Figure(figsize=(11.5, 6.2), layout="constrained")
    grid = figure.add_gridspec(2, 4, width_ratios=(1, 1, 1, 1.05))
    top = bottom = None
    for column, batch_size in enumerate(BATCH_SIZES):
        top = figure.add_subplot(grid[0, column], sharey=top)
        bottom = figure.add_subplot(grid[1, column], sharey=bottom, sharex=top)
        draw_learning(top, bottom, [one for one in runs if one.batch_size == batch_size])
        for axes in (top, bottom):
            axes.tick_params(labelleft=column == 0)
        if column == 0:
            top.set_ylabel("test accuracy, %")
            top.legend(fontsize=9, loc="lower right")
            bottom.set_ylabel("training loss")
    draw_speed(figure.add_subplot(grid[:, 3]), speeds)
    network = " → ".join(map(str, WIDTHS))
    figure.suptitle(f"Handwritten digits, {network}, plain SGD, with and without layer norm")
    figure.savefig(path, dpi=150)


def draw_learning(top: Any, bottom: Any, runs: list[Run]) -> None:
    """Test accuracy above, training loss below, of the runs at one batch size."""
    for one in runs:
        style: dict[str, Any] = {
            "color": WITH if one.layer_norm else WITHOUT,
            "label": f"{one.with_or_without} layer norm",
            "marker": "o" if one.layer_norm else "s",
            "markersize": 3.5,
        }
        epochs = range(1, len(one.loss) + 1)
        top.plot(epochs, [100 * value for value in one.test_accuracy], **style)
        bottom.plot(epochs, one.loss, **style)
    top.set_title(f"batch size {runs[0].batch_size}", fontsize=11)
    top.tick_params(labelbottom=False)
    bottom.set_xlabel("epoch")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_yscale("log")
    for axes in (top, bottom):
        axes.grid(color="0.92")


def draw_speed(axes: Any, speeds: list[Speed]) -> None:
    """A line for each call, from fastnorm's time to NumPy's."""
    labels = [
        f"({s.batch_size}, {WIDTHS[1]})\n{'forward' if s.op == 'layer_norm' else 'backward'}"
        for s in speeds
    ]
    places = range(len(speeds))
    ours, numpy = [1e6 * s.fastnorm for s in speeds], [1e6 * s.numpy for s in speeds]
    axes.hlines(places, ours, numpy, color="0.8", linewidth=2, zorder=1)
    for values, color, name, marker in (
        (ours, WITH, "fastnorm", "o"),
        (numpy, NUMPY, "NumPy", "s"),
    ):
        axes.scatter(values, places, s=42, color=color, marker=marker, label=name, zorder=2)
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                timing.duration(value / 1e6),
                (value, place),
                (0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_ylim(len(speeds) - 0.4, -0.9)
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("µs a call, one thread")
    axes.set_title("layer norm calls", fontsize=11)
    axes.legend(fontsize=9, loc="upper center", ncols=2, frameon=False)
    axes.grid(axis="x", color="0.92")
