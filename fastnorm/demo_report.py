"""What ``python -m fastnorm demo`` shows: tables, what became of the articles' claims, a plot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table

from fastnorm import accuracy, timing
from fastnorm.demo_network import OPS, WIDTHS
from fastnorm.demo_training import NORMS, RATES, Digits, Setting

COLORS = {"none": "#4a6fa5", "layer": "#c1440e", "batch": "#2f8f5b"}
MARKERS = {"none": "s", "layer": "o", "batch": "^"}
NUMPY = "#9aa5b1"
NOTE: dict[str, Any] = {"style": "dim", "highlight": False, "soft_wrap": True}
STYLE: dict[str, Any] = {"title_justify": "left", "box": box.SIMPLE_HEAD, "pad_edge": False}


@dataclass(frozen=True)
class Speed:
    """Medians of one op at one batch size, in seconds a call."""

    batch_size: int
    op: str
    fastnorm: float
    numpy: float
    ratio: float


def show(console: Console, settings: list[Setting], speeds: list[Speed], data: Digits) -> None:
    show_learning(console, settings, data)
    console.print()
    show_claims(console, settings)
    console.print()
    show_calls(console, settings, speeds)


# ---- what was learned ---------------------------------------------------------------------------


def show_learning(console: Console, settings: list[Setting], data: Digits) -> None:
    runs = settings[0].runs
    table = Table(
        title=f"Digits right, in percent, after {len(runs[0].loss)} epochs on "
        f"{len(data.learn.labels):,},\nof {len(data.test.labels)} others: mean of {len(runs)} "
        "seeds (worst-best)",
        **STYLE,
    )
    for heading in ("batch", "norm"):
        table.add_column(heading, no_wrap=True)
    for heading in ("rate", "loss", "training mode", "inference mode"):
        table.add_column(heading, justify="right", no_wrap=True)
    for before, setting in zip([None, *settings], settings, strict=False):
        is_first = before is None or before.batch_size != setting.batch_size
        if is_first and before:
            table.add_section()
        table.add_row(
            str(setting.batch_size) if is_first else "",
            NORMS[setting.norm],
            f"{setting.first_rate:.3f}",
            f"{setting.mean('loss'):.4f}",
            _with_range(setting, "in_training"),
            _with_range(setting, "in_inference"),
        )
    console.print(table)
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    console.print(
        "Training mode: the test digits in batches of the size trained with, which batch norm "
        "normalises by their own statistics. Inference mode: by its running statistics. Rate: the "
        "first learning rate, which falls to 0 in the course of the training; of "
        f"{rates} times the root of batch size / 64, that of the least loss on "
        f"{len(data.choose.labels)} digits that are in neither set, for the first seed. Loss: of "
        f"the last epoch. One test digit is {1 / len(data.test.labels):.1%}. All see the same "
        f"images: at batch size {settings[-1].batch_size} in {settings[-1].batch_size} times fewer "
        "steps than at 1.",
        **NOTE,
    )


def _with_range(setting: Setting, what: str) -> str:
    low, high = (100 * value for value in setting.range(what))
    return f"{100 * setting.mean(what):.1f} ({low:.1f}-{high:.1f})"


# ---- claims -------------------------------------------------------------------------------------

# Ten digits: what guessing gets right, and what is not much more.
CHANCE, HARDLY_MORE = 0.1, 0.2
# How many standard errors of the seeds' mean a difference must be to count.
ERRORS = 3


class Claim(NamedTuple):
    """What articles say, and what was measured."""

    claim: str
    verdict: str
    measured: str


def show_claims(console: Console, settings: list[Setting]) -> None:
    table = Table(title="What articles claim", show_header=False, **STYLE)
    for claim in claims(settings):
        table.add_row(claim.verdict, f"{claim.claim}: {claim.measured}")
    console.print(table)
    console.print(
        "In percentage points, means of the seeds. A gain is what a norm changes in the digits "
        f"right at the same seed. Differences of up to {ERRORS} standard errors count as none"
        f"{'' if len(settings[0].runs) > 3 else '; so few seeds tell little'}.",
        **NOTE,
    )


def claims(settings: list[Setting]) -> Iterator[Claim]:
    sizes = sorted({setting.batch_size for setting in settings})
    *smaller, large = sizes
    layer = gains(settings, "layer", "in_inference")
    yield Claim(
        "Layer norm does not care about the batch size",
        _verdict(not _differ(layer[a], layer[b]) for a in sizes for b in sizes if a < b),
        f"its gain over no norm is {_listed(layer)}",
    )
    gaps = [abs(s.mean("in_training") - s.mean("in_inference")) for s in _of("layer", settings)]
    yield Claim(
        "Layer norm is the same in training and in inference",
        _verdict([max(gaps) < 1e-3]),
        f"at most {100 * max(gaps):.1f} apart",
    )
    for what, mode in (("in_training", "training"), ("in_inference", "inference")):
        batch = gains(settings, "batch", what)
        yield Claim(
            f"Batch norm degrades with small batches, in {mode} mode",
            _verdict(_differ(batch[large], batch[size], above=True) for size in smaller),
            f"its gain is {_listed(batch)}",
        )
    failed = next(s for s in _of("batch", settings) if s.batch_size == sizes[0])
    shares = failed.mean("in_training"), failed.mean("in_inference")
    yield Claim(
        f"Batch norm fails at batch size {sizes[0]}",
        _verdict(share <= HARDLY_MORE for share in shares),
        f"{shares[0]:.1%} right in training mode, {shares[1]:.1%} in inference mode; guessing "
        f"gets {CHANCE:.0%}",
    )


def gains(settings: list[Setting], norm: str, what: str) -> dict[int, Any]:
    """By batch size, of each seed: what the norm adds to the share right without norm."""
    pairs = zip(_of(norm, settings), _of("none", settings), strict=True)
    return {having.batch_size: having.of(what) - lacking.of(what) for having, lacking in pairs}


def _of(norm: str, settings: list[Setting]) -> list[Setting]:
    return [setting for setting in settings if setting.norm == norm]


def _verdict(holds: Iterable[bool]) -> str:
    """Of what a claim says of every pair of batch sizes, or of both modes."""
    found = list(holds)
    return "shown" if all(found) else "in part" if any(found) else "refuted"


def _differ(a: Any, b: Any, above: bool = False) -> bool:
    """Whether the means of a and b do, or that of a is above; seeds go in pairs."""
    difference = a - b
    mean, error = difference.mean(), difference.std(ddof=1) / np.sqrt(len(difference))
    return bool((mean if above else abs(mean)) > ERRORS * error)


def _listed(gains: dict[int, Any]) -> str:
    return ", ".join(f"{100 * gain.mean():+.1f} at {size}" for size, gain in gains.items())


# ---- calls --------------------------------------------------------------------------------------

PASSES = {
    "layer_norm": "layer norm",
    "layer_norm_backward": "  backward",
    "batch_norm_training": "batch norm",
    "batch_norm_training_backward": "  backward",
    "batch_norm": "  in inference",
}


def show_calls(console: Console, settings: list[Setting], speeds: list[Speed]) -> None:
    """The calls' largest errors and their speed, for each batch size."""
    table = Table(title="Calls: the largest error of all that were checked, and speed", **STYLE)
    for heading in ("batch", "call"):
        table.add_column(heading, no_wrap=True)
    for heading in ("checked", "error", "fastnorm", "NumPy", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for speed in speeds:
        errors = [
            (setting.checks.counts[speed.op], setting.checks.errors[speed.op])
            for setting in settings
            if setting.batch_size == speed.batch_size and speed.op in setting.checks.counts
        ]
        count, error = errors[0]
        table.add_row(
            f"({speed.batch_size}, {WIDTHS[1]})" if speed.op == OPS[0] else "",
            PASSES[speed.op],
            f"{count:,}",
            f"{error:.1e}",
            timing.duration(speed.fastnorm),
            timing.duration(speed.numpy),
            f"{speed.ratio:.1f}×",
            end_section=speed.op == OPS[-1],
        )
    console.print(table)
    console.print(
        "Checked: every call of one seed's training and tests, against the float64 reference; "
        f"{accuracy.bound(np.float32):.1e} is allowed. Times are of one call with a new output, on "
        "one thread, next to the usual expression in NumPy.",
        **NOTE,
    )


# ---- the plot -----------------------------------------------------------------------------------


def draw(settings: list[Setting], speeds: list[Speed], path: str) -> None:
    """Test errors and training loss for each batch size, the ends together, and the speed."""
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    grid = figure.add_gridspec(2, 4, width_ratios=(1, 1, 1, 1.25))
    sizes = sorted({setting.batch_size for setting in settings})
    top = bottom = None
    for column, size in enumerate(sizes):
        top = figure.add_subplot(grid[0, column], sharey=top)
        bottom = figure.add_subplot(grid[1, column], sharey=bottom, sharex=top)
        draw_learning(top, bottom, [s for s in settings if s.batch_size == size])
        for axes in (top, bottom):
            axes.tick_params(labelleft=column == 0)
        if column == 0:
            top.set_ylabel("test digits wrong, %")
            bottom.set_ylabel("training loss")
    draw_ends(figure.add_subplot(grid[0, 3]), settings, sizes)
    draw_speed(figure.add_subplot(grid[1, 3]), speeds)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    network = " → ".join(map(str, WIDTHS))
    seeds = len(settings[0].runs)
    figure.suptitle(
        f"Handwritten digits, {network}, plain SGD: mean and range of {seeds} seeds", fontsize=12
    )
    figure.savefig(path, dpi=150)


def draw_learning(top: Any, bottom: Any, settings: list[Setting]) -> None:
    """Test errors above, training loss below, epoch by epoch at one batch size."""
    for setting in settings:
        name = NORMS[setting.norm]
        modes = [("in_inference", f"{name}, inference mode" if setting.norm == "batch" else name)]
        if setting.norm == "batch":
            modes.append(("in_training", f"{name}, training mode"))
        for what, label in modes:
            _draw_line(top, setting, what, label)
        _draw_line(bottom, setting, "loss", name)
    top.set_title(f"batch size {settings[0].batch_size}", fontsize=11)
    top.tick_params(labelbottom=False)
    bottom.set_xlabel("epoch")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (top, bottom):
        axes.set_yscale("log")
        axes.grid(color="0.92")
    _percents(top)


def _draw_line(axes: Any, setting: Setting, what: str, label: str) -> None:
    epochs = range(1, len(setting.runs[0].loss) + 1)
    values = np.array([getattr(run, what) for run in setting.runs])
    if what != "loss":
        values = _wrong(values)
    color = COLORS[setting.norm]
    style: dict[str, Any] = {"color": color, "marker": MARKERS[setting.norm], "markersize": 3.5}
    if what == "in_training":
        style |= {"linestyle": "--", "markerfacecolor": "white"}
    axes.plot(epochs, values.mean(0), label=label, **style)
    axes.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.12, linewidth=0)


