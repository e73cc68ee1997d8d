"""The ops of `fastnorm.reference` on arrays with channels: batch, group, instance norm and AdaIN.

x has the shape (N, C, ...): N samples of C channels, whose remaining axes are S elements, a plane
(1 where there are none). ``channel_axis`` says where the channels are, if not on axis 1. What is
normalised together is a unit of n elements: a channel of all samples (batch norm, n = N S), a group
of a sample's channels (group norm, n = C/G S), or a single plane (instance norm and AdaIN, n = S).
A unit is what a row is to the other ops, and its arithmetic is theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .reference_rows import (
    Array,
    Float64,
    Layout,
    activation_of,
    backward,
    forward,
    real,
    shape_of,
    spread,
    widen,
)

#: Whether momentum is the share of the new statistics, and whether the variance is unbiased.
DIALECTS = {
    "torch": (True, True),
    "keras": (False, False),
    "flax": (False, False),
    "onnx": (False, False),
}


# ---- which elements belong together -------------------------------------------------------------


@dataclass(frozen=True)
class Planes:
    """Where the samples and the channels of x are."""

    given: tuple[int, ...]  # x's own shape
    channel_axis: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, C and S."""
        others = [n for i, n in enumerate(self.given) if i not in (0, self.channel_axis)]
        return self.given[0], self.given[self.channel_axis], math.prod(others)

    def of(self, array: Array) -> Array:
        """`array` as (N, C, S)."""
        moved = np.moveaxis(array, self.channel_axis, 1)
        return np.ascontiguousarray(moved).reshape(self.shape)

    def restore(self, array: Array) -> Array:
        moved = list(self.given)
        moved.insert(1, moved.pop(self.channel_axis))
        array = np.moveaxis(array.reshape(moved), 1, self.channel_axis)
        return np.ascontiguousarray(array).reshape(self.given)


@dataclass(frozen=True)
class Units(Layout):
    """A `Layout` whose arrays are x's and whose parameters are the channels'.

    `shape` and `axes` are those of the planes, as (N, C, S) or as (N, G, C/G S).
    """

    planes: Planes
    per_sample: bool = False  # parameters may be (N, C)

    @property
    def channels(self) -> int:
        return self.planes.shape[1]

    def rows(self, array: Array) -> Array:
        return super().rows(self.planes.of(array).reshape(self.shape))

    def repeated(self, values: Array) -> Array:
        """What broadcasts to (N, C, S), as rows."""
        return super().rows(np.broadcast_to(values, self.planes.shape).reshape(self.shape))

    def restore(self, rows: Array) -> Float64:
        return self.planes.restore(super().restore(rows))

    def parameter(self, name: str, value: ArrayLike | None, missing: float) -> Float64:
        if value is None:
            return np.full((1, 1), missing)
        array = real(name, value).astype(np.float64)
        shapes = [(self.channels,)] + [self.planes.shape[:2]] * self.per_sample
        if array.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name}: got shape {array.shape}, wanted {wanted}")
        return self.repeated(array[..., np.newaxis])

    def parameter_gradient(self, terms: Array, shape: tuple[int, ...] | None) -> Float64:
        """The sum of `terms` (rows, n) over all that share an element of the parameter."""
        moved = np.moveaxis(terms.reshape(self.outer + self.inner), self.last, self.axes)
        summed = (2,) if shape is not None and len(shape) == 2 else (0, 2)
        return moved.reshape(self.planes.shape).sum(summed).astype(np.float64)


def planes_of(x: Array, channel_axis: int, name: str = "x") -> Planes:
    if x.ndim < 2:
        raise ValueError(f"{name}: got {x.ndim} dimensions, wanted at least 2: samples, channels")
    axis = channel_axis + x.ndim if channel_axis < 0 else channel_axis
    if not 0 < axis < x.ndim:
        raise ValueError(f"channel_axis: got {channel_axis}, wanted an axis of {x.shape} but 0")
    return Planes(x.shape, axis)


def whole_channels(planes: Planes) -> Units:
    """Units of batch norm."""
    samples, channels, size = planes.shape
    everything = np.broadcast_to(True, (channels, samples * size))
    return Units(planes.shape, (0, 2), everything, planes)


def groups_of(planes: Planes, groups: int) -> Units:
    samples, channels, size = planes.shape
    if groups < 1 or channels % groups:
        raise ValueError(f"num_groups: got {groups}, wanted a divisor of {channels}, the channels")
    joint = channels // groups * size
    everything = np.broadcast_to(True, (samples * groups, joint))
    return Units((samples, groups, joint), (2,), everything, planes)


