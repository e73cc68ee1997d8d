"""Batch, group and instance norm on CUDA arrays: arguments checked, kernels planned. See ops.py."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from .. import _cuda, checks
from . import channel_plan, ops, plan
from .channel_plan import Layout
from .ops import Family, Operand

DIALECTS = ("torch", "keras", "flax", "onnx")
#: Columns are counted in 31 bits where channels run along them.
MOST_COLUMNS = 2**31


class ChannelCall(ops.Call):
    """A call on x of N samples, whose channels lie on one axis."""

    layout: Layout

    def __init__(self, op: str, args: Sequence[Any]) -> None:
        super().__init__(op, Family(), args)
        self.compute = plan.compute_type(self.type)
        axis = self.axis()
        self.samples, self.channels = self.shape[0], self.shape[axis]
        self.before, self.run = math.prod(self.shape[1:axis]), math.prod(self.shape[axis + 1 :])
        self.lay_out(axis)
        if self.cols >= MOST_COLUMNS:
            raise ValueError(
                f"x: got {self.cols} elements in a row, wanted fewer than 2^31 on a CUDA device"
            )
        self.numbers |= plan.run_numbers(max(self.run, 1))
        # What kernels ask for, though the call has no running statistics, or no eps.
        self.numbers |= {"eps": 0.0, "offset": 0.0, "keep": 0.0, "take": 0.0, "bessel": 1.0}

    def count_of_axes(self, main: Any) -> int:
        if main.ndim < 2:
            raise ValueError(
                f"x: got shape {main.shape}, wanted samples and channels: 2 axes or more"
            )
        return main.ndim - 1

    def axis(self) -> int:
        """The channels' axis, counted from the first."""
        given, ndim = self.given["channel_axis"], len(self.shape)
        try:
            axis = operator.index(given)
        except TypeError:
            raise TypeError(f"channel_axis: got {given!r}, wanted an integer") from None
        axis += ndim if axis < 0 else 0
        if not 0 < axis < ndim:
            raise ValueError(
                f"channel_axis: got {given}, wanted one from 1 to {ndim - 1}, or from {1 - ndim} "
                f"to -1, for x of shape {self.shape}"
            )
        return axis

    def lay_out(self, axis: int) -> None:
        """x as a batch: statistics of each channel."""
        self.layout = Layout(1, self.samples * self.before, self.channels, self.run)
        self.rows, self.cols = self.layout.rows, self.layout.cols

    def lay_out_groups(self, axis: int, groups: int) -> None:
        """x as rows of groups where channels come first, else as columns of each sample."""
        self.groups, self.each = groups, self.channels // max(groups, 1)
        self.in_rows = self.before == 1
        if self.in_rows:
            self.rows, self.cols = self.samples * groups, self.each * self.run
        elif self.run == 1:
            self.layout = Layout(self.samples, self.before, self.channels, 1)
            self.rows, self.cols = self.samples * self.before, self.channels
        else:
            raise ValueError(
                f"channel_axis: got {self.given['channel_axis']} for x of shape {self.shape}, "
                "wanted, on a CUDA device, the axis after the samples' or the last one"
            )
        self.numbers["channels"] = self.each

    # ---- arguments ----

    def add_rows(self, known_as: str, name: str) -> Operand:
        """An array of x's shape, all in one piece."""
        array = self.array(name, required=True)
        if array.shape != self.shape:
            raise ValueError(f"{name}: got shape {array.shape}, wanted {self.shape}, x's shape")
        kind = self.type_of(name, array)
        if array.strides is not None:
            raise ValueError(
                f"{name}: got shape {array.shape} with strides {array.strides} (in elements), "
                f"wanted {ops.contiguous(name, array)}"
            )
        alignment = math.gcd(array.alignment, max(self.cols, 1) * array.itemsize)
        operand = Operand(self.source(name), kind, array.size, self.cols, alignment)
        self.operands[known_as] = operand
        return operand

    def add_channels(self, name: str, kind: str = "", pairs: bool = False) -> bool:
        """An array of an element a channel, or of one a sample and channel, which is returned."""
        array = self.array(name)
        if array is None:
            return False
        wanted = (self.channels,)
        paired = pairs and array.shape == (self.samples, self.channels)
        if array.shape != wanted and not paired:
            more = f" or {(self.samples, self.channels)}" if pairs else ""
            raise ValueError(f"{name}: got shape {array.shape}, wanted {wanted}{more}")
        found = self.type_of(name, array)
        if array.strides is not None or (kind and found != kind):
            how = "" if array.strides is None else ", not contiguous"
            raise TypeError(
                f"{name}: got dtype {array.dtype}{how}, wanted {kind or found} and contiguous"
            )
        self.operands[name] = Operand(self.source(name), found, array.size, self.channels)
        return paired

    def add_parameters(self, names: Sequence[str], pairs: bool = False) -> bool:
        """weight and bias; whether each sample has its own."""
        paired = [self.add_channels(name, pairs=pairs) for name in names]
        given = [self.given[name] is not None for name in names]
        if any(paired) and any(have and not own for have, own in zip(given, paired, strict=True)):
            shapes = [self.given[name].shape for name in names]
            raise ValueError(
                f"{names[1]}: got shape {shapes[1]}, wanted {shapes[0]}, {names[0]}'s, on a CUDA "
                "device"
            )
        return any(paired)

    def rows_of_parameters(self, pairs: bool) -> None:
        """Which of the parameters' rows, of a group's channels each, a row of x has."""
        for name in ("weight", "bias"):
            if name in self.operands:
                old = self.operands[name]
                mod = self.rows if pairs else self.groups
                alignment = old.alignment
                if self.run == 1:
                    array = self.given[name]
                    alignment = math.gcd(array.alignment, self.each * array.itemsize)
                self.operands[name] = old._replace(div=1, mod=max(mod, 1), alignment=alignment)

    def add_running(self, written: bool, required: bool) -> None:
        names = ("running_mean", "running_var")
        for name in names:
            array = self.array(name)
            if array is None and required:
                raise TypeError(f"{name}: got None, wanted an array to normalize by")
            self.add_channels(name)
            if written and array is not None and array.readonly:
                raise ValueError(f"{name}: got a read-only array, wanted a writeable one")
        if written:
            for name in names:
                self.check_alone(name)

    def check_alone(self, name: str) -> None:
        """What is updated in place may share no memory with anything else."""
        array = self.given[name]
        for other, value in self.given.items():
            if array is None or other == name or not isinstance(value, _cuda.Array):
                continue
            if _cuda.overlap(array, value) != "apart":
                raise ValueError(f"{name}: got an array that overlaps {other}, wanted one apart")

    def add_statistic(self, name: str, shape: tuple[int, ...], kind: str) -> None:
        """mean or rstd, as the forward call returned it."""
        array = self.array(name, required=True)
        if array.shape != shape:
            raise ValueError(f"{name}: got shape {array.shape}, wanted {shape}")
        if array.dtype != kind or array.strides is not None:
            how = "" if array.strides is None else ", not contiguous"
            raise TypeError(
                f"{name}: got dtype {array.dtype}{how}, wanted {kind} and contiguous, as the "
                "forward call returned it"
            )
        self.operands[name] = Operand(self.source(name), kind, array.size, 1)

    # ---- results ----

    def options(self) -> dict[str, Any]:
        """What all forward calls take: the result's type and what is done to it."""
        activation = self.given["activation"]
        checks.as_activation(activation)
        self.numbers["eps"] = checks.as_eps(self.given["eps"])
        self.y_type = self.result_type(self.given["dtype"])
        return {"activation": activation}

    def finish(self, shape: tuple[int, ...], kind: str) -> None:
        """y, and the statistics where they are asked for."""
        items = [self.output("y", "out", self.y_type, ("x",))]
        if self.given["return_stats"]:
            items += [self.new_array(name, shape, kind) for name in ("mean", "rstd")]
        self.result = items[0] if len(items) == 1 else items

    def gradients(self, shape: tuple[int, ...]) -> None:
        wanted = checks.as_mask(self.given["output_mask"], "dx, dweight, dbias")
        shapes = {"dx": self.shape, "dweight": shape, "dbias": shape}
        kinds = {"dx": self.type, "dweight": self.compute, "dbias": self.compute}
        self.result = [
            self.new_array(name, shapes[name], kinds[name]) if asked else None
            for name, asked in zip(shapes, wanted, strict=True)
        ]

    def alignment(self) -> int:
        """Of x and what has its shape; parameters that stand for runs are read one at a time."""
        names = [*plan.ROW_OPERANDS, *["weight", "bias"] * (self.run == 1)]
        return math.gcd(
            16, *[self.operands[name].alignment for name in names if name in self.operands]
        )

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | dict(self.plan.numbers)

    def momentum(self, count: int) -> None:
        """How running statistics are updated, of `count` elements each: as `dialect` says."""
        given, dialect = self.given["momentum"], self.given["dialect"]
        if dialect not in DIALECTS:
            raise ValueError(f"dialect: got {dialect!r}, wanted one of {', '.join(DIALECTS)}")
        try:
            momentum = float(given)
        except (TypeError, ValueError):
            raise TypeError(f"momentum: got {given!r}, wanted a number") from None
        if not math.isfinite(momentum):
            raise ValueError(f"momentum: got {given!r}, wanted a finite number")
        torch = dialect == "torch"
        keep, take = (1 - momentum, momentum) if torch else (momentum, 1 - momentum)
        bessel = count / (count - 1) if torch and count > 1 else 1.0
        self.numbers |= {"keep": keep, "take": take, "bessel": bessel}