def draw_ends(axes: Any, settings: list[Setting], sizes: list[int]) -> None:
    """What is wrong after the last epoch, by batch size, in both modes."""
    for k, norm in enumerate(NORMS):
        of_norm = _of(norm, settings)
        places = np.arange(len(sizes)) + 0.08 * (k - 1)
        for what in ("in_inference", "in_training"):
            if what == "in_training" and norm != "batch":
                continue  # the same
            values = _wrong(np.array([setting.of(what) for setting in of_norm]))
            means = values.mean(1)
            style: dict[str, Any] = {"color": COLORS[norm], "marker": MARKERS[norm]}
            if what == "in_training":
                style |= {"linestyle": "--", "markerfacecolor": "white"}
            spread = [means - values.min(1), values.max(1) - means]
            axes.errorbar(places, means, spread, capsize=3, markersize=5, **style)
    axes.set_yscale("log")
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_xlim(-0.3, len(sizes) - 0.7)
    axes.set_xlabel("batch size")
    axes.set_title(f"wrong after {len(settings[0].runs[0].loss)} epochs, %", fontsize=11)
    axes.grid(color="0.92")
    _percents(axes)


def _wrong(shares_right: Any) -> Any:
    """In percent; what a logarithmic axis cannot show is shown as 0.1."""
    return np.maximum(100 * (1 - shares_right), 0.1)


