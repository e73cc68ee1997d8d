"""Plans of batch, group and instance norm: see plan.py.

Group and instance norm with channels first are norms of rows, in which a parameter's element stands
for a run of columns. All else is done in steps: moments of planes or of columns, in a fixed order;
what follows from them for each channel; and a pass that applies it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from . import plan
from .plan import Plan, Spec, Step, up

#: Threads of a block that sums planes, at least; of a plane, at most.
PLANE_BLOCK, PLANE_THREADS = 128, 256
#: Of a block that goes over columns; its chunks side by side where sums are of columns.
BLOCK, COLUMN_CHUNKS = 256, 32
#: Rows of columns that a thread holds to sum them twice; that it has in flight to apply what is
#: known to one array, or to two; that it sums for a gradient.
HELD, APPLIED, APPLIED_BACKWARD, SUMMED = 8, 4, 2, 32


class Layout(NamedTuple):
    """x as `outer` groups of `rows` rows of `width` channels of `run` elements each."""

    outer: int
    rows: int
    width: int
    run: int

    @property
    def cols(self) -> int:
        return self.width * self.run

    @property
    def size(self) -> int:
        return self.outer * self.rows * self.cols


class Parts(NamedTuple):
    """What was summed by itself: `each` elements of a channel in a part, `last` in the last."""

    number: int
    each: int
    last: int


class Builder:
    """A plan, step by step; numbers belong to one step each."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.workspace: list[tuple[str, int, str]] = []
        self.numbers: dict[str, int] = {}

    def add(self, step: Step, names: Mapping[str, str] | None = None, **numbers: int) -> None:
        """`names` are what some of the kernel's arguments are called in the call."""
        found, at = dict(names or {}), len(self.steps)
        for name, value in numbers.items():
            found[name] = f"{at}.{name}"
            self.numbers[found[name]] = value
        arguments = tuple([found.get(name, name) for name in step.arguments])
        self.steps.append(step._replace(arguments=arguments))

    def launch(
        self, spec: Spec, grid: int, names: Mapping[str, str] | None = None, **numbers: int
    ) -> None:
        self.add(plan.make_step(spec, grid), names, **numbers)

    def room(self, name: str, count: int, kind: str) -> None:
        self.workspace.append((name, count, kind))

    def done(self, kernel: str, alignment: int, reason: str) -> Plan:
        return Plan(
            tuple(self.steps), tuple(self.workspace), kernel, alignment, reason,
            tuple(self.numbers.items()),
        )  # fmt: skip


def _kinds(types: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: types[name] for name in names if name in types}


# ---- rows: group and instance norm, channels first -----------------------------------------------


def group_backward(
    samples: int, groups: int, channels: int, run: int, types: Mapping[str, str], *,
    alignment: int, own: bool, pairs: bool = False,
) -> Plan:  # fmt: skip
    """Gradients of a norm of `groups` groups of `channels` channels of `run` elements a sample.

    `own`: groups differ in their weights. `pairs`: each sample has parameters of its own.
    """
    rows, cols, width = samples * groups, channels * run, groups * channels
    sums = [name for name in ("dweight", "dbias") if name in types]
    if not rows or not cols:
        count = width * (samples if pairs else 1)
        return plan.fills({name: (count, types[name], "zero") for name in sums})
    b = Builder()
    shift = {"shift": plan.compute_type(types["x"])} if "dweight" in sums else {}
    row_types = {name: kind for name, kind in types.items() if name not in sums} | shift
    found = plan.backward(
        rows, cols, row_types, alignment=alignment, rms=False, per_row={"weight": own}, run=run
    )
    for name, kind in shift.items():
        b.room(name, rows, kind)
    for step in found.steps:
        b.add(step)
    kernel, reason = found.kernel, found.reason
    if sums:
        layout = Layout(1, samples, width, run)
        _plane_sums(
            b, layout, dict(types) | shift, sums, alignment, pairs or samples == 1, channels
        )
        kernel, reason = f"{kernel}, planes", f"{reason}; planes are summed by another pass"
    return b.done(kernel, alignment, reason)


