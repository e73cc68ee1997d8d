"""Where a call goes, by device and layout, and what explain says of it.

_core takes plain ndarrays straight down to the kernels. What is left arrives here: arguments are
checked, what the kernels cannot load is converted, and the call goes down through _core's
``*_rows`` functions. Each op makes one Call, whose constructor decides and whose ``run`` computes,
so that ``explain`` shows the very decisions a call would make.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from . import _core, checks, interop

MACHINE_EPS = {t: float(np.finfo(t).eps) for t in checks.COMPUTED}
# What a quantised row that is 0 has as its scale.
LEAST_SCALE = np.finfo(np.float32).tiny


class Rows:
    """An array seen as (leading..., elements...): its normalized axes last, in place.

    `array` is a view where the kernels can load its elements, else memory of its own, which `notes`
    records: a copy, or, where not to `fill`, room for what will be written back.
    """

    def __init__(
        self,
        name: str,
        source: np.ndarray,
        order: tuple[int, ...],
        notes: list[str],
        fill: bool = True,
        explained: bool = False,
    ) -> None:
        self.source = source
        self.order = order
        why = _why_copied(source)
        self.copied = bool(why)
        if why:
            notes.append(f"{name} is copied: {why}")
            native = source.dtype.newbyteorder("=")
            source = stand_in(source.shape, native) if explained else np.empty(source.shape, native)
            if fill and not explained:
                np.copyto(source, self.source)
        self.stored = source
        self.array = source.transpose(order)

    def write_back(self) -> None:
        """Bring the result from the copy to where the caller wants it."""
        if self.copied:
            np.copyto(self.source, self.stored)


def _why_copied(array: np.ndarray) -> str:
    """Why the kernels cannot load this array's elements; empty where they can."""
    if not array.dtype.isnative:
        return "its bytes are swapped"
    return "" if array.flags.aligned else "its elements are not aligned"


