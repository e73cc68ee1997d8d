"""Calls of batch, group and instance norm: checked, laid out, and run.

An array is seen as (N, C, S), planes of S contiguous elements that the kernels of channels.c take
where they lie (channels first), or, where the channels are the last axis, as rows of channels (N,
M, C). What lies otherwise is copied. A *unit* is what has statistics of its own: a channel of all
samples, a group of a sample's channels, a plane. Units that leave the range of the type that is
computed in are refused by the kernels, and put right here, in double precision and scaled by a
power of two.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import numpy as np
from numpy.exceptions import AxisError

from . import _core, checks, interop
from .call import as_output, stand_in, why_copied

#: Whether momentum is the share of the new statistics, and whether they take the unbiased variance.
DIALECTS = {
    "torch": (True, True),
    "keras": (False, False),
    "flax": (False, False),
    "onnx": (False, False),
}

#: Padded variances below these may have lost digits to underflow of the squares (op_stats.h).
LEAST_VARIANCE = {checks.FLOAT32: 2.0**-80, checks.FLOAT64: 2.0**-600}
#: As channels.c: roots whose squares, times a gradient, stay in range, and sums of products that
#: do.
LARGEST_RSTD = {checks.FLOAT32: 2.0**41, checks.FLOAT64: 2.0**301}
LEAST_SUM = {checks.FLOAT32: 2.0**-90, checks.FLOAT64: 2.0**-900}


class Layout(NamedTuple):
    """Units as channels.c counts them, in elements."""

    units: int
    inner: int
    outer_stride: int
    inner_stride: int
    rows: int
    row_stride: int
    cols: int
    plane: int
    kinds: int

    def unit(self, array: np.ndarray, u: int) -> np.ndarray:
        """Unit u of a contiguous array, as (rows, planes, elements): a view."""
        first = u // self.inner * self.outer_stride + u % self.inner * self.inner_stride
        size = array.itemsize
        return np.lib.stride_tricks.as_strided(
            array.reshape(-1)[first:],
            (self.rows, self.cols // self.plane, self.plane),
            (self.row_stride * size, self.plane * size, size),
        )


# ---- units out of range --------------------------------------------------------------------------


class Normalised(NamedTuple):
    """A unit in double precision, and its statistics."""

    y: np.ndarray
    mean: float
    variance: float
    rstd: float


def _scaled(x: np.ndarray) -> tuple[np.ndarray, int] | None:
    """x times the power of two that brings max|x| into [0.5, 1), and its exponent; None where x
    holds NaN or infinity."""
    wide = interop.widened(x).astype(np.float64)
    largest = float(np.max(np.abs(wide)))
    if not math.isfinite(largest):
        return None
    exponent = math.frexp(largest)[1]
    return np.ldexp(wide, -exponent), exponent


def _ldexp(value: float, exponent: int) -> float:
    with np.errstate(all="ignore"):
        return float(np.ldexp(np.float64(value), exponent))


def normalise(x: np.ndarray, weight: Any, bias: Any, eps: float) -> Normalised:
    """All of x as one unit; weight and bias broadcast against it."""
    scaled = _scaled(x)
    if scaled is None:
        return Normalised(np.full(x.shape, np.nan), math.nan, math.nan, math.nan)
    s, exponent = scaled
    pivot = s.mean()
    d = s - pivot
    c = d.mean()
    d -= c
    variance = float(np.mean(d * d))
    with np.errstate(all="ignore"):
        if variance == 0:
            root, rstd = 0.0, float(1 / np.sqrt(np.float64(eps)))
        else:
            padding = _ldexp(eps, -2 * exponent)
            root = float(1 / np.sqrt(np.float64(variance + padding)))
            if math.isinf(padding):  # next to which the variance is nothing
                root = _ldexp(float(1 / np.sqrt(np.float64(eps))), exponent)
            rstd = _ldexp(root, -exponent)
        y = d * root * weight + bias
    return Normalised(y, _ldexp(pivot + c, exponent), _ldexp(variance, 2 * exponent), rstd)


class Gradients(NamedTuple):
    """dx of a unit in double precision, and the sums of dy*xh and dy over each plane."""

    dx: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray


def gradients(
    dy: np.ndarray, x: np.ndarray, weight: Any, mean: float, rstd: float, given: bool,
    axes: tuple[int, ...],
) -> Gradients:  # fmt: skip
    """Of all of x as one unit; `axes`: those of a plane. given: mean and rstd do not depend on
    x."""
    scaled, scaled_dy = _scaled(x), _scaled(dy)
    if scaled is None or scaled_dy is None or math.isnan(rstd) or math.isnan(mean):
        bias = interop.widened(dy).astype(np.float64).sum(axes)
        return Gradients(np.full(x.shape, np.nan), np.full(bias.shape, np.nan), bias)
    (s, up), (g, up_dy) = scaled, scaled_dy
    with np.errstate(all="ignore"):
        d = s - _ldexp(mean, -up)
        if not given:
            d -= d.mean()
        root = _ldexp(rstd, up)
        if not given and not (
            0 < root < math.inf
        ):  # lost in a narrower type, or the unit is constant
            variance = np.mean(d * d)
            root = float(1 / np.sqrt(variance)) if variance else 0.0
        xh, gw = d * root, g * weight
        dx = gw * root if given else root * (gw - gw.mean() - xh * np.mean(gw * xh))
        return Gradients(
            np.ldexp(dx, up_dy - up),
            np.ldexp(np.sum(g * xh, axes), up_dy),
            np.ldexp(np.sum(g, axes), up_dy),
        )


def _store(into: np.ndarray, values: np.ndarray) -> None:
    """Doubles, rounded once to the type of `into`."""
    with np.errstate(all="ignore"):
        if interop.is_bits(into.dtype):
            into[...] = interop.to_bits(values)
        else:
            into[...] = values


def put_right(
    layout: tuple[int, ...], x: np.ndarray, y: np.ndarray, weight: Any, bias: Any,
    statistics: np.ndarray, refused: np.ndarray, eps: float, activation: str | None = None,
) -> None:  # fmt: skip
    """Normalise the units that a kernel refused; statistics: (3, units): mean, variance, rstd."""
    units = Layout(*layout)
    planes = units.cols // units.plane
    for u in np.flatnonzero(refused):
        kind = slice(u % units.kinds * planes, u % units.kinds * planes + planes)
        w, b = (
            otherwise if p is None else p.reshape(-1)[kind].astype(np.float64)[:, None]
            for p, otherwise in ((weight, 1.0), (bias, 0.0))
        )
        done = normalise(units.unit(x, int(u)), w, b, eps)
        _store(units.unit(y, int(u)), _activated(done.y, activation))
        statistics[:, u] = done.mean, done.variance, done.rstd


def _activated(y: np.ndarray, activation: str | None) -> np.ndarray:
    if activation is None:
        return y
    from .reference_rows import activation_of  # which not every process needs

    with np.errstate(all="ignore"):
        return np.asarray(activation_of(activation)(y), np.float64)


_core.register_careful(put_right)


# ---- checks --------------------------------------------------------------------------------------


def as_channel_axis(value: Any, ndim: int) -> int:
    """The axis of the channels, not negative."""
    try:
        axis = operator.index(value)
    except TypeError:
        raise TypeError(f"channel_axis: got {value!r}, wanted an int") from None
    if not -ndim <= axis < ndim:
        raise AxisError(axis, ndim, "channel_axis")
    if axis % ndim == 0:
        raise ValueError(f"channel_axis: got {value!r}, the axis of the samples, wanted another")
    return axis % ndim


def as_groups(value: Any, channels: int) -> int:
    groups = checks.as_count("num_groups", value, 1, "an int")
    if channels % groups:
        raise ValueError(
            f"num_groups: got {groups} for {channels} channels, wanted a divisor of their number"
        )
    return groups


def as_dialect(value: Any) -> str:
    if isinstance(value, str) and value in DIALECTS:
        return value
    raise ValueError(f"dialect: got {value!r}, wanted one of: {', '.join(map(repr, DIALECTS))}")


def as_momentum(value: Any) -> float:
    """Any finite number."""
    try:
        momentum = float(operator.pos(value))
    except (TypeError, ValueError):
        raise TypeError(f"momentum: got {value!r}, wanted a number") from None
    except OverflowError:
        momentum = math.inf
    if not math.isfinite(momentum):
        raise ValueError(f"momentum: got {value!r}, wanted a finite number")
    return momentum


def as_running(name: str, value: Any, channels: int, written: bool) -> np.ndarray | None:
    """Running statistics: an array of the channels, which is written to in training."""
    if value is None:
        return None
    if not isinstance(value, np.ndarray) or checks.is_masked(value):
        if written:
            raise TypeError(f"{name}: got {type(value).__name__}, wanted an ndarray to update")
        value = checks.as_array(name, value)
    if not checks.is_storage(value.dtype):
        if written:
            raise TypeError(f"{name}: got dtype {value.dtype}, wanted a floating type")
        value = checks.as_floating(name, value)
    if value.shape != (channels,):
        raise ValueError(f"{name}: got shape {value.shape}, wanted {(channels,)}")
    if written and not value.flags.writeable:
        raise ValueError(f"{name}: got a read-only array, wanted a writeable one: it is updated")
    return value


class Running(NamedTuple):
    """Running statistics, and how they take up new ones."""

    mean: np.ndarray | None
    var: np.ndarray | None
    momentum: float
    dialect: str

    def check_apart(self, others: dict[str, Any]) -> None:
        """What is updated shares no memory with anything else that is written."""
        for name, array in (("running_mean", self.mean), ("running_var", self.var)):
            if array is not None:
                checks.check_apart(name, array, others, ())
        if self.mean is not None and self.var is not None:
            checks.check_apart("running_var", self.var, {"running_mean": self.mean}, ())

    def update(self, mean: np.ndarray, variance: np.ndarray, count: int) -> None:
        """From the mean and the biased variance of `count` elements a channel."""
        of_new, unbiased = DIALECTS[self.dialect]
        taken = self.momentum if of_new else 1 - self.momentum
        kept = 1 - self.momentum if of_new else self.momentum
        if unbiased and count > 1:
            variance = variance * (count / (count - 1))
        if self.mean is not None:
            _core.update_running(self.mean, np.ascontiguousarray(mean), kept, taken)
        if self.var is not None:
            _core.update_running(self.var, np.ascontiguousarray(variance), kept, taken)


def rstd_of(variance: np.ndarray, eps: float) -> np.ndarray:
    """1/sqrt(variance + eps) in double precision."""
    with np.errstate(all="ignore"):
        return np.asarray(1.0 / np.sqrt(interop.widened(variance).astype(np.float64) + eps))


# ---- a call --------------------------------------------------------------------------------------


class ChannelCall:
    """What the calls share: x as the kernels see it. `over_samples`: batch norm, whose units take
    in all axes but the channels'."""

    result: Any

    def __init__(self, x: Any, channel_axis: Any, over_samples: bool, explained: bool) -> None:
        self.explained = explained
        self.copies: list[str] = []
        self.source = self.floating("x", x)
        shape = self.source.shape
        if self.source.ndim < 2:
            raise ValueError(
                f"x: got {self.source.ndim} dimensions, wanted at least 2: samples and channels"
            )
        self.axis = as_channel_axis(channel_axis, self.source.ndim)
        self.samples, self.channels = shape[0], shape[self.axis]
        before, after = math.prod(shape[1 : self.axis]), math.prod(shape[self.axis + 1 :])
        if over_samples:
            self.samples, before = self.samples * before, 1
        self.size = before * after
        self.is_last = after == 1
        self.moves = before > 1 and after > 1
        self.over_samples = over_samples
        self.dtype = self.source.dtype.newbyteorder("=")
        self.compute = checks.compute_type(self.dtype)

    def floating(self, name: str, value: Any) -> np.ndarray:
        array = checks.as_floating(name, value)
        if array.dtype.kind == "V" and not interop.is_bits(array.dtype):
            _core.set_bfloat16(array.dtype)
        if array is not value and np.asarray(value).dtype.kind in "biu":
            self.copies.append(f"{name} is copied: integers are converted to float64")
        return array

    def like_x(self, name: str, value: Any) -> np.ndarray:
        array = self.floating(name, value)
        if array.shape != self.source.shape:
            raise ValueError(
                f"{name}: got shape {array.shape}, wanted {self.source.shape}, the shape of x"
            )
        return array

    def parameter(self, name: str, value: Any, per_sample: bool = False) -> np.ndarray | None:
        """weight or bias: (C,), or where allowed (N, C)."""
        array = checks.as_real(name, value)
        if array is None:
            return None
        wanted = (self.channels,)
        if array.shape == wanted or (per_sample and array.shape == (self.samples, *wanted)):
            return checks.as_plain(array, self.compute)
        also = f" or {(self.samples, *wanted)}" if per_sample else ""
        raise ValueError(f"{name}: got shape {array.shape}, wanted {wanted}{also}")

    # ---- arrays ----------------------------------------------------------------------------------

    def why_copied(self, array: np.ndarray) -> str:
        why = why_copied(array)
        if not why and not array.flags.c_contiguous:
            why = "it is not contiguous"
        if not why and self.moves:
            why = "axes lie before and after its channels"
        return why

    def laid_out(self, name: str, array: np.ndarray, fill: bool = True) -> np.ndarray:
        """The array as it is, or contiguous, native, its channels first where axes lie around
        them."""
        why = self.why_copied(array)
        if not why:
            return array
        self.copies.append(f"{name} is copied: {why}")
        native = array.dtype.newbyteorder("=")
        moved = np.moveaxis(array, self.axis, 1) if self.moves else array
        if self.explained:
            return stand_in(moved.shape, native)
        made = np.empty(moved.shape, native)
        if fill:
            np.copyto(made, moved)
        return made

    def write_back(self, made: np.ndarray, out: np.ndarray) -> None:
        if made is not out:
            np.copyto(out, np.moveaxis(made, 1, self.axis) if self.moves else made)

    def new_result(self, dtype: np.dtype) -> tuple[np.ndarray, bool]:
        if self.explained:
            nbytes = self.source.size * dtype.itemsize
            return stand_in(self.source.shape, dtype), _core.would_be_warm(nbytes)
        return _core.new_result(self.source.shape, dtype)

    # ---- where units lie -------------------------------------------------------------------------

    def layout(self, groups: int, per_sample: bool, given: bool) -> Layout:
        """Of planes. given: statistics are each channel's, so planes may go in the order they lie
        in."""
        channels, size = self.channels, self.size
        if self.over_samples and not given:
            return Layout(channels, channels, 0, size, self.samples, channels * size, size, size,
                          channels)  # fmt: skip
        units, cols = self.samples * groups, channels // groups * size
        return Layout(units, units, 0, cols, 1, 0, cols, size, units if per_sample else groups)

    @property
    def units_shape(self) -> tuple[int, int]:
        """How many lots of statistics there are: (1, C), (N, C)."""
        return (1 if self.over_samples else self.samples), self.channels

    def in_rows(self, array: np.ndarray) -> np.ndarray:
        """Channels last: (rows, C)."""
        return array.reshape(self.samples * self.size, self.channels)

    @property
    def rows_each(self) -> int:
        """Channels last: rows that share statistics."""
        return self.samples * self.size if self.over_samples else self.size