def _plane_sums(
    b: Builder, layout: Layout, types: Mapping[str, str], sums: Sequence[str], alignment: int,
    direct: bool, channels: int,
) -> None:  # fmt: skip
    """dweight and dbias of each plane, and these summed over samples."""
    compute, run = plan.compute_type(types["x"]), layout.run
    names = ["dy", *["x", "mean", "rstd", "shift"] * ("dweight" in sums), *sums]
    kinds = _kinds(types, *names)
    planes = layout.rows * layout.width
    partials = {} if direct else {name: f"{name}_partials" for name in sums}
    spec, grid = _plane_spec(kinds, compute, planes, run, alignment)
    b.launch(spec, grid, partials, rows=planes, cols=run, x_stride=run, dy_stride=run,
             channels=channels)  # fmt: skip
    for name in partials.values():
        b.room(name, planes, compute)
    if partials:
        b.add(plan.reduction(partials, layout.width, compute), cols=layout.width)


def _plane_spec(
    kinds: dict[str, str], compute: str, planes: int, run: int, alignment: int, *flags: str
) -> tuple[Spec, int]:
    elements = plan.chunk(run, kinds, alignment)
    threads = min(plan.power_of_two(max(1, up(run, 2 * elements))), PLANE_THREADS)
    at_once = max(1, PLANE_BLOCK // threads)
    spec = Spec(
        "plane_sums", tuple(kinds.items()), compute, threads, at_once, 1, elements,
        plan.access(elements, kinds, alignment), flags,
    )  # fmt: skip
    return spec, up(planes, at_once)


# ---- statistics that are not of rows -------------------------------------------------------------


def batch(
    layout: Layout, types: Mapping[str, str], *, alignment: int, training: bool, groups: int = 0,
    activation: str | None = None, aliased: bool = False, pairs: bool = False,
) -> Plan:  # fmt: skip
    """Batch norm; or, where each of `outer` samples has `groups` groups of channels that come last,
    group norm. `pairs`: each sample has parameters of its own.

    types: x, weight, bias, running_mean, running_var, mean, rstd, y.
    """
    groups = groups or layout.width
    b, compute = Builder(), plan.compute_type(types["x"])
    running = _kinds(types, "running_mean", "running_var", "mean", "rstd")
    if not layout.size and training:
        values = {"mean": "zero", "rstd": "nan"}
        return plan.fills(
            {name: (layout.outer * groups, types[name], value)
             for name, value in values.items() if name in types}
        )  # fmt: skip
    if not layout.size:
        if layout.width and "mean" in types:
            _prepare(b, layout, running, "writes")
        return b.done("fill", 0, "there are no elements to normalize")
    known = dict(types) | {"coefficients": compute}
    b.room("coefficients", 4 * layout.outer * layout.width, compute)
    if training:
        kernel = _moments(b, layout, types, groups, alignment, known, "pairs" if pairs else "")
    else:
        kinds = _kinds(known, "coefficients", "weight", "bias") | running
        _prepare(b, layout, kinds, "writes")
        kernel = "one pass"
    flags = ("aliased",) if aliased else ()
    _apply(b, "apply", layout, _kinds(known, "x", "coefficients", "y"), compute, alignment, APPLIED,
           flags, activation or "")  # fmt: skip
    reason = "x is read for its statistics and again to apply them" if training else (
        "the running statistics are applied")  # fmt: skip
    return b.done(kernel, alignment, reason)


def averages(layout: Layout, types: Mapping[str, str], *, alignment: int) -> Builder:
    """Running statistics of instances: means over the samples, of x alone."""
    b = Builder()
    kinds = _kinds(types, "x", "running_mean", "running_var")
    if layout.size and len(kinds) > 1:
        _moments(b, layout, kinds, layout.width, alignment, kinds, "average")
    return b


def _moments(
    b: Builder, layout: Layout, types: Mapping[str, str], groups: int, alignment: int,
    known: Mapping[str, str], flag: str = "",
) -> str:  # fmt: skip
    """Moments of parts, and what is merged of them."""
    if layout.run > 1:
        kernel, parts = "planes", Parts(layout.outer * layout.rows, layout.run, layout.run)
        planes = parts.number * layout.width
        kinds = {"x": types["x"], "moments": "float64"}
        (step,) = plan.forward(planes, layout.run, kinds, alignment=alignment, rms=False).steps
        b.room("moments", 3 * planes, "float64")
        b.add(step, rows=planes, cols=layout.run, x_stride=layout.run)
    else:
        kernel = "columns"
        parts = _column_moments(b, layout, types["x"], alignment)
    kinds = {"moments": "float64"} | _kinds(
        known, "weight", "bias", "running_mean", "running_var", "mean", "rstd", "coefficients"
    )
    spec = _merging("merge", kinds, flag)
    grid = up(layout.outer * groups, plan.REDUCE_COLUMNS)
    b.launch(spec, grid, outer=layout.outer, groups=groups, channels=layout.width // groups,
             parts=parts.number, count=parts.each, last=parts.last)  # fmt: skip
    return kernel


def _merging(kernel: str, kinds: dict[str, str], *flags: str) -> Spec:
    flags = tuple([flag for flag in flags if flag])
    return Spec(kernel, tuple(kinds.items()), "float64", plan.REDUCE_COLUMNS, plan.REDUCE_LANES,
                1, 1, 16, flags)  # fmt: skip


def _columns(chunks: int, most: int) -> tuple[int, int]:
    """Threads side by side over chunks, and rows at a time."""
    threads = min(plan.power_of_two(chunks), most)
    return threads, BLOCK // threads


def _column_moments(b: Builder, layout: Layout, kind: str, alignment: int) -> Parts:
    kinds = {"x": kind, "moments": "float64"}
    elements = plan.chunk(layout.cols, kinds, alignment)
    chunks = layout.cols // elements
    threads, at_once = _columns(chunks, COLUMN_CHUNKS)
    part_rows = at_once * HELD
    number = up(layout.rows, part_rows)
    spec = Spec(
        "column_moments", tuple(kinds.items()), plan.compute_type(kind), threads, at_once, HELD,
        elements, plan.access(elements, {"x": kind}, alignment),
    )  # fmt: skip
    b.room("moments", 3 * layout.outer * number * layout.width, "float64")
    b.launch(spec, layout.outer * number * up(chunks, threads), rows=layout.rows, cols=layout.cols,
             x_stride=layout.cols, parts=number, part_rows=part_rows)  # fmt: skip
    return Parts(number, part_rows, layout.rows - (number - 1) * part_rows)


def _prepare(b: Builder, layout: Layout, kinds: dict[str, str], *flags: str) -> None:
    spec = Spec("prepare", tuple(kinds.items()), "float64", plan.FILL_BLOCK, 1, 1, 1, 16, flags)
    b.launch(spec, up(layout.width, plan.FILL_BLOCK), channels=layout.width)


def _apply(
    b: Builder, kernel: str, layout: Layout, kinds: dict[str, str], compute: str, alignment: int,
    flight: int, flags: tuple[str, ...] = (), activation: str = "",
    names: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    elements = plan.chunk(layout.cols, kinds, alignment)
    runs = [name for name, so in plan.runs_of(kinds, layout.run, elements).items() if so]
    chunks = layout.cols // elements
    threads, at_once = _columns(chunks, BLOCK)
    spec = Spec(
        kernel, tuple(kinds.items()), compute, threads, at_once, flight, elements,
        plan.access(elements, kinds, alignment), (*flags, *runs), activation,
    )  # fmt: skip
    grid = layout.outer * up(layout.rows, at_once * flight) * up(chunks, threads)
    strides = {f"{name}_stride": layout.cols for name in kinds if name in plan.ROW_OPERANDS}
    b.launch(spec, grid, names, rows=layout.rows, cols=layout.cols, outer=layout.outer,
             width=layout.width, channels=layout.width, **plan.run_numbers(layout.run),
             **strides)  # fmt: skip


# ---- backward ------------------------------------------------------------------------------------


def batch_backward(
    layout: Layout, types: Mapping[str, str], *, alignment: int, training: bool, groups: int = 0,
    known: bool = True, pairs: bool = False,
) -> Plan:  # fmt: skip
    """Gradients of `batch`.

    types: dy, x, weight, running_mean, running_var, mean, rstd, dx, dweight, dbias. `known`: mean
    and rstd are given; else they are formed again of x, or of the running statistics.
    """
    sums = [name for name in ("dweight", "dbias") if name in types]
    if not layout.size:
        count = layout.width * (layout.outer if pairs else 1)
        return plan.fills({name: (count, types[name], "zero") for name in sums})
    b, compute, own = Builder(), plan.compute_type(types["x"]), bool(groups)
    types = dict(types)
    if not known:
        for name in ("mean", "rstd"):
            b.room(name, layout.width, "float64")
            types[name] = "float64"
        made = _kinds(types, "x", "mean", "rstd")
        if training:
            _moments(b, layout, made, layout.width, alignment, made)
        else:
            _prepare(b, layout, _kinds(types, "running_mean", "running_var", "mean", "rstd"),
                     "writes")  # fmt: skip
    kernel = "one pass"
    count = 5 if training else 4
    if "dx" in types:
        b.room("coefficients", count * layout.outer * layout.width, compute)
        types["coefficients"] = compute
    if sums or (training and "dx" in types):
        kernel = _sums(b, layout, types, groups or layout.width, alignment, own, training, pairs)
    if "dx" in types and training:
        _apply(b, "apply_backward", layout, _kinds(types, "dy", "x", "coefficients", "dx"), compute,
               alignment, APPLIED_BACKWARD)  # fmt: skip
    elif "dx" in types:
        _prepare(b, layout, _kinds(types, "coefficients", "weight", "rstd"), "gradient")
        kinds = {"x": types["dy"], "coefficients": compute, "y": types["dx"]}
        _apply(b, "apply", layout, kinds, compute, alignment, APPLIED,
               names={"x": "dy", "y": "dx"})  # fmt: skip
    return b.done(kernel, alignment, "x and dy are read for their sums and again for dx" if training
                  else "dx is dy at another scale")  # fmt: skip


def _sums(
    b: Builder, layout: Layout, types: Mapping[str, str], groups: int, alignment: int, own: bool,
    applied: bool, pairs: bool,
) -> str:  # fmt: skip
    """Sums of parts; dweight, dbias and the coefficients that follow from them."""
    compute = plan.compute_type(types["x"])
    kinds = 3 if own else 2
    flags = () if own else ("batch",)
    if layout.run > 1:
        kernel, number = "planes", layout.rows
        planes = number * layout.width
        b.room("sums", kinds * planes, compute)
        arrays = _kinds(types, "dy", "x", "mean", "rstd") | {"sums": compute}
        spec, grid = _plane_spec(arrays, compute, planes, layout.run, alignment, *flags)
        b.launch(spec, grid, rows=planes, cols=layout.run, x_stride=layout.run,
                 dy_stride=layout.run, channels=layout.width)  # fmt: skip
    else:
        kernel = "columns"
        arrays = _kinds(types, "dy", "x", "mean", "rstd") | {"sums": compute}
        elements = plan.chunk(layout.cols, arrays, alignment)
        chunks = layout.cols // elements
        threads, at_once = _columns(chunks, COLUMN_CHUNKS)
        part_rows = at_once * SUMMED
        number = up(layout.rows, part_rows)
        spec = Spec(
            "column_sums", tuple(arrays.items()), compute, threads, at_once, 1, elements,
            plan.access(elements, arrays, alignment), flags,
        )  # fmt: skip
        b.room("sums", kinds * layout.outer * number * layout.width, compute)
        b.launch(spec, layout.outer * number * up(chunks, threads), rows=layout.rows,
                 cols=layout.cols, x_stride=layout.cols, dy_stride=layout.cols, parts=number,
                 part_rows=part_rows, channels=layout.width // groups)  # fmt: skip
    named = ["weight", "dweight", "dbias", *["coefficients"] * applied]
    arrays = {"sums": compute} | _kinds(types, "mean", "rstd", *named)
    # Of several samples, parameters' gradients are summed by another step.
    several = layout.outer > 1 and not pairs
    partials = {
        name: f"{name}_partials" for name in ("dweight", "dbias") if name in types and several
    }
    b.launch(_merging("merge_sums", arrays, *flags, "pairs" if pairs else ""),
             up(layout.outer * groups, plan.REDUCE_COLUMNS), partials, outer=layout.outer,
             groups=groups, channels=layout.width // groups, parts=number,
             count=layout.rows * layout.run)  # fmt: skip
    for name in partials.values():
        b.room(name, layout.outer * layout.width, compute)
    if partials:
        b.add(plan.reduction(partials, layout.width, compute), cols=layout.width)
    return kernel
