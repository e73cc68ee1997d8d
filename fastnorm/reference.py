"""The readable definition of every op, in NumPy: float64 results, no kernels, no tricks of speed.

It has the names and the signatures of the fast functions (less ``out``), so that it serves as the
oracle of the tests, as the baseline of the benchmarks and as the place to read what an op means.
float32 input is worked on in float64, wider input in ``np.longdouble``, so that the result is right
to the last digits of the type it is compared with. Rows of any finite size are right: they
are divided by a power of two before anything is squared.

Notation: a row holds the n values x that are normalised together, m is their mean, v their
population variance (divided by n), r = 1/sqrt(v + eps) and xh = (x - m) r.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple
from numpy.typing import ArrayLike, NDArray

__all__ = ["layer_norm", "layer_norm_backward", "moments"]

Float64 = NDArray[np.float64]
Axes = int | Sequence[int] | None


def layer_norm(
    x: ArrayLike,
    normalized_shape: Axes = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: Axes = None,
    return_stats: bool = False,
) -> Any:
    """Layer normalisation (Ba, Kiros and Hinton 2016, arXiv:1607.06450).

    For each row, with m = sum(x)/n and v = sum((x - m)^2)/n::

        y = (x - m) / sqrt(v + eps) * weight + bias

    The same in training and in inference: layer norm has no running statistics.

    Parameters
    ----------
    x : array_like of real numbers, any shape
    normalized_shape : int or sequence of int, optional
        The trailing shape that is normalised together, as in torch. Default: the last axis.
    weight, bias : array_like, optional
        Of the normalised shape (with ``axis``: of the shape of the sorted axes). Either may be
        absent; then it counts as ones or zeros.
    eps : float
        Added to the variance, in the units of x squared. At least 0.
    axis : int or sequence of int, optional
        The axes that are normalised together, as in Keras, instead of ``normalized_shape``.
    return_stats : bool
        Return ``(y, mean, rstd)``; mean and rstd have the shape of the other axes.

    Returns
    -------
    float64 array of x's shape, or three arrays.
        A constant row is exactly ``bias``, even with eps = 0, where its rstd is inf; with
        eps = inf every finite row is, and its rstd 0. A row that holds a NaN or an infinity is NaN
        throughout, its mean and rstd too. A row of length 0 has mean 0 and rstd NaN.

    Raises
    ------
    TypeError
        ``normalized_shape`` and ``axis`` together; x not of real numbers.
    ValueError
        Shapes that do not fit, no axis, axes out of range or repeated, eps negative or NaN.
    """
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    layout = _layout(x, normalized_shape, axis)
    w = layout.parameter("weight", weight, 1.0)
    b = layout.parameter("bias", bias, 0.0)
    with np.errstate(all="ignore"):
        rows = _centred(layout.rows(x), eps)
        rstd = 1 / np.sqrt(rows.variance + np.ldexp(rows.dtype(eps), -2 * rows.exponent))
        xh = np.where(rows.constant, 0, rows.deviations * rstd)
        y = layout.restore(xh * w + b)
        if not return_stats:
            return y
        return (
            y,
            layout.restore_stats(np.ldexp(rows.mean, rows.exponent)),
            layout.restore_stats(np.ldexp(rstd, -rows.exponent)),
        )


def layer_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    normalized_shape: Axes,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axes = None,
    output_mask: Sequence[bool] = (True, True, True),
) -> tuple[Any, Any, Any]:
    """The gradients of `layer_norm` with respect to x, weight and bias.

    With g = dy * weight, and means over the row::

        dx      = r (g - mean(g) - xh mean(g xh))
        dweight = sum over rows of dy xh
        dbias   = sum over rows of dy

    The first line follows from ``d xh_i / d x_j = r (delta_ij - 1/n - xh_i xh_j / n)``: moving one
    x moves the mean (the term 1/n) and the variance (the term xh_i xh_j / n) of its row.

    Parameters
    ----------
    dy : array_like of x's shape
        The gradient of the loss with respect to y.
    x, normalized_shape, weight, bias, axis
        As `layer_norm` had them. bias has no influence on any gradient.
    mean, rstd : array_like
        x's own statistics as `layer_norm` returned them, with or without kept axes of length 1.
        mean, often rounded to float32, is no more than a pivot: what it lost is formed again from
        x, so its value does not matter here.
    output_mask : three bools
        Which of dx, dweight and dbias are wanted.

    Returns
    -------
    (dx, dweight, dbias) : float64 arrays of x's and of the normalised shape, None where masked.
        Without rows, dweight and dbias are 0. Where rstd is inf (eps = 0), dx and xh are 0 for a
        constant row, and r is taken from x for any other.

    Raises
    ------
    TypeError, ValueError
        As for `layer_norm`.
    """
    layout = _layout(x, normalized_shape, axis)
    w = layout.parameter("weight", weight, 1.0)
    layout.parameter("bias", bias, 0.0)
    if np.shape(dy) != layout.shape:
        raise ValueError(f"dy must have x's shape {layout.shape}, got {np.shape(dy)}")
    layout.statistic("mean", mean)
    r = layout.statistic("rstd", rstd)
    with np.errstate(all="ignore"):
        rows = _centred(layout.rows(x), 0.0)
        g = layout.rows(dy).astype(rows.dtype)
        lost = np.isinf(r)
        scaled_r = np.where(lost, 1 / np.sqrt(rows.variance), np.ldexp(r, rows.exponent))
        r = np.where(lost, np.ldexp(scaled_r, -rows.exponent), r)
        xh = np.where(rows.constant, 0, rows.deviations * scaled_r)
        dx = dweight = dbias = None
        if output_mask[1]:
            dweight = layout.restore_parameter((g * xh).sum(0))
        if output_mask[2]:
            dbias = layout.restore_parameter(g.sum(0))
        if output_mask[0]:
            g = g * w
            towards = g - _mean(g) - xh * _mean(g * xh)
            dx = layout.restore(np.where(lost & rows.constant, 0, r * towards))
    return dx, dweight, dbias


def moments(x: ArrayLike, axis: Axes = None) -> tuple[Float64, Float64]:
    """Mean and population variance of each row: sum(x)/n and sum((x - m)^2)/n.

    Parameters
    ----------
    x : array_like of real numbers, any shape
    axis : int or sequence of int, optional
        The axes that are reduced together. Default: the last.

    Returns
    -------
    (mean, variance) : float64 arrays of the shape of the other axes.
        NaN for a row that holds a NaN or an infinity. A row of length 0 has mean 0, variance NaN.

    Raises
    ------
    TypeError, ValueError
        As for `layer_norm`.
    """
    layout = _layout(x, None, axis)
    with np.errstate(all="ignore"):
        rows = _centred(layout.rows(x), 0.0)
        return (
            layout.restore_stats(np.ldexp(rows.mean, rows.exponent)),
            layout.restore_stats(np.ldexp(rows.variance, 2 * rows.exponent)),
        )


# ---- rows: which elements belong together -------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """An array's shape and the sorted axes of it that are normalised together."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def outer(self) -> tuple[int, ...]:
        return tuple(n for i, n in enumerate(self.shape) if i not in self.axes)

    @property
    def inner(self) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in self.axes)

    @property
    def last(self) -> tuple[int, ...]:
        return tuple(range(-len(self.axes), 0))

    def rows(self, a: ArrayLike) -> NDArray[Any]:
        """`a` as (rows, n): the normalised axes last, in C order."""
        moved = np.moveaxis(np.asarray(a), self.axes, self.last)
        return moved.reshape(math.prod(self.outer), math.prod(self.inner))

    def restore(self, rows: NDArray[Any]) -> Float64:
        moved = np.moveaxis(rows.reshape(self.outer + self.inner), self.last, self.axes)
        return np.ascontiguousarray(moved, dtype=np.float64).reshape(self.shape)

    def restore_stats(self, column: NDArray[Any]) -> Float64:
        return column.reshape(self.outer).astype(np.float64)

    def restore_parameter(self, row: NDArray[Any]) -> Float64:
        return row.reshape(self.inner).astype(np.float64)

    def parameter(self, name: str, value: ArrayLike | None, missing: float) -> Float64:
        if value is None:
            return np.full((1, 1), missing)
        array = np.asarray(value, dtype=np.float64)
        if array.shape != self.inner:
            raise ValueError(f"{name} must have the shape {self.inner}, got {array.shape}")
        return array.reshape(1, -1)

    def statistic(self, name: str, value: ArrayLike) -> Float64:
        array = np.asarray(value, dtype=np.float64)
        if array.shape not in (self.outer, self.outer + (1,) * len(self.axes)):
            raise ValueError(f"{name} must have the shape {self.outer}, got {array.shape}")
        return array.reshape(-1, 1)


