"""Units that leave the range of the type that is computed in: the kernels refuse them, and they are
put right here, in double precision and scaled by a power of two."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from . import _core, checks, interop

#: Weights from here on are nowhere near the least numbers.
LEAST_WEIGHT = {checks.FLOAT32: 2.0**-100, checks.FLOAT64: 2.0**-960}


def is_lost(factor: Any, weight: Any, compute: np.dtype) -> Any:
    """Whether weight*rstd has lost digits to the type's least numbers, as channels.c has it."""
    tiny = np.finfo(compute).tiny
    return (np.abs(factor) < tiny) & (np.abs(weight) >= LEAST_WEIGHT[compute])


class Layout(NamedTuple):
    """Units as channels.c counts them, in elements."""

    units: int
    stride: int
    rows: int
    row_stride: int
    planes: int
    plane: int
    kinds: int
    step: int

    def unit(self, array: np.ndarray, u: int) -> np.ndarray:
        """Unit u of a contiguous array, as (rows, planes, elements): a view."""
        first, size = u * self.stride, array.itemsize
        shape = self.rows, self.planes, self.plane
        strides = self.row_stride * size, self.plane * size, size
        if self.step > 1:
            sample, group = divmod(u, self.step // self.planes)
            first = sample * self.plane * self.step + group * self.planes
            strides = 0, size, self.step * size
        return np.lib.stride_tricks.as_strided(array.reshape(-1)[first:], shape, strides)


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
    with np.errstate(all="ignore"):
        if given or scaled is None or scaled_dy is None or math.isnan(rstd) or math.isnan(mean):
            return _unscaled_gradients(dy, x, weight, mean, rstd, given, axes)
        (s, up), (g, up_dy) = scaled, scaled_dy
        d = s - _ldexp(mean, -up)
        d -= d.mean()
        root = _ldexp(rstd, up)
        if not 0 < root < math.inf:  # lost in a narrower type, or the unit is constant
            variance = np.mean(d * d)
            root = float(1 / np.sqrt(variance)) if variance else 0.0
        xh, gw = d * root, g * weight
        dx = root * (gw - gw.mean() - xh * np.mean(gw * xh))
        return Gradients(
            np.ldexp(dx, up_dy - up),
            np.ldexp(np.sum(g * xh, axes), up_dy),
            np.ldexp(np.sum(g, axes), up_dy),
        )


def _unscaled_gradients(
    dy: np.ndarray, x: np.ndarray, weight: Any, mean: float, rstd: float, given: bool,
    axes: tuple[int, ...],
) -> Gradients:  # fmt: skip
    """Where statistics are given, so that NaN in x stays out of dx; or where nothing is finite."""
    g = interop.widened(dy).astype(np.float64)
    xh = (interop.widened(x).astype(np.float64) - mean) * rstd
    factor = np.float64(rstd) * weight
    kind = checks.compute_type(x.dtype)  # in which the kernels multiply, if it holds the factor
    if np.all((np.abs(factor) <= np.finfo(kind).max) & ~is_lost(factor, weight, kind)):
        g, factor = g.astype(kind), factor.astype(kind)
    dx = g * factor if given else np.full(x.shape, np.nan)
    g = interop.widened(dy).astype(np.float64)
    return Gradients(dx, np.sum(g * xh, axes), np.sum(g, axes))


def store(into: np.ndarray, values: np.ndarray) -> None:
    """Doubles, rounded once to the type of `into`."""
    with np.errstate(all="ignore"):
        if interop.is_bits(into.dtype):
            into[...] = interop.to_bits(interop.to_odd(values))
        else:
            into[...] = interop.to_odd(values) if interop.is_bfloat16(into.dtype) else values


def put_right(
    layout: tuple[int, ...], x: np.ndarray, y: np.ndarray, weight: Any, bias: Any,
    statistics: np.ndarray, refused: np.ndarray, eps: float, activation: str | None = None,
) -> None:  # fmt: skip
    """Normalise the units that a kernel refused; statistics: (3, units): mean, variance, rstd."""
    units = Layout(*layout)
    planes = units.planes
    for u in np.flatnonzero(refused):
        kind = slice(u % units.kinds * planes, u % units.kinds * planes + planes)
        w, b = (
            otherwise if p is None else p.reshape(-1)[kind].astype(np.float64)[:, None]
            for p, otherwise in ((weight, 1.0), (bias, 0.0))
        )
        done = normalise(units.unit(x, int(u)), w, b, eps)
        store(units.unit(y, int(u)), activated(done.y, activation))
        statistics[:, u] = done.mean, done.variance, done.rstd


def activated(y: np.ndarray, activation: str | None) -> np.ndarray:
    if activation is None:
        return y
    from .reference_rows import activation_of  # which not every process needs

    with np.errstate(all="ignore"):
        return np.asarray(activation_of(activation)(y), np.float64)


_core.register_careful(put_right)