def instances(planes: Planes) -> Units:
    samples, channels, size = planes.shape
    everything = np.broadcast_to(True, (samples * channels, size))
    return Units(planes.shape, (2,), everything, planes, per_sample=True)


# ---- running statistics -------------------------------------------------------------------------


def _moments(units: Units, x: Array) -> tuple[Any, Any]:
    """Mean and population variance of each unit, (rows, 1), in the type that is worked in."""
    rows = spread(units.rows(x), units.valid, 0.0, centred=True)
    return np.ldexp(rows.mean, rows.exponent), np.ldexp(rows.square, 2 * rows.exponent)


def _written_to(name: str, running: Any, channels: int) -> Any:
    """An array that takes new statistics; None stays None."""
    if running is None:
        return None
    if not isinstance(running, np.ndarray):
        raise TypeError(f"{name}: got {type(running).__name__}, wanted an ndarray to write to")
    _running(name, running, channels)
    if not running.flags.writeable:
        raise ValueError(f"{name}: got a read-only array, wanted a writeable one")
    return running


def _running(name: str, running: ArrayLike | None, channels: int) -> Array:
    """Statistics to normalise by, as (1, C, 1)."""
    if running is None:
        raise TypeError(f"{name}: got None, wanted an array of shape ({channels},)")
    array = real(name, running)
    if array.shape != (channels,):
        raise ValueError(f"{name}: got shape {array.shape}, wanted ({channels},)")
    return array.reshape(1, -1, 1)


def _update(
    units: Units, x: Array, running: tuple[Any, Any], momentum: float, dialect: str
) -> None:
    """Move the running statistics towards the means over samples of x's, in place."""
    if not x.size:
        return
    is_share, is_unbiased = DIALECTS[dialect]
    kept, share = (1 - momentum, momentum) if is_share else (momentum, 1 - momentum)
    mean, variance = _moments(units, x)
    n = units.valid.shape[1]
    if is_unbiased and n > 1:
        variance = variance * (mean.dtype.type(n) / (n - 1))
    for old, new in zip(running, (mean, variance), strict=True):
        if old is not None:
            batch = new.reshape(-1, units.channels).mean(0)
            old[...] = kept * old.astype(batch.dtype) + share * batch


def _known_dialect(dialect: str, momentum: float) -> None:
    if dialect not in DIALECTS:
        raise ValueError(f"dialect: got {dialect!r}, wanted one of {list(DIALECTS)}")
    if not math.isfinite(momentum):
        raise ValueError(f"momentum: got {momentum}, wanted a finite number")


def _given(units: Units, mean: Any, variance: Any, eps: float) -> tuple[Array, Array]:
    """mean and rstd as (1, C, 1)."""
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}, wanted at least 0")
    m = _running("running_mean", mean, units.channels)
    v = _running("running_var", variance, units.channels)
    with np.errstate(all="ignore"):
        return widen(m), 1 / np.sqrt(widen(v) + eps)


def _by_given(
    units: Units,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    activation: str | None,
) -> Float64:
    """y by statistics that are not x's."""
    activate = activation_of(activation)
    w, b = units.parameter("weight", weight, 1.0), units.parameter("bias", bias, 0.0)
    with np.errstate(all="ignore"):
        deviations = widen(units.rows(x)) - units.repeated(mean)
        return units.restore(activate(deviations * units.repeated(rstd) * w + b))


# ---- batch norm ---------------------------------------------------------------------------------