def _layout(x: ArrayLike, normalized_shape: Axes, axis: Axes) -> _Layout:
    array = np.asarray(x)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"x must hold real numbers, got dtype {array.dtype}")
    if normalized_shape is None:
        axes = normalize_axis_tuple(-1 if axis is None else axis, array.ndim, "axis")
        if not axes:
            raise ValueError("axis must name at least one axis, got ()")
        return _Layout(array.shape, tuple(sorted(axes)))
    if axis is not None:
        raise TypeError("normalized_shape and axis exclude each other, got both")
    if isinstance(normalized_shape, int | np.integer):
        normalized_shape = (int(normalized_shape),)
    trailing = tuple(normalized_shape)
    first = array.ndim - len(trailing)
    if not trailing or first < 0 or array.shape[first:] != trailing:
        raise ValueError(f"normalized_shape {trailing} is not the end of x's shape {array.shape}")
    return _Layout(array.shape, tuple(range(first, array.ndim)))


# ---- the arithmetic of a row --------------------------------------------------------------------


@dataclass(frozen=True)
class _Centred:
    """Rows divided by 2**exponent, less their mean. All but deviations have one column."""

    deviations: NDArray[Any]
    mean: NDArray[Any]
    variance: NDArray[Any]
    exponent: NDArray[Any]
    constant: NDArray[Any]

    @property
    def dtype(self) -> Any:
        return self.deviations.dtype.type