def _percents(axes: Any) -> None:
    axes.set_yticks((2, 5, 10, 20, 50, 100), minor=False)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


SPEED_SHOWN = {
    "layer_norm": "layer norm",
    "batch_norm_training": "batch norm",
    "batch_norm": "inference",
}


def draw_speed(axes: Any, speeds: list[Speed]) -> None:
    """A line for each forward call, from fastnorm's time to NumPy's."""
    shown = [s for op in SPEED_SHOWN for s in speeds if s.op == op]
    labels = [f"{SPEED_SHOWN[s.op]}, {s.batch_size}" for s in shown]
    places = range(len(shown))
    ours, numpy = [1e6 * s.fastnorm for s in shown], [1e6 * s.numpy for s in shown]
    axes.hlines(places, ours, numpy, color="0.8", linewidth=2, zorder=1)
    for values, color, name, marker in (
        (ours, "0.2", "fastnorm", "o"),
        (numpy, NUMPY, "NumPy", "s"),
    ):
        axes.scatter(values, places, s=28, color=color, marker=marker, label=name, zorder=2)
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                timing.duration(value / 1e6),
                (value, place),
                (0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_ylim(len(shown) - 0.5, -1.6)
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("µs a call, one thread")
    axes.set_title(f"calls on (batch size, {WIDTHS[1]})", fontsize=11)
    axes.legend(fontsize=8, loc="upper center", ncols=2, frameon=False)
    axes.grid(axis="x", color="0.92")