def batch_norm(
    x: ArrayLike,
    running_mean: Any,
    running_var: Any,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    dialect: str = "torch",
    return_stats: bool = False,
    activation: str | None = None,
) -> Any:
    """Batch normalisation (Ioffe and Szegedy 2015, arXiv:1502.03167).

    For each channel, over all samples and places::

        y = (x - m) / sqrt(v + eps) * weight + bias

    In training, m and v are the mean and the population variance of the channel's n elements, and
    the running statistics move towards them; in inference they are the running statistics.

    Parameters
    ----------
    x : array_like of real numbers, (N, C, ...)
    running_mean, running_var : array of shape (C,)
        In training they are written to; there either may be None.
    weight, bias : array_like of shape (C,), optional
    training : bool
    momentum : float
        Any finite number. How it is read is the dialect's.
    eps : float
        Added to the variance. At least 0.
    channel_axis : int
        Any axis of x but 0, the samples'.
    dialect : str
        "torch": run = (1 - momentum) run + momentum batch, and the variance of the batch that goes
        there is the unbiased one, sum((x - m)^2)/(n - 1), or 0 where n = 1. "keras", "flax",
        "onnx": run = momentum run + (1 - momentum) batch, with the population variance.
    return_stats : bool
        Return ``(y, mean, rstd)`` with what was normalised by, of shape (C,).
    activation : str, optional
        "relu", "silu", "gelu" or "gelu_tanh", applied to y.

    Returns
    -------
    float64 array of x's shape, or three arrays
        In training, a constant channel is exactly ``bias`` (always so where n = 1), and one that
        holds a NaN or an infinity is NaN throughout, as are its statistics. Where n = 0 nothing is
        written; mean is 0, rstd NaN.

    Raises
    ------
    TypeError
        In inference, a running statistic that is None; in training, one that is no ndarray.
    ValueError
        Shapes that do not fit, running statistics that are read-only in training, an unknown
        dialect, momentum that is not finite, eps negative or NaN.
    """
    x = real("x", x)
    units = whole_channels(planes_of(x, channel_axis))
    return _by_input_or_given(
        units, x, running_mean, running_var, weight, bias, training, momentum, eps, dialect,
        return_stats, activation,
    )  # fmt: skip


def _by_input_or_given(
    units: Units, x: Array, running_mean: ArrayLike | None, running_var: ArrayLike | None,
    weight: ArrayLike | None, bias: ArrayLike | None, by_input: bool, momentum: float, eps: float,
    dialect: str, return_stats: bool, activation: str | None,
) -> Any:  # fmt: skip
    """What batch and instance norm return: by x's own statistics, which the running ones take up,
    or by the running ones."""
    _known_dialect(dialect, momentum)
    if not by_input:
        mean, rstd = _given(units, running_mean, running_var, eps)
        y = _by_given(units, x, mean, rstd, weight, bias, activation)
        stats = [statistic.reshape(-1).astype(np.float64) for statistic in (mean, rstd)]
        return (y, *stats) if return_stats else y
    running = (
        _written_to("running_mean", running_mean, units.channels),
        _written_to("running_var", running_var, units.channels),
    )
    y, mean, rstd = _by_input(units, x, weight, bias, eps, activation)
    with np.errstate(all="ignore"):
        _update(units, x, running, momentum, dialect)
    return (y, mean, rstd) if return_stats else y


def _by_input(
    units: Units,
    x: Array,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float,
    activation: str | None,
) -> tuple[Float64, Float64, Float64]:
    """y, mean and rstd by x's own statistics."""
    w, b = units.parameter("weight", weight, 1.0), units.parameter("bias", bias, 0.0)
    return forward(units, x, w, b, eps, activation)


def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    eps: float = 1e-5,
    *,
    mean: ArrayLike | None = None,
    rstd: ArrayLike | None = None,
    channel_axis: int = 1,
    output_mask: Sequence[bool] = (True, True, True),
) -> tuple[Any, Any, Any]:
    """The gradients of `batch_norm` with respect to x, weight and bias.

    With q = x - m and r = 1/sqrt(v + eps), sums and means over the channel::

        dx      = (dy - mean(dy) - q r^2 mean(q dy)) r weight      in training
        dx      = dy r weight                                      in inference
        dweight = sum(dy q r)
        dbias   = sum(dy)

    Parameters
    ----------
    dy : array_like of x's shape
        The gradient of the loss with respect to y (before the activation).
    x, running_mean, running_var, weight, bias, training, eps, channel_axis
        As `batch_norm` had them. In training the running statistics and eps are not read.
    mean, rstd : array_like of shape (C,)
        In training, as `batch_norm` returned them; mean is a pivot, as for `layer_norm_backward`.
        In inference they are not read.
    output_mask : three bools
        Which of dx, dweight and dbias are wanted.

    Returns
    -------
    (dx, dweight, dbias) : float64 arrays of the shapes x's, (C,) and (C,), None where masked.
        In training, dx is 0 for a constant channel with eps = 0.

    Raises
    ------
    TypeError, ValueError
        As for `batch_norm`.
    """
    x, dy = real("x", x), real("dy", dy)
    units = whole_channels(planes_of(x, channel_axis))
    if training:
        return _backward_by_input(units, dy, x, mean, rstd, weight, bias, output_mask)
    m, r = _given(units, running_mean, running_var, eps)
    return _backward_by_given(units, dy, x, m, r, weight, bias, output_mask)