# ---- batch norm ----------------------------------------------------------------------------------


class BatchForward(ChannelCall):
    """batch_norm; instance_norm too, where running statistics normalize."""

    def __init__(self, op: str, args: Sequence[Any], training: bool) -> None:
        super().__init__(op, args)
        more = self.options()
        self.momentum(self.layout.rows * self.run)
        self.add_rows("x", "x")
        self.add_parameters(("weight", "bias"))
        self.add_running(training, not training)
        self.finish((self.channels,), "float64")
        self.plan = channel_plan.batch(
            self.layout, self.types(), alignment=self.alignment(), training=training,
            aliased=self.aliased, **more,
        )  # fmt: skip


class BatchBackward(ChannelCall):
    def __init__(self, op: str, args: Sequence[Any]) -> None:
        super().__init__(op, args)
        training = bool(self.given["training"])
        self.numbers["eps"] = checks.as_eps(self.given["eps"])
        self.add_rows("dy", "dy")
        self.add_rows("x", "x")
        self.add_parameters(("weight", "bias"))
        self.operands.pop("bias", None)
        given = [self.given[name] is not None for name in ("mean", "rstd")]
        known = any(given)
        if known:
            for name in ("mean", "rstd"):
                self.add_statistic(name, (self.channels,), "float64")
        self.add_running(False, not training and not known)
        if training or known:
            for name in ("running_mean", "running_var"):
                self.operands.pop(name, None)
        self.gradients((self.channels,))
        self.plan = channel_plan.batch_backward(
            self.layout, self.types(), alignment=self.alignment(), training=training, known=known
        )