def _mean(rows: NDArray[Any]) -> Any:
    return rows.sum(-1, keepdims=True) / max(rows.shape[-1], 1)


def _centred(rows: NDArray[Any], eps: float) -> _Centred:
    narrow = rows.dtype.kind == "f" and rows.dtype.itemsize <= 4
    wide = rows.astype(np.float64 if narrow else np.longdouble)
    least = math.sqrt(eps) if math.isfinite(eps) else 0.0  # an infinite eps has no exponent
    largest = np.max(np.abs(wide), axis=-1, keepdims=True, initial=least)
    exponent = np.where(np.isfinite(largest), np.frexp(largest)[1], 0)
    wide = np.ldexp(wide, -exponent)

    # The rounding of the mean is the mean of what is left; taking it away too leaves deviations
    # that are right even where |mean| is 1e16 times their size.
    mean = _mean(wide)
    deviations = wide - mean
    correction = _mean(deviations)
    deviations -= correction

    # Only the last digit of a rounded mean would keep these from 0.
    constant = wide.max(-1, keepdims=True, initial=-np.inf) == wide.min(
        -1, keepdims=True, initial=np.inf
    )
    deviations[constant.ravel()] = 0
    mean = np.where(constant, wide[:, :1] if wide.size else 0, mean + correction)

    # inf - inf is NaN already, but only in some elements of the row.
    poisoned = ~np.isfinite(largest)
    deviations[poisoned.ravel()] = np.nan
    variance = np.full_like(mean, np.nan) if not rows.shape[-1] else _mean(deviations**2)
    return _Centred(
        deviations, np.where(poisoned, np.nan, mean), variance, exponent, constant & ~poisoned
    )