def _backward_by_given(
    units: Units,
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    output_mask: Sequence[bool],
) -> tuple[Any, Any, Any]:
    if dy.shape != x.shape:
        raise ValueError(f"dy: got shape {dy.shape}, wanted {x.shape}, the shape of x")
    if len(output_mask) != 3:
        raise ValueError(f"output_mask: got {len(output_mask)} items, wanted 3")
    w = units.parameter("weight", weight, 1.0)
    units.parameter("bias", bias, 0.0)
    with np.errstate(all="ignore"):
        m, r = units.repeated(mean), units.repeated(rstd)
        wide = widen(units.rows(x))
        g = units.rows(dy).astype(wide.dtype)
        xh = (wide - m) * r
        dx = units.restore(g * r * w) if output_mask[0] else None
        dweight = units.parameter_gradient(g * xh, None) if output_mask[1] else None
        dbias = units.parameter_gradient(g, None) if output_mask[2] else None
    return dx, dweight, dbias


def _backward_by_input(
    units: Units,
    dy: Array,
    x: Array,
    mean: ArrayLike | None,
    rstd: ArrayLike | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    output_mask: Sequence[bool],
) -> tuple[Any, Any, Any]:
    for name, value in (("mean", mean), ("rstd", rstd)):
        if value is None:
            raise TypeError(f"{name}: got None, wanted an array of shape {units.outer}")
    units.statistic("mean", mean)
    r = units.statistic("rstd", rstd)
    w = units.parameter("weight", weight, 1.0)
    units.parameter("bias", bias, 0.0)
    shapes = shape_of(weight, bias), shape_of(bias, weight)
    dx, dweight, dbias = backward(units, dy, x, r, w, shapes, output_mask)
    return dx, dweight, dbias


# ---- group norm ---------------------------------------------------------------------------------


def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    return_stats: bool = False,
    activation: str | None = None,
) -> Any:
    """Group normalisation (Wu and He 2018, arXiv:1803.08494).

    For each sample and each group of C / num_groups neighbouring channels, with the mean m and the
    population variance v of all their elements::

        y = (x - m) / sqrt(v + eps) * weight + bias

    The same in training and in inference.

    Parameters
    ----------
    x : array_like of real numbers, (N, C, ...)
    num_groups : int
        A divisor of C. 1: all of a sample together; C: `instance_norm`.
    weight, bias : array_like of shape (C,), optional
        One for each channel, not for each group.
    eps, channel_axis, activation
        As for `batch_norm`.
    return_stats : bool
        Return ``(y, mean, rstd)``; mean and rstd have the shape (N, num_groups).

    Returns
    -------
    float64 array of x's shape, or three arrays
        A constant group is exactly ``bias``; one that holds a NaN or an infinity is NaN throughout.

    Raises
    ------
    TypeError, ValueError
        As for `batch_norm`; ValueError where num_groups does not divide C.
    """
    x = real("x", x)
    units = groups_of(planes_of(x, channel_axis), num_groups)
    y, mean, rstd = _by_input(units, x, weight, bias, eps, activation)
    return (y, mean, rstd) if return_stats else y


def group_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    num_groups: int,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    channel_axis: int = 1,
    output_mask: Sequence[bool] = (True, True, True),
) -> tuple[Any, Any, Any]:
    """The gradients of `group_norm` with respect to x, weight and bias.

    With xh = (x - m) r, g = dy * weight, and means over the group::

        dx      = r (g - mean(g) - xh mean(g xh))
        dweight = sum over samples and places of dy xh
        dbias   = sum over samples and places of dy

    Parameters
    ----------
    dy : array_like of x's shape
    x, num_groups, weight, bias, channel_axis
        As `group_norm` had them.
    mean, rstd : array_like of shape (N, num_groups)
        As `group_norm` returned them; mean is a pivot, as for `layer_norm_backward`.
    output_mask : three bools
        Which of dx, dweight and dbias are wanted.

    Returns
    -------
    (dx, dweight, dbias) : float64 arrays of the shapes x's, (C,) and (C,), None where masked.

    Raises
    ------
    TypeError, ValueError
        As for `group_norm`.
    """
    x, dy = real("x", x), real("dy", dy)
    units = groups_of(planes_of(x, channel_axis), num_groups)
    return _backward_by_input(units, dy, x, mean, rstd, weight, bias, output_mask)


# ---- instance norm ------------------------------------------------------------------------------