class ForwardCall(ChannelCall):
    """y, and with it what statistics were asked for."""

    def __init__(
        self, x: Any, channel_axis: Any, groups: Any, weight: Any, bias: Any, eps: Any, *,
        over_samples: bool = False, dtype: Any = None, out: Any = None, activation: Any = None,
        return_stats: Any = False, given: tuple[np.ndarray, np.ndarray] | None = None,
        running: Any = None, parameters_per_sample: bool = False, explained: bool = False,
    ) -> None:  # fmt: skip
        if interop.asks_for_bits(x, dtype):
            x, dtype = interop.as_bits(x), None
            weight, bias = interop.as_bits(weight), interop.as_bits(bias)
        super().__init__(x, channel_axis, over_samples, explained)
        self.groups = self.channels if groups is None else as_groups(groups, self.channels)
        self.eps = checks.as_eps(eps)
        self.activation = activation
        self.activation_number = checks.as_activation(activation)
        self.weight = self.parameter("weight", weight, parameters_per_sample)
        self.bias = self.parameter("bias", bias, parameters_per_sample)
        self.match_parameters()
        self.y_type = self.dtype if dtype is None else checks.as_result_type(dtype)
        if self.y_type == checks.INT8:
            raise TypeError("dtype: got int8, wanted float16, bfloat16, float32 or float64")
        self.given = given(self.channels) if given else None
        self.running: Running | None = running(self.channels) if running else None
        self.return_stats = bool(return_stats)
        self.warm = True
        self.y = out
        if out is None:
            self.y, self.warm = self.new_result(self.y_type)
        y = as_output(self.y, self.y_type)
        if out is not None:
            checks.check_out("out", y, self.source.shape, self.y_type)
            checks.check_apart("out", y, {"x": x, "weight": weight, "bias": bias})
        if self.running:
            self.running.check_apart({"out": out})
        self.target = y
        self.x = self.laid_out("x", self.source)
        self.made = self.laid_out("out", y, fill=False)

    def match_parameters(self) -> None:
        """A pair a sample for both, or for neither."""
        if self.weight is None or self.bias is None or self.weight.ndim == self.bias.ndim:
            return
        shape = (self.samples, self.channels)
        self.weight, self.bias = (
            np.ascontiguousarray(np.broadcast_to(p, shape)) for p in (self.weight, self.bias)
        )

    @property
    def per_sample(self) -> bool:
        first = self.bias if self.weight is None else self.weight
        return first is not None and first.ndim == 2

    def plan(self) -> dict[str, Any]:
        if self.is_last:
            terms = [np.empty((1, 1), self.compute)]
            return _core.channels_last(
                None,
                self.in_rows(self.x),
                self.in_rows(self.made),
                terms,
                self.rows_each,
                plan=True,
            )
        found = np.empty((3, 1))
        return self.planes(found, np.empty(1, np.uint8), plan=True)

    def planes(self, found: np.ndarray, refused: Any, **options: Any) -> Any:
        mean, variance, rstd = found
        if self.given:
            (mean, rstd), refused = self.given, None
        return _core.channel_norm(
            self.layout(self.groups, self.per_sample, self.given is not None), self.compute, self.x,
            self.made, self.weight, self.bias, mean, variance, rstd, refused, self.eps,
            self.activation_number, self.warm and self.made is self.target, **options,
        )  # fmt: skip

    def run(self) -> Any:
        if self.source.size == 0:
            return self.gather(self.empty_statistics())
        found = self.run_last() if self.is_last else self.run_planes()
        self.write_back(self.made, self.target)
        if self.running and found is not None:
            self.update_running(found)
        return self.gather(found)

    def run_planes(self) -> np.ndarray | None:
        if self.given:
            self.planes(np.empty((3, 0)), None)
            return None
        layout = self.layout(self.groups, self.per_sample, False)
        found, refused = np.empty((3, layout.units)), np.empty(layout.units, np.uint8)
        self.planes(found, refused)
        if refused.any():
            put_right(layout, self.x, self.made, self.weight, self.bias, found, refused, self.eps,
                      self.activation)  # fmt: skip
        return found

    # ---- channels last ---------------------------------------------------------------------------

    def run_last(self) -> np.ndarray | None:
        x, y = self.in_rows(self.x), self.in_rows(self.made)
        lots, each = self.units_shape[0], self.rows_each
        found, repairs = None, []
        w, b = self.spread_parameters(lots)
        if self.given:
            mean, rstd = (np.broadcast_to(a, (lots, self.channels)) for a in self.given)
            pivot = self.to_compute(mean)
            shift = mean - pivot
        else:
            moments = _core.channels_last_moments(x, each, self.compute)
            pivot, shift, variance, rstd, refused = self.merge_groups(moments, w)
            found = self.statistics_of(pivot, shift, variance, rstd)
            repairs = [
                (u, self.repaired(x, u, found)) for u in zip(*np.nonzero(refused), strict=True)
            ]
        with np.errstate(all="ignore"):
            factor = rstd * w
            terms = [self.to_compute(t) for t in (pivot, factor, b - shift * factor)]
        _core.channels_last(None, x, y, terms, each, self.activation_number)
        for (lot, group), values in repairs:
            _store(self.part(y, lot, group), values)
        return found

    def to_compute(self, array: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.ascontiguousarray(array.astype(self.compute))

    def spread_parameters(self, lots: int) -> tuple[np.ndarray, np.ndarray]:
        """Weight and bias as doubles, (lots, C)."""
        shape = (lots, self.channels)
        w, b = (
            np.full(shape, otherwise) if p is None else np.broadcast_to(p.astype(np.float64), shape)
            for p, otherwise in ((self.weight, 1.0), (self.bias, 0.0))
        )
        return w, b

    def merge_groups(
        self, moments: np.ndarray, w: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Pivot, shift and rstd for each channel, the variance and what is out of range of each
        group, from the moments of each channel."""
        lots, n, count = moments.shape[1], self.rows_each, self.channels // self.groups
        first, own, squares = moments.reshape(3, lots, self.groups, count)
        with np.errstate(all="ignore"):
            own = (first - first[..., :1]) + own  # by the distance from the first one's pivot
            mean = own.mean(-1, keepdims=True)
            squares = squares.sum(-1) + n * np.square(own - mean).sum(-1)
            variance = squares / (n * count)
            exact = first[..., :1] + mean
            pivot = self.to_compute(exact).astype(np.float64)
            shift = (first[..., :1] - pivot) + mean
            rstd = 1.0 / np.sqrt(variance + self.eps)
            most = np.finfo(self.compute).max
            factors = np.abs(rstd[..., None] * w.reshape(lots, self.groups, count))
            refused = ~((variance + self.eps >= LEAST_VARIANCE[self.compute])
                        & (variance <= np.finfo(np.float64).max)
                        & (factors <= most).all(-1))  # fmt: skip
        spread = [np.repeat(a.reshape(lots, self.groups), count, 1) for a in (pivot, shift, rstd)]
        return spread[0], spread[1], variance, spread[2], refused

    def statistics_of(
        self, pivot: np.ndarray, shift: np.ndarray, variance: np.ndarray, rstd: np.ndarray
    ) -> np.ndarray:
        """(3, units)."""
        step = self.channels // self.groups
        return np.stack([(pivot + shift)[:, ::step], variance, rstd[:, ::step]]).reshape(3, -1)

    def part(self, rows: np.ndarray, lot: int, group: int) -> np.ndarray:
        """A unit of (rows, C), as (rows, channels)."""
        count, each = self.channels // self.groups, self.rows_each
        return rows[lot * each : (lot + 1) * each, group * count : (group + 1) * count]

    def repaired(self, x: np.ndarray, unit: tuple[int, int], found: np.ndarray) -> np.ndarray:
        """A unit that is out of range, before anything is written: y may be x."""
        lot, group = unit
        w, b = self.spread_parameters(self.units_shape[0])
        count = self.channels // self.groups
        own = np.s_[lot, group * count : (group + 1) * count]
        done = normalise(self.part(x, lot, group), w[own], b[own], self.eps)
        found[:, lot * self.groups + group] = done.mean, done.variance, done.rstd
        return _activated(done.y, self.activation)

    # ---- results ---------------------------------------------------------------------------------

    def empty_statistics(self) -> np.ndarray:
        """Of units without elements: mean 0, the rest NaN."""
        lots = 1 if self.over_samples else self.samples
        found = np.full((3, lots * self.groups), np.nan)
        found[0] = 0
        return found

    def update_running(self, found: np.ndarray) -> None:
        assert self.running is not None
        mean, variance = found[:2]
        count = self.size * (self.samples if self.over_samples else 1)
        if not self.over_samples:
            mean, variance = (a.reshape(self.samples, -1).mean(0) for a in (mean, variance))
        self.running.update(mean, variance, count)

    def gather(self, found: np.ndarray | None) -> Any:
        if not self.return_stats:
            return self.y
        if found is None:
            assert self.given is not None
            return self.y, *self.given
        mean, _, rstd = found
        if self.over_samples:
            return self.y, mean.copy(), rstd.copy()
        shape = (self.samples, self.groups)
        with np.errstate(all="ignore"):
            return self.y, *(a.reshape(shape).astype(self.compute) for a in (mean, rstd))


class AdaptiveCall(ForwardCall):
    """AdaIN: an instance norm whose parameters are the statistics of another array."""

    def __init__(
        self, x: Any, style: Any, eps: Any, ddof: Any, channel_axis: Any, out: Any, dtype: Any,
        explained: bool,
    ) -> None:  # fmt: skip
        if interop.asks_for_bits(x, dtype):
            x, style, dtype = interop.as_bits(x), interop.as_bits(style), None
        padding = checks.as_eps(eps)
        degrees = checks.as_count("ddof", ddof, 0, "an int")
        super().__init__(x, channel_axis, None, None, None, padding, dtype=dtype, out=out,
                         explained=explained)  # fmt: skip
        other = ChannelCall(style, channel_axis, False, explained)
        if (other.samples, other.channels) != (self.samples, self.channels):
            raise ValueError(
                f"style: got {other.samples} samples of {other.channels} channels, wanted "
                f"{self.samples} of {self.channels}, as x has them"
            )
        if out is not None:
            checks.check_apart("out", self.target, {"style": style}, ())
        for name, size in (("x", self.size), ("style", other.size)):
            if 0 < size <= degrees and self.samples and self.channels:
                raise ValueError(f"ddof: got {degrees}, wanted less than {size}, {name}'s elements")
        if explained or not self.source.size:
            return
        # var / (n - ddof) * n + eps: the same as eps less that factor, and its root taken out.
        factor = math.sqrt((self.size - degrees) / self.size)
        self.eps = padding * factor * factor
        mean, std = moments_of(style, channel_axis, degrees, padding)
        with np.errstate(all="ignore"):
            self.weight = self.to_compute(std * factor)
            self.bias = self.to_compute(mean)


def moments_of(x: Any, channel_axis: Any, ddof: int, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and ``sqrt(var + eps)`` of each channel of each sample, (N, C), in double precision."""
    call = ForwardCall(x, channel_axis, None, None, None, 0.0)
    if call.source.size == 0:
        return (np.full((call.samples, call.channels), np.nan),) * 2
    found = call.run_last() if call.is_last else call.run_planes()
    assert found is not None
    mean, variance, _ = found.reshape(3, call.samples, call.channels)
    with np.errstate(all="ignore"):
        return mean, np.sqrt(variance * (call.size / (call.size - ddof)) + eps)


class BackwardCall(ChannelCall):
    """dx, dweight and dbias."""

    def __init__(
        self, dy: Any, x: Any, channel_axis: Any, groups: Any, mean: Any, rstd: Any, weight: Any,
        bias: Any, output_mask: Any, *, over_samples: bool = False, given: Any = None,
        parameters_per_sample: bool = False, explained: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(x, channel_axis, over_samples, explained)
        self.groups = self.channels if groups is None else as_groups(groups, self.channels)
        dy = self.like_x("dy", dy)
        self.weight = self.parameter("weight", weight, parameters_per_sample)
        bias = self.parameter("bias", bias, parameters_per_sample)
        first = bias if self.weight is None else self.weight
        self.per_sample = first is not None and first.ndim == 2
        self.wanted = checks.as_mask(output_mask)
        self.given = given is not None
        if given is not None:
            self.mean, self.rstd = given(self.channels)
        else:
            shape = (self.channels,) if over_samples else (self.samples, self.groups)
            self.mean, self.rstd = (
                self.statistic(name, value, shape)
                for name, value in (("mean", mean), ("rstd", rstd))
            )
        self.dx: np.ndarray | None = None
        self.warm = False
        if self.wanted[0]:
            self.dx, self.warm = self.new_result(self.dtype)
        self.x, self.dy = self.laid_out("x", self.source), self.laid_out("dy", dy)
        self.made = self.dx
        if self.dx is not None and self.moves:
            self.made = self.laid_out("dx", self.dx, fill=False)

    def statistic(self, name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
        if value is None:
            raise TypeError(f"{name}: got None, wanted what return_stats=True returned")
        array = checks.as_floating(name, value)
        if array.shape != shape:
            raise ValueError(f"{name}: got shape {array.shape}, wanted {shape}")
        return checks.as_plain(array, checks.FLOAT64)

    def plan(self) -> dict[str, Any]:
        if self.is_last:
            made = self.x if self.made is None else self.made
            terms = [np.empty((1, 1), self.compute)]
            return _core.channels_last(
                self.in_rows(self.dy), self.in_rows(self.x), self.in_rows(made), terms,
                self.rows_each, plan=True,
            )  # fmt: skip
        return self.planes(np.empty(1), np.empty(1, np.uint8), plan=True)

    def planes(self, sums: np.ndarray, refused: np.ndarray, **options: Any) -> Any:
        return _core.channel_norm_backward(
            self.layout(self.groups, self.per_sample, self.given), self.compute, self.dy, self.x,
            self.made, self.weight, self.mean.reshape(-1), self.rstd.reshape(-1), sums, refused,
            self.given, self.warm and self.made is self.dx, **options,
        )  # fmt: skip

    def run(self) -> Any:
        if self.source.size == 0:
            lots = self.samples if self.per_sample else 1
            return self.gather(np.zeros((lots, self.channels, 2)))
        sums = self.run_last() if self.is_last else self.run_planes()
        if self.dx is not None and self.made is not None:
            self.write_back(self.made, self.dx)
        return self.gather(sums)

    def run_planes(self) -> np.ndarray:
        """Sums of dy*xh and dy: (lots, C, 2)."""
        layout = self.layout(self.groups, self.per_sample, self.given)
        planes = layout.cols // layout.plane
        sums, refused = np.empty((layout.units, planes, 2)), np.empty(layout.units, np.uint8)
        self.planes(sums, refused)
        for u in np.flatnonzero(refused):
            self.put_right(layout, int(u), sums[u])
        return sums.reshape(-1, self.channels, 2)

    def put_right(self, layout: Layout, u: int, sums: np.ndarray) -> None:
        """A unit that the kernel refused."""
        planes = layout.cols // layout.plane
        kind = u % layout.kinds
        own = kind if self.given else u
        w: Any = 1.0
        if self.weight is not None:
            part = self.weight.reshape(-1)[kind * planes : (kind + 1) * planes]
            w = part.astype(np.float64)[:, None]
        mean, rstd = float(self.mean.reshape(-1)[own]), float(self.rstd.reshape(-1)[own])
        done = gradients(layout.unit(self.dy, u), layout.unit(self.x, u), w, mean, rstd, self.given,
                         (0, 2))  # fmt: skip
        sums[:, 0], sums[:, 1] = done.dweight, done.dbias
        if self.made is not None:
            _store(layout.unit(self.made, u), done.dx)

    # ---- channels last ---------------------------------------------------------------------------

    def run_last(self) -> np.ndarray:
        x, dy = self.in_rows(self.x), self.in_rows(self.dy)
        lots, each, count = self.units_shape[0], self.rows_each, self.channels // self.groups
        shape = (lots, self.channels)
        mean, rstd = (
            np.repeat(a.reshape(-1, self.groups), count, 1) for a in (self.mean, self.rstd)
        )
        mean, rstd = (np.broadcast_to(a, shape) for a in (mean, rstd))
        w = 1.0 if self.weight is None else self.weight.astype(np.float64)
        with np.errstate(all="ignore"):
            pivot = np.ascontiguousarray(mean.astype(self.compute))
            dots = _core.channels_last_dots(dy, x, pivot, each)
            terms, sums, refused = self.coefficients(dots, mean - pivot, rstd, w)
            rounded = [pivot, *(np.ascontiguousarray(t.astype(self.compute)) for t in terms)]
        repairs = [
            (u, self.repaired(x, dy, u, mean, rstd, sums))
            for u in zip(*np.nonzero(refused), strict=True)
        ]
        if self.made is not None:
            rows = self.in_rows(self.made)
            _core.channels_last(dy, x, rows, rounded, each)
            for (lot, group), values in repairs:
                _store(self.part(rows, lot, group), values)
        return sums

    def part(self, rows: np.ndarray, lot: int, group: int) -> np.ndarray:
        count, each = self.channels // self.groups, self.rows_each
        return rows[lot * each : (lot + 1) * each, group * count : (group + 1) * count]

    def coefficients(
        self, dots: np.ndarray, shift: np.ndarray, rstd: np.ndarray, w: Any
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Factor, shift and slope of dx for each channel, the sums of dy*xh and dy, and which
        groups are out of range. As gradients_of_unit of channels.c has them."""
        lots = dots.shape[1]
        grouped = (lots, self.groups, self.channels // self.groups)
        n = self.rows_each * grouped[2]
        deviations, db, dyx = dots

        def over_group(a: np.ndarray) -> np.ndarray:
            total = a.reshape(grouped).sum(-1, keepdims=True)
            return np.broadcast_to(total, grouped).reshape(lots, self.channels) / n

        c = shift if self.given else over_group(deviations)
        dw = (dyx - c * db) * rstd
        factor, slope, rest = rstd * w, np.zeros_like(dw), np.zeros_like(dw)
        if not self.given:
            slope = -rstd * rstd * over_group(w * dw)
            rest = -rstd * over_group(w * db) - c * slope
        most, bound = np.finfo(self.compute).max, LARGEST_RSTD[self.compute]
        largest = np.maximum(np.abs(db), np.abs(dyx * rstd))
        safe = (largest == 0) | ((largest >= LEAST_SUM[self.compute]) & (largest <= most))
        safe &= (rstd >= 1 / bound) & (rstd <= bound)
        for term in (factor, slope, rest):
            safe &= np.abs(term) <= most
        return [factor, rest, slope], np.stack([dw, db], -1), ~safe.reshape(grouped).all(-1)

    def repaired(
        self, x: np.ndarray, dy: np.ndarray, unit: tuple[int, int], mean: np.ndarray,
        rstd: np.ndarray, sums: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        lot, group = unit
        count = self.channels // self.groups
        own = np.s_[lot, group * count : (group + 1) * count]
        w: Any = 1.0
        if self.weight is not None:
            shape = (self.units_shape[0], self.channels)
            w = np.broadcast_to(self.weight.astype(np.float64), shape)[own]
        done = gradients(self.part(dy, lot, group), self.part(x, lot, group), w,
                         float(mean[own][0]), float(rstd[own][0]), self.given, (0,))  # fmt: skip
        sums[own] = np.stack([done.dweight, done.dbias], -1)
        return done.dx

    # ---- results ---------------------------------------------------------------------------------

    def gather(self, sums: np.ndarray) -> tuple[Any, Any, Any]:
        if not self.per_sample:
            sums = np.add.reduce(sums, axis=0)
        with np.errstate(all="ignore"):
            dweight, dbias = (
                np.ascontiguousarray(sums[..., k].astype(self.compute))
                if self.wanted[k + 1]
                else None
                for k in range(2)
            )
        return self.dx, dweight, dbias