def stand_in(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """What has a new array's shape and strides, but memory for one element: for plans alone."""
    strides = [dtype.itemsize * math.prod(shape[d + 1 :]) for d in range(len(shape))]
    return np.lib.stride_tricks.as_strided(np.empty((), dtype), shape, strides)


def as_output(out: Any, dtype: np.dtype) -> Any:
    """An array to write to, as bfloat16 where the result is of BITS."""
    takes_bits = dtype == interop.BITS and isinstance(out, np.ndarray)
    return interop.as_bits(out) if takes_bits else out


class Call:
    """One call of an op, checked and laid out.

    An op's own constructor sets `kernel`, the function of _core with its arguments, `result`, what
    the caller gets, and `outputs`, the rows to be written back. A call that is only `explained`
    copies nothing and takes no kept memory.
    """

    kernel: Callable[..., Any]
    result: Any

    def __init__(
        self, x: Any, normalized_shape: Any, axis: Any, explained: bool,
        others: Sequence[np.ndarray] = (), name: str = "x", per_sample: bool = False,
    ) -> None:  # fmt: skip
        self.explained = explained
        self.copies: list[str] = []
        self.outputs: list[Rows] = []
        self.source = self.floating(name, x)
        self.name = name
        self.per_sample = per_sample
        self.axes = checks.normalized_axes(self.source, normalized_shape, axis, name)
        self.dtype = self.source.dtype.newbyteorder("=")
        self.compute = checks.compute_type(self.dtype, *[other.dtype for other in others])
        shape, first = self.source.shape, self.source.ndim - len(self.axes)
        self.is_trailing = self.axes[0] == first
        self.order = (*[d for d in range(len(shape)) if d not in self.axes], *self.axes)
        self.moved_shape = tuple([shape[d] for d in self.order])
        self.lead, self.normalized = self.moved_shape[:first], self.moved_shape[first:]

    def floating(self, name: str, value: Any) -> np.ndarray:
        array = checks.as_floating(name, value)
        if array.dtype.kind == "V" and not interop.is_bits(array.dtype):
            _core.set_bfloat16(array.dtype)
        if array is not value and np.asarray(value).dtype.kind in "biu":
            self.copies.append(f"{name} is copied: integers are converted to float64")
        return array

    def rows(self, name: str, source: np.ndarray, is_output: bool = False) -> np.ndarray:
        """The array as the kernels see it; an output is written back after the call."""
        rows = Rows(name, source, self.order, self.copies, not is_output, self.explained)
        if is_output:
            self.outputs.append(rows)
        return rows.array

    def like_x(self, name: str, value: Any) -> np.ndarray:
        """An array of x's shape and any storage type."""
        array = self.floating(name, value)
        if array.shape != self.source.shape:
            raise ValueError(
                f"{name}: got shape {array.shape}, wanted {self.source.shape}, "
                f"the shape of {self.name}"
            )
        return array

    def parameter(self, name: str, value: Any) -> np.ndarray | None:
        """weight or bias: of the normalized shape, or with leading axes that broadcast to x's.

        One for each sample, (B, *normalized), has its tokens' axes put in.
        """
        array = checks.as_real(name, value)
        if array is None:
            return None
        if array.shape == self.normalized:
            return checks.as_plain(array, self.compute)
        before, shape = array.ndim - len(self.normalized), array.shape
        if self.per_sample and before == 1:
            shape = (shape[0], *[1] * (len(self.lead) - 1), *shape[1:])
        if not self._has_own_rows(shape):
            raise ValueError(f"{name}: got shape {array.shape}, wanted {self._wanted(before)}")
        return checks.as_stored(array, self.compute).reshape(shape)

    def _has_own_rows(self, shape: tuple[int, ...]) -> bool:
        """Whether a parameter's leading axes fit x's, and the others are the normalized ones."""
        before = len(shape) - len(self.normalized)
        ends = self.lead[max(len(self.lead) - before, 0) :]
        return (
            self.is_trailing
            and 0 < before <= len(self.lead)
            and shape[before:] == self.normalized
            and all(length in (1, end) for length, end in zip(shape, ends, strict=False))
        )

    def _wanted(self, before: int) -> str:
        if before <= 0 or not (self.lead and self.is_trailing):
            return f"{self.normalized}"
        sample = f"{self.lead[:1] + self.normalized}, one a sample, or " if self.per_sample else ""
        return f"{sample}{self.normalized}, or axes before it that broadcast to {self.lead}"

    def spread(self, array: np.ndarray | None) -> np.ndarray | None:
        """A parameter as if there were one for each row; no copy."""
        return None if array is None else np.broadcast_to(array, self.moved_shape)

    def new_result(self, dtype: np.dtype) -> tuple[np.ndarray, bool]:
        """An array for a result, and whether its pages are known to exist."""
        nbytes = self.source.size * dtype.itemsize
        if self.explained:
            return stand_in(self.source.shape, dtype), _core.would_be_warm(nbytes)
        return _core.new_result(self.source.shape, dtype)

    def a_row(self, dtype: np.dtype, value: Any) -> np.ndarray:
        """Room for a number for each row, which rows of length 0 keep as `value`."""
        if self.explained:
            return stand_in(self.lead, dtype)
        return np.full(self.lead, value, dtype)

    def scales(self, dtype: np.dtype) -> np.ndarray | None:
        """Room for the rows' scales, where results are of a type that has them."""
        return self.a_row(checks.FLOAT32, LEAST_SCALE) if dtype == checks.INT8 else None

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Room for a mean and an rstd or variance, which hold what rows of length 0 have."""
        return self.a_row(self.compute, 0), self.a_row(self.compute, np.nan)

    def valid(self, lengths: Any, mask: Any) -> dict[str, np.ndarray]:
        """Which elements count, as the kernels take it."""
        if lengths is not None and mask is not None:
            raise TypeError("lengths and mask: got both, wanted one")
        if lengths is not None:
            n = math.prod(self.normalized)
            return {"lengths": checks.as_lengths(lengths, self.lead, n)}
        if mask is None:
            return {}
        return {"mask": checks.as_element_mask(mask, self.source.shape).transpose(self.order)}

    def plan(self) -> dict[str, Any]:
        """What `run` would do, as _core describes it."""
        return self.kernel(plan=True)

    def run(self) -> Any:
        if self.source.size:
            self.kernel()
            for rows in self.outputs:
                rows.write_back()
        return self.result


class Pair(NamedTuple):
    """A weight and a bias, the array that their result goes to, and what errors call them."""

    weight: Any
    bias: Any
    out: Any
    names: tuple[str, str, str] = ("weight", "bias", "out")

    def as_bits(self) -> Pair:
        """The parameters as bfloat16, where they are uint16."""
        weight, bias = interop.as_bits(self.weight), interop.as_bits(self.bias)
        return self._replace(weight=weight, bias=bias)


class Output(NamedTuple):
    """One result and its checked parameters; `given` is y as the caller knows it."""

    weight: np.ndarray | None
    bias: np.ndarray | None
    y: np.ndarray
    scale: np.ndarray | None
    given: np.ndarray


class NormCall(Call):
    """One forward call of a norm, with all that may be fused with it.

    The result is y, or a tuple of what was asked for: y, its scale, the sum, mean, rstd.
    """

    def __init__(
        self,
        x: Any,
        normalized_shape: Any,
        axis: Any,
        pairs: Sequence[Pair],
        eps: Any,
        *,
        rms: bool = False,
        dtype: Any = None,
        return_stats: Any = False,
        activation: Any = None,
        lengths: Any = None,
        mask: Any = None,
        offset: Any = 0.0,
        round_before_weight: Any = False,
        addends: dict[str, Any] | None = None,
        sum_out: Any = None,
        round_sum: Any = True,
        several: bool = False,
        per_sample: bool = False,
        explained: bool = False,
    ) -> None:
        adds = addends or {}
        if interop.asks_for_bits(x, dtype):
            x, dtype = interop.as_bits(x), None
            adds = {name: interop.as_bits(value) for name, value in adds.items()}
            pairs = [pair.as_bits() for pair in pairs]
        residual, given_sum = adds.get("residual"), sum_out
        others = [] if residual is None else [checks.as_floating("residual", residual)]
        super().__init__(x, normalized_shape, axis, explained, others, per_sample=per_sample)
        self.y_type = self.dtype if dtype is None else checks.as_result_type(dtype)
        self.options: dict[str, Any] = {
            "rms": rms,
            "offset": checks.as_offset(offset),
            "round_before_weight": bool(round_before_weight),
            "activation": checks.as_activation(activation),
            **self.valid(lengths, mask),
        }
        self.options["eps"] = self.checked_eps(eps)
        params = [
            (self.parameter(p.names[0], p.weight), self.parameter(p.names[1], p.bias))
            for p in pairs
        ]
        params = [(self.with_offset(w), b) for w, b in params]
        self.warm = True
        if residual is not None:
            sum_out = self.add_addends(adds, residual, sum_out, round_sum)
        outputs = [self.output(pair, w, b) for pair, (w, b) in zip(pairs, params, strict=True)]
        if given_sum is not None or any(pair.out is not None for pair in pairs):
            inputs = {"x": x, **adds, "mask": mask, "lengths": lengths}
            self.check_apart(inputs, pairs, outputs, None if given_sum is None else sum_out)
        mean, rstd = self.statistics() if return_stats else (None, None)
        x_rows = self.rows("x", self.source)
        self.kernel = partial(
            _core.norm_rows, len(self.lead), self.compute, x_rows, self.kernel_outputs(outputs),
            mean=None if rms else mean, rstd=rstd, warm=self.warm, **self.options,
        )  # fmt: skip
        self.result = self.gather(outputs, several, mean, rstd, rms)

    def checked_eps(self, eps: Any) -> float:
        if eps is None and self.options["rms"]:
            return MACHINE_EPS[self.compute]
        return checks.as_eps(eps)

    def with_offset(self, weight: np.ndarray | None) -> np.ndarray | None:
        """A weight for all rows gets its offset here, once, so that such calls can be plain."""
        if weight is None or weight.ndim > len(self.normalized) or not self.options["offset"]:
            return weight
        offset, self.options["offset"] = self.options["offset"], 0.0
        with np.errstate(all="ignore"):
            return weight + self.compute.type(offset)

    def add_addends(
        self, adds: dict[str, Any], residual: Any, sum_out: Any, round_sum: Any
    ) -> np.ndarray:
        """linear_bias, gate and residual, and where the sum goes, which is returned."""
        array = self.like_x("residual", residual)
        for name in ("linear_bias", "gate"):
            self.options[name] = self.parameter(name, adds.get(name))
        kind = checks.wider(self.dtype, array.dtype)
        self.total: np.ndarray = self.new_output(kind) if sum_out is None else sum_out
        total = self.total
        if sum_out is not None:
            total = as_output(sum_out, kind)
            checks.check_out("sum_out", total, self.source.shape, kind)
        self.options |= {
            "residual": self.rows("residual", array),
            "total": self.rows("sum_out", total, is_output=True),
            "round_sum": bool(round_sum),
        }
        return total

    def new_output(self, dtype: np.dtype) -> np.ndarray:
        """An array for one of the results; the call is warm where all of them are."""
        array, warm = self.new_result(dtype)
        self.warm = self.warm and warm
        return array

    def output(self, pair: Pair, weight: np.ndarray | None, bias: np.ndarray | None) -> Output:
        given = self.new_output(self.y_type) if pair.out is None else pair.out
        y = given
        if pair.out is not None:
            y = as_output(y, self.y_type)
            checks.check_out(pair.names[2], y, self.source.shape, self.y_type)
        return Output(weight, bias, y, self.scales(self.y_type), given)

    def check_apart(
        self,
        inputs: dict[str, Any],
        pairs: Sequence[Pair],
        outputs: Sequence[Output],
        sum_out: Any,
    ) -> None:
        """Results that were given places must not share memory with inputs or each other."""
        for pair in pairs:
            inputs |= {pair.names[0]: pair.weight, pair.names[1]: pair.bias}
        seen: dict[str, Any] = {}
        if sum_out is not None:
            checks.check_apart("sum_out", sum_out, inputs, ("x", "residual"))
            seen["sum_out"] = sum_out
        # With several results, one row of x is read for all of them.
        allowed = ("x",) if len(pairs) == 1 else ()
        for pair, output in zip(pairs, outputs, strict=True):
            if pair.out is not None:
                checks.check_apart(pair.names[2], output.y, inputs, allowed)
                checks.check_apart(pair.names[2], output.y, seen, ())
                seen[pair.names[2]] = output.y

    def kernel_outputs(self, outputs: Sequence[Output]) -> list[Any]:
        made = []
        for weight, bias, y, scale, _ in outputs:
            rows = self.rows("out", y, is_output=True)
            self.warm = self.warm and not self.outputs[-1].copied
            made.append((weight, bias, rows, scale))
        return made

    def gather(
        self, outputs: Sequence[Output], several: bool, mean: Any, rstd: Any, rms: bool
    ) -> Any:
        """What the caller gets."""
        first = outputs[0]
        parts: list[Any] = [tuple([o.given for o in outputs]) if several else first.given]
        if first.scale is not None:
            parts.append(tuple([o.scale for o in outputs]) if several else first.scale)
        if "total" in self.options:
            parts.append(self.total)
        if rstd is not None:
            parts += [rstd] if rms else [mean, rstd]
        return parts[0] if len(parts) == 1 else tuple(parts)


class NormBackwardCall(Call):
    """One backward call of a norm: dx, dweight, dbias (rms: without the last)."""

    def __init__(
        self,
        dy: Any,
        x: Any,
        normalized_shape: Any,
        axis: Any,
        mean: Any,
        rstd: Any,
        weight: Any,
        bias: Any,
        output_mask: Any,
        *,
        rms: bool = False,
        offset: Any = 0.0,
        from_output: Any = False,
        lengths: Any = None,
        mask: Any = None,
        names: tuple[str, str] = ("x", "weight"),
        per_sample: bool = False,
        explained: bool = False,
    ) -> None:
        super().__init__(x, normalized_shape, axis, explained, name=names[0], per_sample=per_sample)
        grad = self.like_x("dy", dy)
        w, b = self.parameter(names[1], weight), self.parameter("bias", bias)
        self.options: dict[str, Any] = {
            "rms": rms, "offset": checks.as_offset(offset), "from_output": bool(from_output),
            **self.valid(lengths, mask),
        }  # fmt: skip
        no_mean = rms or from_output
        m = None if no_mean else self.statistic("mean", mean)
        r = self.statistic("rstd", rstd)
        wanted = checks.as_mask(output_mask, "dx, dweight" if rms else "dx, dweight, dbias")
        want_dx, want_dweight, want_dbias = (*wanted, False)[:3]
        dx, self.warm = self.new_result(self.dtype) if want_dx else (None, False)
        shapes = [p.shape if p is not None else None for p in (w, b)]
        self.dweight = self.gradient(want_dweight, shapes[0] or shapes[1])
        self.dbias = self.gradient(want_dbias, shapes[1] or shapes[0])
        self.own = self._own_rows()
        if self.own:
            w, b = self.spread(w), self.spread(b)
        self.more: np.ndarray | None = None
        self.stats: list[Any] = [m, r]
        self.arrays: list[Any] = [
            self.rows("dy", grad),
            self.rows(self.name, self.source),
            None if dx is None else self.rows("dx", dx, is_output=True),
            w,
            b,
        ]
        self.result = (dx, self.dweight, self.dbias)[: 2 if rms else 3]

    def add_to_dx(self, name: str, more: Any) -> None:
        """A gradient that reaches x by another way, added after the norm's is rounded."""
        self.more = self.rows(name, self.like_x(name, more))

    def statistic(self, name: str, value: Any) -> np.ndarray:
        shape = self.source.shape
        kept = tuple([1 if d in self.axes else length for d, length in enumerate(shape)])
        return checks.as_statistic(name, value, self.lead, kept, self.compute)

    def gradient(self, wanted: bool, shape: tuple[int, ...] | None) -> np.ndarray | None:
        return np.zeros(shape or self.normalized, self.compute) if wanted else None

    def kernel(self, plan: bool = False) -> Any:
        """The kernel, once for the rows of each pair of parameters."""
        with np.errstate(all="ignore"):
            for index in _each(self.own) if self.own else [()]:
                said = self._part(index, plan)
                if plan:
                    return said | {"parts": math.prod(self.own)}
            dx = self.arrays[2]
            if self.more is not None and dx is not None:
                self._add(dx, interop.widened(self.more))
        return None

    def _add(self, dx: np.ndarray, more: np.ndarray) -> None:
        if dx.dtype == interop.BITS:
            total = np.add(interop.widened(dx), more, dtype=np.float32, casting="same_kind")
            dx[...] = interop.to_bits(total)
        else:
            np.add(dx, more, out=dx, dtype=self.compute, casting="same_kind")

    def _part(self, index: tuple[Any, ...], plan: bool) -> Any:
        """The kernel on the rows at `index`."""
        own: dict[str, Any] = {
            name: np.ascontiguousarray(self.options[name][index])
            for name in ("lengths", "mask") if index and name in self.options
        }  # fmt: skip
        arrays, stats = self.arrays, self.stats
        if index:
            arrays = [None if a is None else a[index] for a in arrays]
            stats = [None if s is None else np.ascontiguousarray(s[index]) for s in stats]
        places = [self._sums_of(total, index) for total in (self.dweight, self.dbias)]
        sums = [None if place is None else np.zeros_like(place) for place in places]
        said: Any = _core.norm_backward_rows(
            arrays[1].ndim - len(self.normalized), self.compute, *arrays, *stats, *sums,
            warm=self.warm, plan=plan, **(self.options | own),
        )  # fmt: skip
        for place, part in zip(places, sums, strict=True):
            if place is not None and not plan:
                place += part  # which several parts share where the other parameter has more axes
        return said

    def _own_rows(self) -> tuple[int, ...]:
        """Along which leading axes dweight or dbias differ, by length; (): along none."""
        own = [1] * len(self.lead)
        for total in (self.dweight, self.dbias):
            if total is not None:
                before = total.shape[: total.ndim - len(self.normalized)]
                for d, length in enumerate(before, len(self.lead) - len(before)):
                    own[d] = max(own[d], length)
        return tuple(own) if max(own, default=1) > 1 else ()

    def _sums_of(self, total: np.ndarray | None, index: tuple[Any, ...]) -> np.ndarray | None:
        """The place in dweight or dbias for the rows at `index`."""
        if total is None or not index:
            return total
        before = total.ndim - len(self.normalized)
        steps = index[len(self.lead) - before :]
        return total[tuple(
            i if total.shape[d] > 1 and not isinstance(i, slice) else 0
            for d, i in enumerate(steps)
        )]  # fmt: skip


def _each(own: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Indices of leading axes: one number where a parameter has several, else all."""
    for numbers in np.ndindex(*own):
        yield tuple(
            slice(None) if length == 1 else i for i, length in zip(numbers, own, strict=True)
        )


class MomentsCall(Call):
    """One call of moments."""

    def __init__(self, x: Any, axis: Any = None, explained: bool = False) -> None:
        super().__init__(x, None, axis, explained)
        self.result = self.statistics()
        self.kernel = partial(
            _core.moments_rows, len(self.lead), self.compute, self.rows("x", self.source),
            *self.result,
        )  # fmt: skip


class SegmentsCall(Call):
    """What calls on packed rows share: x of shape (total, *features), one row a segment."""

    def __init__(self, x: Any, offsets: Any, explained: bool) -> None:
        ndim = checks.as_array("x", x).ndim
        super().__init__(x, None, tuple(range(ndim)), explained)
        self.features = self.source.shape[1:]
        self.offsets = checks.as_offsets(offsets, self.source.shape[0])
        self.lead = (self.offsets.size - 1,)
        self.starts = self.offsets * math.prod(self.features)
        self.longest = int(np.diff(self.starts).max(initial=0))

    def packed(self, name: str, array: np.ndarray) -> np.ndarray:
        """The array as one run of memory."""
        if not self.is_copied(name, array):
            return array
        dtype = array.dtype.newbyteorder("=")
        if self.explained:
            return stand_in(array.shape, dtype)
        return np.ascontiguousarray(array, dtype=dtype)

    def is_copied(self, name: str, array: np.ndarray) -> bool:
        """Whether this is more than one run of elements that the kernels can load; notes why."""
        why = _why_copied(array)
        if not why and not array.flags.c_contiguous:
            why = "it is not contiguous"
        if why:
            self.copies.append(f"{name} is copied: {why}")
        return bool(why)

    def feature_parameter(self, name: str, value: Any) -> np.ndarray | None:
        array = checks.as_parameter(name, value, self.features, self.compute)
        return None if array is None else array.reshape(-1)

    def statistic(self, name: str, value: Any) -> np.ndarray:
        return checks.as_statistic(name, value, self.lead, self.lead, self.compute)


class SegmentNormCall(SegmentsCall):
    """One forward call on packed rows."""

    def __init__(
        self, x: Any, offsets: Any, weight: Any, bias: Any, eps: Any, out: Any, dtype: Any,
        return_stats: Any, activation: Any, *, rms: bool = False, offset: Any = 0.0,
        explained: bool = False,
    ) -> None:  # fmt: skip
        given = out
        if interop.asks_for_bits(x, dtype):
            x, dtype = interop.as_bits(x), None
            weight, bias = interop.as_bits(weight), interop.as_bits(bias)
        super().__init__(x, offsets, explained)
        w, b = self.feature_parameter("weight", weight), self.feature_parameter("bias", bias)
        y_type = self.dtype if dtype is None else checks.as_result_type(dtype)
        machine = MACHINE_EPS[self.compute] if rms and eps is None else checks.as_eps(eps)
        if out is not None:
            out = as_output(out, y_type)
            checks.check_out("out", out, self.source.shape, y_type)
            inputs = {"x": x, "weight": weight, "bias": bias, "offsets": offsets}
            checks.check_apart("out", out, inputs)
        packed_x = self.packed("x", self.source)
        direct = out is not None and not self.is_copied("out", out)
        self.y = out if direct else self.new_result(y_type)[0]
        self.out = self.y if out is None else out
        scale = self.scales(y_type)
        mean, rstd = self.statistics() if return_stats else (None, None)
        self.kernel = partial(
            _core.norm_segments, self.compute, packed_x, self.starts,
            self.longest, w, b, self.y, scale, machine, rms=rms,
            offset=checks.as_offset(offset), activation=checks.as_activation(activation),
            mean=None if rms else mean, rstd=rstd,
        )  # fmt: skip
        parts = [self.out if given is None else given, scale, None if rms else mean, rstd]
        kept = [part for part in parts if part is not None]
        self.result = kept[0] if len(kept) == 1 else tuple(kept)

    def run(self) -> Any:
        super().run()
        if self.out is not self.y:
            np.copyto(self.out, self.y)
        return self.result


class SegmentNormBackwardCall(SegmentsCall):
    """One backward call on packed rows."""

    def __init__(
        self, dy: Any, x: Any, offsets: Any, mean: Any, rstd: Any, weight: Any, bias: Any,
        output_mask: Any, *, rms: bool = False, offset: Any = 0.0, explained: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(x, offsets, explained)
        grad = self.like_x("dy", dy)
        w = self.feature_parameter("weight", weight)
        self.feature_parameter("bias", bias)
        m = None if rms else self.statistic("mean", mean)
        r = self.statistic("rstd", rstd)
        wanted = checks.as_mask(output_mask, "dx, dweight" if rms else "dx, dweight, dbias")
        want_dx, want_dweight, want_dbias = (*wanted, False)[:3]
        dx = self.new_result(self.dtype)[0] if want_dx else None
        dweight, dbias = (
            np.zeros(self.features, self.compute) if want else None
            for want in (want_dweight, want_dbias)
        )
        self.kernel = partial(
            _core.norm_segments_backward, self.compute, self.packed("dy", grad),
            self.packed("x", self.source), dx, self.starts, self.longest,
            w, m, r, dweight, dbias, math.prod(self.features), rms=rms,
            offset=checks.as_offset(offset),
        )  # fmt: skip
        self.result = (dx, dweight, dbias)[: 2 if rms else 3]


# ---- the ops ------------------------------------------------------------------------------------
# Each takes what the public function of its name takes, in that order.


def _layer_norm(
    x: Any, normalized_shape: Any, weight: Any, bias: Any, eps: Any, axis: Any, out: Any,
    dtype: Any, return_stats: Any, activation: Any, lengths: Any, mask: Any,
    explained: bool = False,
) -> Call:  # fmt: skip
    return NormCall(
        x, normalized_shape, axis, [Pair(weight, bias, out)], eps, dtype=dtype,
        return_stats=return_stats, activation=activation, lengths=lengths, mask=mask,
        explained=explained,
    )  # fmt: skip


def _rms_norm(
    x: Any, normalized_shape: Any, weight: Any, eps: Any, axis: Any, out: Any, dtype: Any,
    offset: Any, round_before_weight: Any, return_stats: Any, activation: Any, lengths: Any,
    mask: Any, explained: bool = False,
) -> Call:  # fmt: skip
    return NormCall(
        x, normalized_shape, axis, [Pair(weight, None, out)], eps, rms=True, dtype=dtype,
        offset=offset, round_before_weight=round_before_weight, return_stats=return_stats,
        activation=activation, lengths=lengths, mask=mask, explained=explained,
    )  # fmt: skip


def _add_layer_norm(
    x: Any, residual: Any, normalized_shape: Any, weight: Any, bias: Any, eps: Any, axis: Any,
    out: Any, sum_out: Any, dtype: Any, linear_bias: Any, round_sum: Any, return_stats: Any,
    activation: Any, explained: bool = False,
) -> Call:  # fmt: skip
    return NormCall(
        x, normalized_shape, axis, [Pair(weight, bias, out)], eps, dtype=dtype,
        return_stats=return_stats, activation=activation, sum_out=sum_out, round_sum=round_sum,
        addends={"residual": _given("residual", residual), "linear_bias": linear_bias},
        explained=explained,
    )  # fmt: skip


def _add_rms_norm(
    x: Any, residual: Any, normalized_shape: Any, weight: Any, eps: Any, axis: Any, out: Any,
    sum_out: Any, dtype: Any, linear_bias: Any, offset: Any, round_before_weight: Any,
    round_sum: Any, return_stats: Any, activation: Any, explained: bool = False,
) -> Call:  # fmt: skip
    return NormCall(
        x, normalized_shape, axis, [Pair(weight, None, out)], eps, rms=True, dtype=dtype,
        offset=offset, round_before_weight=round_before_weight, return_stats=return_stats,
        activation=activation, sum_out=sum_out, round_sum=round_sum,
        addends={"residual": _given("residual", residual), "linear_bias": linear_bias},
        explained=explained,
    )  # fmt: skip


def _given(name: str, value: Any, wanted: str = "an array of x's shape") -> Any:
    if value is None:
        raise TypeError(f"{name}: got None, wanted {wanted}")
    return value


def _adaptive_layer_norm(
    x: Any, scale: Any, shift: Any, normalized_shape: Any, eps: Any, gate: Any, residual: Any,
    out: Any, sum_out: Any, dtype: Any, round_sum: Any, return_stats: Any, activation: Any,
    explained: bool = False,
) -> Call:  # fmt: skip
    if residual is None and (gate is not None or sum_out is not None):
        name = "gate" if gate is not None else "sum_out"
        raise TypeError(f"{name}: got an array without a residual, wanted both or neither")
    pair = Pair(_given("scale", scale, "an array"), shift, out, ("scale", "shift", "out"))
    return NormCall(
        x, normalized_shape, None, [pair], eps, offset=1.0, dtype=dtype,
        return_stats=return_stats, activation=activation, sum_out=sum_out, round_sum=round_sum,
        addends=None if residual is None else {"residual": residual, "gate": gate},
        per_sample=True, explained=explained,
    )  # fmt: skip


def _parallel_layer_norm(
    x: Any, normalized_shape: Any, weights: Any, biases: Any, eps: Any, out: Any, dtype: Any,
    return_stats: Any, activation: Any, explained: bool = False,
) -> Call:  # fmt: skip
    lists = {"weights": weights, "biases": biases, "out": out}
    count = len(_sequence("weights", weights))
    if not count:
        raise ValueError("weights: got an empty sequence, wanted at least one weight (or None)")
    filled = {k: [None] * count if v is None else _sequence(k, v) for k, v in lists.items()}
    for name, items in filled.items():
        if len(items) != count:
            raise ValueError(f"{name}: got {len(items)} of them, wanted {count}, one a weight")
    pairs = [
        Pair(weight, bias, result, (f"weights[{i}]", f"biases[{i}]", f"out[{i}]"))
        for i, (weight, bias, result) in enumerate(zip(*filled.values(), strict=True))
    ]
    return NormCall(
        x, normalized_shape, None, pairs, eps, dtype=dtype, return_stats=return_stats,
        activation=activation, several=True, explained=explained,
    )  # fmt: skip


def _sequence(name: str, value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    raise TypeError(f"{name}: got {type(value).__name__}, wanted a list or tuple")


def _layer_norm_backward(
    dy: Any, x: Any, normalized_shape: Any, mean: Any, rstd: Any, weight: Any, bias: Any,
    axis: Any, output_mask: Any, from_output: Any, lengths: Any, mask: Any,
    explained: bool = False,
) -> Call:  # fmt: skip
    return NormBackwardCall(
        dy, x, normalized_shape, axis, mean, rstd, weight, bias, output_mask,
        from_output=from_output, lengths=lengths, mask=mask, explained=explained,
    )  # fmt: skip


def _rms_norm_backward(
    dy: Any, x: Any, normalized_shape: Any, rstd: Any, weight: Any, axis: Any, offset: Any,
    output_mask: Any, from_output: Any, lengths: Any, mask: Any, explained: bool = False,
) -> Call:  # fmt: skip
    return NormBackwardCall(
        dy, x, normalized_shape, axis, None, rstd, weight, None, output_mask, rms=True,
        offset=offset, from_output=from_output, lengths=lengths, mask=mask, explained=explained,
    )  # fmt: skip


def _adaptive_layer_norm_backward(
    dy: Any, x: Any, scale: Any, normalized_shape: Any, mean: Any, rstd: Any, output_mask: Any,
    explained: bool = False,
) -> Call:  # fmt: skip
    scale = _given("scale", scale, "an array")
    call = NormBackwardCall(
        dy, x, normalized_shape, None, mean, rstd, scale, None, output_mask, offset=1.0,
        names=("x", "scale"), per_sample=True, explained=explained,
    )  # fmt: skip
    shape = np.shape(scale)
    dx, dscale, dshift = call.result
    call.result = (dx, *(None if d is None else d.reshape(shape) for d in (dscale, dshift)))
    return call


def _segment_layer_norm(
    x: Any, offsets: Any, weight: Any, bias: Any, eps: Any, out: Any, dtype: Any,
    return_stats: Any, activation: Any, explained: bool = False,
) -> Call:  # fmt: skip
    return SegmentNormCall(
        x, offsets, weight, bias, eps, out, dtype, return_stats, activation, explained=explained
    )


def _segment_rms_norm(
    x: Any, offsets: Any, weight: Any, eps: Any, offset: Any, out: Any, dtype: Any,
    return_stats: Any, activation: Any, explained: bool = False,
) -> Call:  # fmt: skip
    return SegmentNormCall(
        x, offsets, weight, None, eps, out, dtype, return_stats, activation, rms=True,
        offset=offset, explained=explained,
    )  # fmt: skip


def _segment_layer_norm_backward(
    dy: Any, x: Any, offsets: Any, mean: Any, rstd: Any, weight: Any, bias: Any, output_mask: Any,
    explained: bool = False,
) -> Call:  # fmt: skip
    return SegmentNormBackwardCall(
        dy, x, offsets, mean, rstd, weight, bias, output_mask, explained=explained
    )


def _segment_rms_norm_backward(
    dy: Any, x: Any, offsets: Any, rstd: Any, weight: Any, offset: Any, output_mask: Any,
    explained: bool = False,
) -> Call:  # fmt: skip
    return SegmentNormBackwardCall(
        dy, x, offsets, None, rstd, weight, None, output_mask, rms=True, offset=offset,
        explained=explained,
    )  # fmt: skip


def _moments(x: Any, axis: Any, explained: bool = False) -> Call:
    return MomentsCall(x, axis, explained)


def _add_backward(made: Call, dsum: Any) -> Call:
    """dx of the sum's parts: the gradient through the norm and the one that came to the sum."""
    if dsum is None:
        return made
    assert isinstance(made, NormBackwardCall)
    made.add_to_dx("dsum", dsum)
    return made


def _add_layer_norm_backward(
    dy: Any, dsum: Any, sum: Any, normalized_shape: Any, mean: Any, rstd: Any, weight: Any,
    bias: Any, axis: Any, output_mask: Any, explained: bool = False,
) -> Call:  # fmt: skip
    made = NormBackwardCall(
        dy, sum, normalized_shape, axis, mean, rstd, weight, bias, output_mask,
        names=("sum", "weight"), explained=explained,
    )  # fmt: skip
    return _add_backward(made, dsum)


def _add_rms_norm_backward(
    dy: Any, dsum: Any, sum: Any, normalized_shape: Any, rstd: Any, weight: Any, axis: Any,
    offset: Any, output_mask: Any, explained: bool = False,
) -> Call:  # fmt: skip
    made = NormBackwardCall(
        dy, sum, normalized_shape, axis, None, rstd, weight, None, output_mask, rms=True,
        offset=offset, names=("sum", "weight"), explained=explained,
    )  # fmt: skip
    return _add_backward(made, dsum)


CALLS: dict[str, Callable[..., Call]] = {
    call.__name__.removeprefix("_"): call
    for call in (
        _layer_norm, _layer_norm_backward, _rms_norm, _rms_norm_backward, _add_layer_norm,
        _add_layer_norm_backward, _add_rms_norm, _add_rms_norm_backward, _adaptive_layer_norm,
        _adaptive_layer_norm_backward, _parallel_layer_norm, _segment_layer_norm,
        _segment_layer_norm_backward, _segment_rms_norm, _segment_rms_norm_backward, _moments,
    )
}  # fmt: skip


@functools.cache
def _on_cuda(name: str) -> Callable[..., Any]:
    """The op on arrays in CUDA memory."""
    return importlib.import_module(".cuda", __package__).op(name)


def _handler(call: Callable[..., Call]) -> Callable[..., Any]:
    """The op itself, its arguments by position; they need not be ndarrays."""
    names = tuple(inspect.signature(call).parameters)[:-1]
    name = call.__name__.removeprefix("_")
    main = "x" if "x" in names else "sum"
    at = names.index(main)

    def run(*converted: Any) -> Any:
        return call(*converted).run()

    def handle(*args: Any) -> Any:
        if interop.is_on_cuda(args[at]):
            return _on_cuda(name)(*args)
        return interop.run(run, names, *args, main=main)

    return handle


handlers = {name: _handler(call) for name, call in CALLS.items()}
for _name in _core.STRAIGHT:
    _core.register(_name, handlers[_name])


# ---- explain ------------------------------------------------------------------------------------


class Explanation(NamedTuple):
    """What a call would do, and why; ``str()`` of it is meant to be read."""

    op: str
    backend: str
    isa: str
    threads: int
    regime: str
    stream: bool
    dtype: str
    rows: int
    cols: int
    copies: tuple[str, ...]
    reasons: tuple[str, ...]

    def asdict(self) -> dict[str, Any]:
        """The fields as a dict."""
        return self._asdict()

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        head = (
            f"{self.op}: {self.rows} rows of {self.cols} {self.dtype} on {self.backend}, "
            f"{self.isa}, {threads}, regime {self.regime}"
        )
        return "\n".join([head, *(f"  - {line}" for line in (*self.copies, *self.reasons))])


# As parallel.c names them and op_layer_norm.h and op_layer_norm_backward.h have them.
_REGIMES = {
    "narrow": "narrow: rows of at most four vectors go eight at a time, in registers",
    "group": "group: rows go two or four at a time and share what is loaded of the parameters",
    "row": "row: rows go one at a time",
    "columns": "columns: rows lie side by side, and go as many at a time as a vector holds",
    "stream": "stream: the output is large and its pages exist, so it is written past the cache",
}


def explain(op: Any, *args: Any, **kwargs: Any) -> Explanation:
    """What ``op(*args, **kwargs)`` would do on this machine; nothing is computed.

    Parameters
    ----------
    op : function or str
        One of fastnorm's ops, or its name: ``fastnorm.explain("layer_norm", x)``.
    *args, **kwargs
        The arguments of the call.

    Returns
    -------
    Explanation
        Backend, instruction set, threads, regime, each copy of an array of x's size that would be
        made, and the reasons. What is small is converted without a word. For arrays in CUDA memory:
        the device, its architecture, threads of a block, and the kernel.

    Raises
    ------
    ValueError
        If `op` is none of fastnorm's ops. Else what the call itself would raise.
    """
    name = _name_of(op)
    bound = inspect.signature(_public(name)).bind(*args, **kwargs)
    bound.apply_defaults()
    if interop.is_on_cuda(bound.arguments["x" if "x" in bound.arguments else "sum"]):
        cuda = importlib.import_module(".cuda", __package__)
        return Explanation(**cuda.explain(name, bound.arguments))
    call = _checked(name, bound.arguments)
    plan = call.plan()
    return Explanation(
        op=name,
        backend="cpu",
        isa=_core.isa_active(),
        threads=plan["threads"],
        regime=plan["regime"],
        stream=plan["stream"],
        dtype="bfloat16" if interop.is_bfloat16(call.dtype) else call.dtype.name,
        rows=plan["rows"] * plan.get("parts", 1),
        cols=plan["cols"],
        copies=tuple(call.copies),
        reasons=tuple(_reasons(plan)),
    )


def _name_of(op: Any) -> str:
    name = op if isinstance(op, str) else getattr(op, "__name__", None)
    if name in CALLS and (op == name or op is _public(name)):
        return name
    raise ValueError(f"op: got {op!r}, wanted one of: {', '.join(CALLS)}")


def _public(name: str) -> Any:
    """The function that users call."""
    return getattr(importlib.import_module(__package__), name)


def _checked(name: str, arguments: dict[str, Any]) -> Call:
    """The call that the op would make of these arguments, explained."""
    converted = {key: interop.convert(key, value) for key, value in arguments.items()}
    return CALLS[name](**converted, explained=True)


def _reasons(plan: dict[str, Any]) -> Iterator[str]:
    parts = plan.get("parts", 1)
    if parts > 1:
        yield f"{parts} parts of {plan['rows']} rows: one after another, as their parameters differ"
    yield _REGIMES[plan["regime"]]
    yield _why_threads(plan)


def _why_threads(plan: dict[str, Any]) -> str:
    if plan["threads"] > 1:
        return f"{plan['threads']} threads: the call moves {plan['bytes']:,} bytes"
    if _core.threads()["max"] == 1:
        return "1 thread: no more are allowed here (see fastnorm.show_config())"
    return f"1 thread: {plan['bytes']:,} bytes or {plan['rows']} rows do not pay for a second"