def instance_norm(
    x: ArrayLike,
    running_mean: Any = None,
    running_var: Any = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    dialect: str = "torch",
    return_stats: bool = False,
    activation: str | None = None,
) -> Any:
    """Instance normalisation (Ulyanov, Vedaldi and Lempitsky 2016, arXiv:1607.08022).

    For each plane, a channel of one sample, with its mean m and population variance v::

        y = (x - m) / sqrt(v + eps) * weight + bias

    Parameters
    ----------
    x : array_like of real numbers, (N, C, ...)
    running_mean, running_var : array of shape (C,), optional
        With ``use_input_stats`` they are written to where they are given: they move towards the
        means over the samples of the planes' means and variances, as those of `batch_norm` do.
        Without, they are what is normalised by.
    weight, bias : array_like of shape (C,) or (N, C), optional
        One for each channel, or for each channel of each sample.
    use_input_stats : bool
    momentum, eps, channel_axis, dialect, activation
        As for `batch_norm`; a plane's unbiased variance is that of its n = S elements.
    return_stats : bool
        Return ``(y, mean, rstd)`` with what was normalised by, of shape (N, C), or, without
        ``use_input_stats``, (C,).

    Returns
    -------
    float64 array of x's shape, or three arrays
        A constant plane is exactly ``bias`` with ``use_input_stats``; one that holds a NaN or an
        infinity is NaN throughout.

    Raises
    ------
    TypeError, ValueError
        As for `batch_norm`.
    """
    x = real("x", x)
    units = instances(planes_of(x, channel_axis))
    return _by_input_or_given(
        units, x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, dialect,
        return_stats, activation,
    )  # fmt: skip


def instance_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    channel_axis: int = 1,
    output_mask: Sequence[bool] = (True, True, True),
) -> tuple[Any, Any, Any]:
    """The gradients of `instance_norm`, by the input's statistics, as `group_norm_backward` has
    them; mean and rstd are of shape (N, C), dweight and dbias of their parameters' shapes.
    """
    x, dy = real("x", x), real("dy", dy)
    units = instances(planes_of(x, channel_axis))
    return _backward_by_input(units, dy, x, mean, rstd, weight, bias, output_mask)


def adaptive_instance_norm(
    x: ArrayLike,
    style: ArrayLike,
    eps: float = 1e-5,
    *,
    ddof: int = 0,
    channel_axis: int = 1,
) -> Float64:
    """Adaptive instance normalisation, AdaIN (Huang and Belongie 2017, arXiv:1703.06868).

    For each plane of x, and the plane of ``style`` of the same sample and channel::

        y = std(style) (x - mean(x)) / std(x) + mean(style)

    with std = sqrt(sum((x - m)^2) / (n - ddof) + eps).

    Parameters
    ----------
    x : array_like of real numbers, (N, C, ...)
    style : array_like of real numbers, (N, C, ...)
        Its remaining axes may have other lengths than x's.
    eps : float
        Added to both variances. At least 0.
    ddof : int
        0: population variances; 1: unbiased ones, as the authors' code has them.
    channel_axis : int
        As for `batch_norm`; of both arrays.

    Returns
    -------
    float64 array of x's shape
        A constant plane of x is exactly mean(style); one that holds a NaN or an infinity, or whose
        plane of the style does, is NaN throughout.

    Raises
    ------
    TypeError, ValueError
        As for `batch_norm`; ValueError where style has another N or C than x, or ddof leaves no
        elements.
    """
    x, style = real("x", x), real("style", style)
    units = instances(planes_of(x, channel_axis))
    others = instances(planes_of(style, channel_axis, "style"))
    if others.outer != units.outer:
        raise ValueError(f"style: got (N, C) {others.outer}, wanted {units.outer}, those of x")
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}, wanted at least 0")
    for name, each in (("x", units), ("style", others)):
        if ddof < 0 or 0 < each.valid.shape[1] <= ddof:
            raise ValueError(f"ddof: got {ddof}, wanted 0 or more, but less than {name}'s elements")
    with np.errstate(all="ignore"):
        mean, variance = _moments(others, style)
        std = np.sqrt(variance * _unbiasing(others, ddof) + eps)
        rows = spread(units.rows(x), units.valid, eps, centred=True)
        scaled_eps = np.ldexp(rows.dtype(eps), -2 * rows.exponent)
        rstd = 1 / np.sqrt(rows.square * _unbiasing(units, ddof) + scaled_eps)
        xh = np.where(rows.constant, 0, rows.deviations * rstd)
        return units.restore(xh * std + mean)


def _unbiasing(units: Units, ddof: int) -> Any:
    """What takes a population variance to one of n - ddof degrees of freedom."""
    n = units.valid.shape[1]
    return np.longdouble(n) / (n - ddof) if n else 1.0