# ---- group and instance norm ---------------------------------------------------------------------


class GroupForward(ChannelCall):
    """group_norm; instance_norm, whose groups are channels."""

    def __init__(self, op: str, args: Sequence[Any]) -> None:
        super().__init__(op, args)
        more, instance = self.options(), op == "instance_norm"
        self.add_rows("x", "x")
        pairs = self.add_parameters(("weight", "bias"), instance)
        if instance:
            self.momentum(self.before * self.run)
            self.add_running(True, False)
        self.finish((self.samples, self.groups), self.compute)
        types = self.types()
        names = [name for name in types if name.startswith("running")]
        running = {name: types.pop(name) for name in names}
        if self.in_rows:
            self.rows_of_parameters(pairs)
            found = plan.forward(
                self.rows, self.cols, types, alignment=self.alignment(), rms=False,
                return_stats=bool(self.given["return_stats"]), per_row=self.per_row(),
                aliased=self.aliased, run=self.run, alike=self.alike(), **more,
            )  # fmt: skip
        else:
            found = channel_plan.batch(
                self.layout, types, alignment=self.alignment(), training=True, groups=self.groups,
                aliased=self.aliased, pairs=pairs, **more,
            )  # fmt: skip
        self.plan = self.with_running(found, running)

    def lay_out(self, axis: int) -> None:
        self.lay_out_groups(axis, groups_of(self))

    def with_running(self, found: plan.Plan, running: dict[str, str]) -> plan.Plan:
        """The plan, and before it what updates running statistics, which reads x as it came."""
        if not running:
            return found
        if not self.in_rows:
            raise ValueError(
                "running_mean: got an array for channels that come last, wanted None on a CUDA "
                "device, or channels on axis 1"
            )
        layout = Layout(1, self.samples, self.channels, self.run)
        builder = channel_plan.averages(layout, {"x": self.type} | running,
                                        alignment=self.alignment())  # fmt: skip
        if not builder.steps:
            return found
        for step in found.steps:
            builder.add(step)
        for room in found.workspace:
            builder.room(*room)
        return builder.done(found.kernel, found.vector_bytes, found.reason)


