"""Each op on CUDA arrays: arguments checked, kernels planned, both laid out as a kept call.

`_cuda.Op` keeps an op's calls by all that is not an address, and has `build` make the ones it has
not met: what stands here is done once for each kind of call. Checks and their words are those of
checks.py, wherever these can be asked of a device array.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import _cuda, checks, interop
from ..call import eps_of
from ..dispatch import CALLS
from . import launch, plan
from .signatures import CHANNELS

TYPES = ("float16", "bfloat16", "float32", "float64")
_WANTED = "float16, bfloat16, float32 or float64"


class Family(NamedTuple):
    """What tells ops of one form apart."""

    rms: bool = False
    #: What is normalised, and what the parameters are called.
    main: str = "x"
    weight: str = "weight"
    bias: str = "bias"
    adds: bool = False
    #: Whether parameters (B, *normalized) are one a sample.
    per_sample: bool = False
    offset: float = 0.0


_ADAPTIVE = Family(weight="scale", bias="shift", per_sample=True, offset=1.0)
FORWARD = {
    "layer_norm": Family(),
    "rms_norm": Family(rms=True),
    "add_layer_norm": Family(adds=True),
    "add_rms_norm": Family(rms=True, adds=True),
    "adaptive_layer_norm": _ADAPTIVE,
}
BACKWARD = {
    "layer_norm_backward": Family(),
    "rms_norm_backward": Family(rms=True),
    "add_layer_norm_backward": Family(main="sum"),
    "add_rms_norm_backward": Family(rms=True, main="sum"),
    "adaptive_layer_norm_backward": _ADAPTIVE,
}
#: The arguments of each op, by position.
NAMES = {op: tuple(inspect.signature(CALLS[op]).parameters)[:-1] for op in (*FORWARD, *BACKWARD)}
NAMES |= CHANNELS


def wider(a: str, b: str) -> str:
    return a if a == b else plan.compute_type(a, b)


class Operand(NamedTuple):
    """An array as kernels see it: rows at a distance, parameters, or numbers of rows."""

    source: tuple[Any, int]
    type: str
    #: From the first element to the last, both counted.
    span: int
    stride: int
    #: The largest power of two, up to 16, that divides the address of every row.
    alignment: int = 16
    #: Which of a parameter's rows a row has: ``row // div % mod``.
    div: int = 1
    mod: int = 1


class Call:
    """One call, checked: its arrays are `operands` by the names that kernels have for them.

    A subclass sets `plan` and `result`; `entry` is what _cuda keeps.
    """

    plan: plan.Plan
    result: Any

    def __init__(self, op: str, family: Family, args: Sequence[Any]) -> None:
        self.op, self.family = op, family
        self.given: dict[str, Any] = dict(zip(NAMES[op], args, strict=True))
        for name in ("lengths", "mask"):
            if self.given.get(name) is not None:
                raise TypeError(
                    f"{name}: got {_in_words(self.given[name])}, wanted None for arrays on a CUDA "
                    "device, where rows count as a whole"
                )
        main = self.given[family.main]
        self.device: int = main.device
        # uint16 holds bfloat16 where the call says so by name.
        dtype = self.given.get("dtype")
        self.bits = main.dtype == "uint16" and isinstance(dtype, str) and dtype == "bfloat16"
        self.operands: dict[str, Operand] = {}
        self.numbers: dict[str, float] = {}
        self.new: list[tuple[tuple[int, ...], Any]] = []
        self.aliased = False
        self.type = self.type_of(family.main, main)
        first = main.ndim - self.count_of_axes(main)
        self.shape, self.lead, self.normalized = main.shape, main.shape[:first], main.shape[first:]
        self.rows, self.cols = math.prod(self.lead), math.prod(self.normalized)

    def count_of_axes(self, main: Any) -> int:
        """How many axes to normalize over; here they must be the last ones."""
        name, axis = self.family.main, self.given.get("axis")
        axes = checks.normalized_axes(main, self.given["normalized_shape"], axis, name)
        last = tuple(range(main.ndim - len(axes), main.ndim))
        if axes != last:
            raise ValueError(
                f"axis: got {axis!r} for {name} of shape {main.shape} on a CUDA device, wanted the "
                f"last axes, {last}: move them there and make {name} contiguous"
            )
        return len(axes)

    # ---- arguments ----

    def array(self, name: str, required: bool = False) -> Any:
        """An argument's array, which lies where the main one does; None where there is none."""
        value, main = self.given.get(name), self.family.main
        if value is None:
            if required:
                raise TypeError(f"{name}: got None, wanted an array")
            return None
        if not isinstance(value, _cuda.Array):
            raise TypeError(
                f"{name}: got {_in_words(value)} in host memory, wanted an array on CUDA device "
                f"{self.device}, where {main} is"
            )
        if value.device != self.device:
            raise ValueError(
                f"{name}: got an array on CUDA device {value.device}, wanted one on CUDA device "
                f"{self.device}, where {main} is"
            )
        return value

    def type_of(self, name: str, array: Any) -> str:
        if self.bits and array.dtype == "uint16":
            return "bfloat16"
        if array.dtype not in TYPES:
            raise TypeError(f"{name}: got dtype {array.dtype}, wanted {_WANTED}")
        return array.dtype

    def source(self, name: str) -> tuple[Any, int]:
        return "arg", NAMES[self.op].index(name)

    def add_rows(self, known_as: str, name: str) -> Operand:
        """An array of x's shape, as rows."""
        array = self.array(name, required=True)
        if array.shape != self.shape:
            raise ValueError(
                f"{name}: got shape {array.shape}, wanted {self.shape}, the shape of "
                f"{self.family.main}"
            )
        kind = self.type_of(name, array)
        stride = row_stride(array, len(self.lead))
        if stride is None:
            raise ValueError(
                f"{name}: got shape {array.shape} with strides {array.strides} (in elements), "
                f"wanted contiguous rows at one distance: {contiguous(name, array)}"
            )
        span = max(self.rows - 1, 0) * abs(stride) + self.cols
        # Of one row too: a row of a batch has the same bits alone.
        alignment = math.gcd(array.alignment, stride * array.itemsize)
        operand = Operand(self.source(name), kind, span, stride, alignment)
        self.operands[known_as] = operand
        return operand

    def add_parameter(self, known_as: str, name: str) -> None:
        """A parameter: one for all rows, or one for each place along some leading axes."""
        array = self.array(name)
        if array is None:
            return
        kind = self.type_of(name, array)
        div, mod = self.steps_of(name, array.shape)
        if array.strides is not None:
            raise ValueError(
                f"{name}: got shape {array.shape} with strides {array.strides} (in elements), "
                f"wanted {contiguous(name, array)}"
            )
        alignment = (
            math.gcd(array.alignment, self.cols * array.itemsize) if mod > 1 else (array.alignment)
        )
        self.operands[known_as] = Operand(
            self.source(name), kind, array.size, self.cols, alignment, div, mod
        )

    def steps_of(self, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """A parameter's axes before the normalized ones, as Operand's div and mod."""
        before = self.leading_axes(name, shape)
        skipped = len(self.lead) - len(before)
        own = [d for d, length in enumerate(before, skipped) if length > 1]
        if not own:
            return 1, 1
        run = range(own[0], own[-1] + 1)
        if any(self.lead[d] > 1 for d in run if d not in own):
            raise ValueError(
                f"{name}: got shape {shape} for {self.family.main} of shape {self.shape}, wanted, "
                "on a CUDA device, no axis of 1 between those in which its rows differ"
            )
        return math.prod(self.lead[run.stop :]), math.prod([self.lead[d] for d in run])

    def leading_axes(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A parameter's axes before the normalized ones, those of a sample's tokens put in."""
        if shape == self.normalized:
            return ()
        cut = len(shape) - len(self.normalized)
        before = shape[: max(cut, 0)]
        if self.family.per_sample and cut == 1:
            before = (shape[0], *[1] * (len(self.lead) - 1))
        ends = self.lead[max(len(self.lead) - len(before), 0) :]
        fits = all(length in (1, end) for length, end in zip(before, ends, strict=False))
        if 0 < len(before) <= len(self.lead) and shape[cut:] == self.normalized and fits:
            return before
        raise ValueError(f"{name}: got shape {shape}, wanted {self.parameter_shape()}")

    def parameter_shape(self) -> str:
        if not self.lead:
            return f"{self.normalized}"
        sample = f"{self.lead[:1] + self.normalized}, one a sample, or "
        first = sample if self.family.per_sample else ""
        return f"{first}{self.normalized}, or axes before it that broadcast to {self.lead}"

    # ---- results ----

    def result_type(self, dtype: Any) -> str:
        if dtype is None:
            return self.type
        wanted = checks.as_result_type(interop.convert("dtype", dtype))
        if wanted == checks.INT8:
            raise TypeError(f"dtype: got int8, wanted {_WANTED} for arrays on a CUDA device")
        return "bfloat16" if wanted.kind == "V" else wanted.name

    def new_array(
        self, known_as: str, shape: tuple[int, ...], kind: str, steps: tuple[int, int] = (1, 1)
    ) -> tuple[Any, int]:
        """A new array, of the kind that the main one is of; `steps` as Operand's div and mod."""
        source = "new", len(self.new)
        self.new.append((shape, "uint16" if self.bits and kind == "bfloat16" else kind))
        alignment = math.gcd(16, self.cols * plan.SIZES[kind])
        self.operands[known_as] = Operand(
            source, kind, math.prod(shape), self.cols, alignment, *steps
        )
        return source

    def output(
        self, known_as: str, name: str, kind: str, allowed: Sequence[str]
    ) -> tuple[Any, int]:
        """`out` or `sum_out`, or else a new array."""
        out = self.array(name)
        if out is None:
            return self.new_array(known_as, self.shape, kind)
        wanted = "uint16" if self.bits and kind == "bfloat16" else kind
        if out.dtype != wanted:
            which = "sum" if name == "sum_out" else "result"
            raise TypeError(
                f"{name}: got dtype {out.dtype}, wanted {wanted}, the type of the {which}"
            )
        if out.readonly:
            raise ValueError(f"{name}: got a read-only array, wanted a writeable one")
        operand = self.add_rows(known_as, name)
        if self.rows > 1 and abs(operand.stride) < self.cols:
            raise ValueError(
                f"{name}: got an array whose elements overlap in memory, wanted each in a place of "
                "its own"
            )
        self.check_apart(name, out, allowed)
        return operand.source

    def check_apart(self, name: str, out: _cuda.Array, allowed: Sequence[str]) -> None:
        """`out` may be the very elements of what is `allowed`, but share no memory otherwise."""
        for other, value in self.given.items():
            # sum_out is checked first; out is checked against it.
            if other in (name, "out") or not isinstance(value, _cuda.Array):
                continue
            how = _cuda.overlap(out, value)
            if how == "apart" or (how == "overlap" and not shares_memory(out, value)):
                continue
            if how == "overlap" or other not in allowed:
                raise ValueError(
                    f"{name}: got an array that overlaps {other}, wanted "
                    f"{' or '.join(allowed)} itself or memory of its own"
                )
            self.aliased = True

    # ---- what is kept ----

    def alignment(self) -> int:
        return math.gcd(16, *[operand.alignment for operand in self.operands.values()])

    def types(self) -> dict[str, str]:
        return {name: operand.type for name, operand in self.operands.items()}

    def per_row(self) -> dict[str, bool]:
        return {name: operand.mod > 1 for name, operand in self.operands.items()}

    def alike(self) -> bool:
        """Whether rows differ in the weight as they do in the bias."""
        found = [self.operands.get(name) for name in ("weight", "bias")]
        steps = [(each.div, each.mod) for each in found if each is not None]
        return len(steps) == 2 and steps[0] == steps[1]

    def entry(self) -> _cuda.Entry:
        """The call as _cuda makes it, its kernels compiled and loaded."""
        values = self.arguments()
        steps = [
            (
                launch.kernel(step.spec, self.device),
                step.grid,
                step.block,
                step.shared,
                tuple([values[name] for name in step.arguments]),
            )
            for step in self.plan.steps
        ]
        sizes = [count * plan.SIZES[kind] for _, count, kind in self.plan.workspace]
        return _cuda.Entry(steps, self.new, sizes, self.result)

    def arguments(self) -> dict[str, Any]:
        """What kernels may ask for, by name."""
        values: dict[str, Any] = {"rows": self.rows, "cols": self.cols, **self.numbers}
        for name, operand in self.operands.items():
            values[name] = (*operand.source, operand.span, plan.SIZES[operand.type])
            values[f"{name}_stride"] = operand.stride
            values[f"{name}_div"], values[f"{name}_mod"] = operand.div, operand.mod
        for i, (name, count, kind) in enumerate(self.plan.workspace):
            values[name] = "work", i, count, plan.SIZES[kind]
        return values


class Forward(Call):
    """A forward call: y, and after it what else was asked for of the sum, mean and rstd."""

    def __init__(self, op: str, args: Sequence[Any]) -> None:
        family = FORWARD[op]
        super().__init__(op, family, args)
        given = self.given
        residual = self.addend()
        y_type = self.result_type(given["dtype"])
        activation = given["activation"]
        checks.as_activation(activation)
        offset = checks.as_offset(given.get("offset", family.offset))
        residual_type = self.type if residual is None else self.type_of("residual", residual)
        self.compute = plan.compute_type(self.type, residual_type)
        self.numbers["eps"] = self.eps()
        self.add_rows("x", "x")
        self.add_parameter("weight", family.weight)
        self.add_parameter("bias", family.bias)
        self.numbers["offset"] = offset if "weight" in self.operands else 0.0
        total = None
        if residual is not None:
            self.add_parameter("linear_bias", "linear_bias")
            self.add_parameter("gate", "gate")
            self.add_rows("residual", "residual")
            kind = wider(self.type, residual_type)
            total = self.output("sum", "sum_out", kind, ("x", "residual"))
        sources = [self.output("y", "out", y_type, ("x",)), total]
        if given["return_stats"]:
            names = ("rstd",) if family.rms else ("mean", "rstd")
            sources += [self.new_array(name, self.lead, self.compute) for name in names]
        items = [source for source in sources if source is not None]
        self.result = items[0] if len(items) == 1 else items
        self.plan = plan.forward(
            self.rows, self.cols, self.types(),
            alignment=self.alignment(), rms=family.rms, activation=activation,
            return_stats=bool(given["return_stats"]), per_row=self.per_row(),
            offset=self.numbers["offset"] != 0,
            round_before_weight=bool(given.get("round_before_weight")),
            round_sum=bool(given.get("round_sum")), aliased=self.aliased, alike=self.alike(),
        )  # fmt: skip

    def addend(self) -> Any:
        """The residual; what goes with it must not come without it."""
        residual = self.array("residual")
        if residual is None and self.family.adds:
            raise TypeError("residual: got None, wanted an array of x's shape")
        for name in ("gate", "sum_out"):
            if residual is None and self.given.get(name) is not None:
                raise TypeError(f"{name}: got an array without a residual, wanted both or neither")
        return residual

    def eps(self) -> float:
        return eps_of(self.given["eps"], self.family.rms, np.dtype(self.compute))


class Backward(Call):
    """A backward call: dx, dweight and dbias (rms: without the last)."""

    def __init__(self, op: str, args: Sequence[Any]) -> None:
        family = BACKWARD[op]
        super().__init__(op, family, args)
        given = self.given
        self.compute = plan.compute_type(self.type)
        if given.get("from_output"):
            raise TypeError(
                "from_output: got True, wanted False for arrays on a CUDA device: pass x, mean and "
                "rstd"
            )
        wanted = checks.as_mask(
            given["output_mask"], "dx, dweight" if family.rms else "dx, dweight, dbias"
        )
        self.add_rows("dy", "dy")
        self.add_rows("x", family.main)
        if given.get("dsum") is not None and wanted[0]:
            self.add_rows("dsum", "dsum")
        self.add_parameter("weight", family.weight)
        self.numbers["offset"] = checks.as_offset(given.get("offset", family.offset))
        if not family.rms:
            self.add_statistic("mean")
        self.add_statistic("rstd")
        shapes, steps = self.gradient_shapes()
        made = [self.new_array("dx", self.shape, self.type) if wanted[0] else None]
        for name, shape, asked in zip(("dweight", "dbias"), shapes, wanted[1:], strict=False):
            made.append(self.new_array(name, shape, self.compute, steps) if asked else None)
        self.result = made
        self.plan = plan.backward(
            self.rows, self.cols, self.types(),
            alignment=self.alignment(), rms=family.rms, per_row=self.per_row(),
            offset=self.numbers["offset"] != 0, groups=steps,
        )  # fmt: skip

    def add_statistic(self, name: str) -> None:
        """mean or rstd, as the forward call returned it."""
        array = self.array(name, required=True)
        kept = self.lead + (1,) * len(self.normalized)
        if array.shape not in (self.lead, kept):
            raise ValueError(f"{name}: got shape {array.shape}, wanted {self.lead} (or {kept})")
        if array.dtype != self.compute or array.strides is not None:
            how = "" if array.strides is None else ", not contiguous"
            raise TypeError(
                f"{name}: got dtype {array.dtype}{how}, wanted {self.compute} and contiguous, as "
                "the forward call returned it"
            )
        self.operands[name] = Operand(self.source(name), self.compute, self.rows, 1)

    def gradient_shapes(self) -> tuple[list[tuple[int, ...]], tuple[int, int]]:
        """Of dweight and dbias, and the rows that each of their rows is summed over.

        A parameter's own shape, or the other's where there is only one.
        """
        names = (self.family.weight, self.family.bias)
        arrays = [self.array(name) for name in names]
        weight, bias = [None if array is None else array.shape for array in arrays]
        shapes = [weight or bias or self.normalized, bias or weight or self.normalized]
        steps = [self.steps_of(name, shape) for name, shape in zip(names, shapes, strict=True)]
        if steps[0] != steps[1]:
            raise ValueError(
                f"{names[1]}: got shape {shapes[1]}, wanted {shapes[0]}, {names[0]}'s, for "
                "gradients on a CUDA device"
            )
        return shapes, steps[0]


def build(op: str, *args: Any) -> _cuda.Entry:
    """The call of `op` with these arguments, as it is kept."""
    return checked(op, args).entry()


def checked(op: str, args: Sequence[Any]) -> Call:
    if op in CHANNELS:
        from . import channels

        return channels.checked(op, args)
    return Forward(op, args) if op in FORWARD else Backward(op, args)


def reasons(call: Call) -> Iterator[str]:
    """What explain says of a call."""
    if not call.plan.steps:
        yield "nothing to compute: there are no elements"
        return
    yield f"{call.plan.kernel}: {call.plan.reason}"
    yield f"elements are moved {call.plan.vector_bytes} bytes at a time, as far as they are aligned"
    for step in call.plan.steps:
        yield f"{step.spec.kernel}: {step.grid} blocks of {step.block} threads"
    for name, count, kind in call.plan.workspace:
        yield f"{name}: {count * plan.SIZES[kind]:,} bytes, for the time of the call"


# ---- layout -------------------------------------------------------------------------------------


def row_stride(array: Any, first: int) -> int | None:
    """The distance of an array's rows in elements, `first` being the first axis of a row.

    None where a row's elements are not contiguous or rows do not lie at one distance.
    """
    cols = math.prod(array.shape[first:])
    if array.strides is None or not array.size:
        return cols
    axes = list(zip(array.shape, array.strides, strict=True))
    step = 1
    for length, stride in reversed(axes[first:]):
        if length > 1 and stride != step:
            return None
        step *= length
    found: int | None = None
    step = 0
    for length, stride in reversed(axes[:first]):
        if length > 1:
            if found is not None and stride != step:
                return None
            found = stride if found is None else found
            step = stride * length
    if found is None and first:  # one row, which may be one of more
        found = axes[first - 1][1]
    return cols if found is None else found


class _Place:
    """What NumPy takes for an array at an address."""

    def __init__(self, array: _cuda.Array) -> None:
        size, strides = array.itemsize, array.strides
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "shape": array.shape,
            "strides": None if strides is None else tuple([stride * size for stride in strides]),
            "data": (array.address, True),
        }


def shares_memory(a: _cuda.Array, b: _cuda.Array) -> bool:
    """Whether an element of one lies in one of the other: slices of a row may lie interleaved."""
    # NumPy looks at addresses alone; it never reads what is not its own.
    return checks.shares_memory(np.asarray(_Place(a)), np.asarray(_Place(b)))


def contiguous(name: str, array: Any) -> str:
    """How to get what is wanted of an array that lies otherwise."""
    calls = {"torch": f"{name}.contiguous()", "cupy": f"cupy.ascontiguousarray({name})"}
    return calls.get(array.kind, "a contiguous array")


def _in_words(value: Any) -> str:
    article = "an" if type(value).__name__[:1].lower() in "aeiou" else "a"
    return f"{article} {type(value).__name__}"