class GroupBackward(ChannelCall):
    def __init__(self, op: str, args: Sequence[Any]) -> None:
        super().__init__(op, args)
        self.add_rows("dy", "dy")
        self.add_rows("x", "x")
        pairs = self.add_parameters(("weight", "bias"), op.startswith("instance"))
        for name in ("mean", "rstd"):
            self.add_statistic(name, (self.samples, self.groups), self.compute)
        self.gradients((self.samples, self.channels) if pairs else (self.channels,))
        self.operands.pop("bias", None)
        if self.in_rows:
            self.rows_of_parameters(pairs)
            self.plan = channel_plan.group_backward(
                self.samples, self.groups, self.each, self.run, self.types(),
                alignment=self.alignment(), own=self.per_row().get("weight", False), pairs=pairs,
            )  # fmt: skip
        else:
            self.plan = channel_plan.batch_backward(
                self.layout, self.types(), alignment=self.alignment(), training=True,
                groups=self.groups, pairs=pairs,
            )  # fmt: skip

    def lay_out(self, axis: int) -> None:
        self.lay_out_groups(axis, groups_of(self))


def groups_of(call: ChannelCall) -> int:
    """How many groups the channels are in; each is one in instance norm."""
    if "num_groups" not in call.given:
        return call.channels
    given = call.given["num_groups"]
    try:
        groups = operator.index(given)
    except TypeError:
        raise TypeError(f"num_groups: got {given!r}, wanted an integer") from None
    if groups < 1 or call.channels % groups:
        raise ValueError(
            f"num_groups: got {groups}, wanted a divisor of the number of channels, {call.channels}"
        )
    return groups


def checked(op: str, args: Sequence[Any]) -> ChannelCall:
    """The call of an op on channels."""
    if op == "batch_norm":
        return BatchForward(op, args, bool(args[ops.NAMES[op].index("training")]))
    if op == "instance_norm" and not args[ops.NAMES[op].index("use_input_stats")]:
        return BatchForward(op, args, training=False)
    if op == "batch_norm_backward":
        return BatchBackward(op, args)
    return (GroupBackward if op.endswith("_backward") else GroupForward)(op, args)
