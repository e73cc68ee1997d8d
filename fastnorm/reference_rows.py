"""What the ops of `fastnorm.reference` share: which elements make a row, and a row's arithmetic.

An op asks a `Layout` or `Segments` for its arrays as (rows, n) and hands results back to it. Rows
shorter than n, and elements that are masked out, are told from the others by the boolean array
``valid``; where it is False, rows hold 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Axes = int | Sequence[int] | None


def real(name: str, value: ArrayLike | None) -> Array:
    """`value` as an array of floating-point numbers, no digit lost; integers become float64."""
    array: Array = np.asarray(value)
    if array.dtype.name == "bfloat16":  # of ml_dtypes; to NumPy it is none of its kinds
        return array.astype(np.float32)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name}: got dtype {array.dtype}, wanted real numbers")
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def widen(array: Array) -> Array:
    """In the type that is worked in: float64, for float64 the wider one."""
    return array.astype(np.float64 if array.dtype.itemsize <= 4 else np.longdouble)


# ---- which elements belong together -------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """An array's shape and the sorted axes of it that are normalised together."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    valid: NDArray[np.bool_]  # (rows, n)

    @property
    def outer(self) -> tuple[int, ...]:
        return tuple(n for i, n in enumerate(self.shape) if i not in self.axes)

    @property
    def inner(self) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in self.axes)

    @property
    def last(self) -> tuple[int, ...]:
        return tuple(range(-len(self.axes), 0))

    def rows(self, array: Array) -> Array:
        """`array` as (rows, n): the normalised axes last, in C order."""
        moved = np.moveaxis(array, self.axes, self.last)
        return np.where(self.valid, moved.reshape(self.valid.shape), array.dtype.type(0))

    def restore(self, rows: Array) -> Float64:
        valid_rows = np.where(self.valid, rows, 0)
        moved = np.moveaxis(valid_rows.reshape(self.outer + self.inner), self.last, self.axes)
        return np.ascontiguousarray(moved, dtype=np.float64).reshape(self.shape)

    def restore_stats(self, column: Array) -> Float64:
        return column.reshape(self.outer).astype(np.float64)

    def parameter(self, name: str, value: ArrayLike | None, missing: float) -> Float64:
        """As (1, n) or, where it has dimensions before the normalised ones, as (rows, n)."""
        if value is None:
            return np.full((1, 1), missing)
        array = real(name, value).astype(np.float64)
        if array.shape == self.inner:
            return array.reshape(1, -1)
        lead = array.shape[: -len(self.axes)]
        if array.shape[len(lead) :] != self.inner or not _broadcasts(lead, self.outer):
            raise ValueError(
                f"{name}: got shape {array.shape}, wanted {self.inner}, the normalised shape, "
                f"after dimensions that broadcast to {self.outer}"
            )
        return np.broadcast_to(array, self.outer + self.inner).reshape(self.valid.shape)

    def parameter_gradient(self, terms: Array, shape: tuple[int, ...] | None) -> Float64:
        """The sum of `terms` (rows, n) over all rows that share an element of the parameter."""
        shape = self.inner if shape is None else shape
        lead = shape[: -len(self.axes)]
        lead = (1,) * (len(self.outer) - len(lead)) + lead
        summed = tuple(i for i, n in enumerate(lead) if n == 1)
        terms = terms.reshape(self.outer + self.inner)
        return terms.sum(summed, keepdims=True).reshape(shape).astype(np.float64)

    def statistic(self, name: str, value: ArrayLike | None) -> Float64:
        array = real(name, value).astype(np.float64)
        if array.shape not in (self.outer, self.outer + (1,) * len(self.axes)):
            raise ValueError(f"{name}: got shape {array.shape}, wanted {self.outer}")
        return array.reshape(-1, 1)


def layout_of(
    x: Array,
    normalized_shape: Axes,
    axis: Axes,
    lengths: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Layout:
    axes = _axes(x.shape, normalized_shape, axis)
    rows = math.prod(n for i, n in enumerate(x.shape) if i not in axes)
    everything = np.broadcast_to(True, (rows, math.prod(x.shape[i] for i in axes)))
    layout = Layout(x.shape, axes, everything)
    if lengths is not None and mask is not None:
        raise TypeError("lengths and mask exclude each other: got both, wanted one")
    if lengths is not None:
        return Layout(x.shape, axes, _valid_of_lengths(layout, lengths))
    if mask is not None:
        return Layout(x.shape, axes, _valid_of_mask(layout, mask))
    return layout


def _axes(shape: tuple[int, ...], normalized_shape: Axes, axis: Axes) -> tuple[int, ...]:
    if normalized_shape is None:
        axes = normalize_axis_tuple(-1 if axis is None else axis, len(shape), "axis")
        if not axes:
            raise ValueError("axis: got (), wanted at least one axis")
        return tuple(sorted(axes))
    if axis is not None:
        raise TypeError("normalized_shape and axis exclude each other: got both, wanted one")
    if isinstance(normalized_shape, int | np.integer):
        normalized_shape = (int(normalized_shape),)
    trailing = tuple(normalized_shape)
    first = len(shape) - len(trailing)
    if not trailing or first < 0 or shape[first:] != trailing:
        raise ValueError(f"normalized_shape: got {trailing}, wanted the end of x's shape {shape}")
    return tuple(range(first, len(shape)))


def _valid_of_lengths(layout: Layout, lengths: ArrayLike) -> NDArray[np.bool_]:
    array, n = np.asarray(lengths), layout.valid.shape[1]
    if array.dtype.kind not in "iu":
        raise TypeError(f"lengths: got dtype {array.dtype}, wanted integers")
    if not _broadcasts(array.shape, layout.outer):
        raise ValueError(f"lengths: got shape {array.shape}, wanted {layout.outer}")
    if array.size and not (array.min() >= 0 and array.max() <= n):
        raise ValueError(f"lengths: got {array.min()} to {array.max()}, wanted 0 to {n}")
    return np.arange(n) < np.broadcast_to(array, layout.outer).reshape(-1, 1)


def _valid_of_mask(layout: Layout, mask: ArrayLike) -> NDArray[np.bool_]:
    array = np.asarray(mask)
    if array.dtype.kind != "b":
        raise TypeError(f"mask: got dtype {array.dtype}, wanted bool")
    if not _broadcasts(array.shape, layout.shape):
        raise ValueError(f"mask: got shape {array.shape}, wanted {layout.shape}")
    return layout.rows(np.broadcast_to(array, layout.shape))


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    trailing = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(shape, trailing, strict=True))


@dataclass(frozen=True)
class Segments:
    """Packed rows of different lengths, with the methods of `Layout`.

    Row s has the places ``index[s, valid[s]]`` of the flattened array; all rows are as long as the
    longest.
    """

    shape: tuple[int, ...]
    index: NDArray[np.intp]
    valid: NDArray[np.bool_]

    @property
    def features(self) -> tuple[int, ...]:
        return self.shape[1:]

    def rows(self, array: Array) -> Array:
        rows = np.zeros(self.valid.shape, array.dtype)
        rows[self.valid] = array.reshape(-1)[self.index[self.valid]]
        return rows

    def restore(self, rows: Array) -> Float64:
        flat = np.zeros(math.prod(self.shape))
        flat[self.index[self.valid]] = rows[self.valid]
        return flat.reshape(self.shape)

    def restore_stats(self, column: Array) -> Float64:
        return column.reshape(-1).astype(np.float64)

    def parameter(self, name: str, value: ArrayLike | None, missing: float) -> Float64:
        """As (1, n): repeated along the segment."""
        if value is None:
            return np.full((1, 1), missing)
        array = real(name, value).astype(np.float64)
        if array.shape != self.features:
            raise ValueError(f"{name}: got shape {array.shape}, wanted {self.features}")
        repeats = self.valid.shape[1] // max(array.size, 1)
        return np.tile(array.reshape(1, -1), repeats)

    def parameter_gradient(self, terms: Array, shape: tuple[int, ...] | None) -> Float64:
        repeats = terms.shape[1] // max(math.prod(self.features), 1)
        terms = terms.reshape(len(terms), repeats, *self.features)
        return terms.sum((0, 1)).astype(np.float64)

    def statistic(self, name: str, value: ArrayLike | None) -> Float64:
        array = real(name, value).astype(np.float64)
        if array.shape != self.valid.shape[:1]:
            raise ValueError(f"{name}: got shape {array.shape}, wanted {self.valid.shape[:1]}")
        return array.reshape(-1, 1)


def segments_of(x: Array, offsets: ArrayLike) -> Segments:
    edges = np.asarray(offsets)
    if edges.dtype.kind not in "iu":
        raise TypeError(f"offsets: got dtype {edges.dtype}, wanted integers")
    if not x.ndim:
        raise ValueError("x: got shape (), wanted (total, *features)")
    edges = edges.astype(np.intp)
    total = x.shape[0]
    if edges.ndim != 1 or not edges.size or (edges[0], edges[-1]) != (0, total):
        raise ValueError(f"offsets: got {edges}, wanted one dimension, from 0 to {total}")
    counts = np.diff(edges)
    if (counts < 0).any():
        raise ValueError(f"offsets: got {edges}, wanted ascending numbers")
    width = math.prod(x.shape[1:])
    place = np.arange(counts.max(initial=0) * width)
    index = edges[:-1, None] * width + place
    return Segments(x.shape, index, place < counts[:, None] * width)


# ---- the arithmetic of a row --------------------------------------------------------------------


def mean_of(rows: Array, valid: NDArray[np.bool_]) -> Any:
    """The mean of the valid elements, all others being 0; 0 where there are none."""
    return rows.sum(-1, keepdims=True) / np.maximum(valid.sum(-1, keepdims=True), 1)


@dataclass(frozen=True)
class Spread:
    """Rows divided by 2**exponent, less their mean. All but deviations have one column.

    For RMS norm nothing is taken away: the mean is 0 and deviations are the row itself.
    """

    deviations: Array
    mean: Array
    square: Array  # the mean of deviations**2
    exponent: Array
    constant: Array  # all deviations are 0

    @property
    def dtype(self) -> Any:
        return self.deviations.dtype.type

    def rstd(self, eps: float) -> Any:
        """That of the divided rows."""
        return 1 / np.sqrt(self.square + np.ldexp(self.dtype(eps), -2 * self.exponent))


def spread(rows: Array, valid: NDArray[np.bool_], eps: float, centred: bool) -> Spread:
    """Rows of any finite size: they are divided by a power of two before anything is squared."""
    wide = widen(rows)
    least = math.sqrt(eps) if math.isfinite(eps) else 0.0  # an infinite eps has no exponent
    largest = np.max(np.abs(wide), axis=-1, keepdims=True, initial=least)
    exponent = np.where(np.isfinite(largest), np.frexp(largest)[1], 0)
    wide = np.ldexp(wide, -exponent)
    if centred:
        mean, deviations, constant = _centre(wide, valid)
    else:
        mean, deviations, constant = np.zeros_like(largest), wide, ~wide.any(-1, keepdims=True)

    # inf - inf is NaN already, but only in some elements of the row.
    poisoned = ~np.isfinite(largest)
    deviations = np.where(valid & poisoned, np.nan, deviations)
    empty = ~valid.any(-1, keepdims=True)
    square = np.where(empty, np.nan, mean_of(deviations**2, valid))
    mean = np.where(poisoned, np.nan, mean)
    return Spread(deviations, mean, square, exponent, constant & ~poisoned)


def _centre(wide: Array, valid: NDArray[np.bool_]) -> tuple[Any, Any, Any]:
    """Mean, deviations and whether a row is constant."""
    # The rounding of the mean is the mean of what is left; taking it away too leaves deviations
    # that are right even where |mean| is 1e16 times their size.
    mean = mean_of(wide, valid)
    deviations = np.where(valid, wide - mean, 0)
    correction = mean_of(deviations, valid)

    # Only the last digit of a rounded mean would keep these from 0.
    highest = np.where(valid, wide, -np.inf).max(-1, keepdims=True, initial=-np.inf)
    lowest = np.where(valid, wide, np.inf).min(-1, keepdims=True, initial=np.inf)
    constant = highest == lowest
    deviations = np.where(valid & ~constant, deviations - correction, 0)
    return np.where(constant, highest, mean + correction), deviations, constant


# ---- activations --------------------------------------------------------------------------------


def _relu(y: Array) -> Any:
    return np.maximum(y, 0)


def _sigmoid(y: Array) -> Any:
    e = np.exp(-np.abs(y))  # cannot overflow
    return np.where(y >= 0, 1, e) / (1 + e)


def _silu(y: Array) -> Any:
    return y * _sigmoid(y)


def _gelu(y: Array) -> Any:
    """y P(N < y) for a standard normal N, by erfc: 1 + erf(y / sqrt(2)) has no digits far below 0.

    The C library's erfc is right to an ulp or so of float64. Where y has more digits, what they
    add follows from the derivative, and the relative error is some 1e-16; where it has not, the
    rounding of the argument grows with y**2, to 1e-13 where float64 ends.
    """
    t = -y / np.sqrt(y.dtype.type(2))
    rounded = t.astype(np.float64)
    tail = np.vectorize(math.erfc, otypes=[np.float64])(rounded)
    slope = -2 / math.sqrt(math.pi) * np.exp(-(rounded**2))
    rest = np.where(np.isfinite(rounded), t - rounded, 0)
    return y * (tail + slope * rest) / 2


def _gelu_tanh(y: Array) -> Any:
    """y (1 + tanh(u)) / 2 = y sigmoid(2 u), which has digits far below 0 too."""
    return y * _sigmoid(2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))


ACTIVATIONS: dict[str | None, Callable[[Array], Any]] = {
    None: lambda y: y,
    "relu": _relu,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}


def activation_of(name: str | None) -> Callable[[Array], Any]:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: got {name!r}, wanted one of {list(ACTIVATIONS)}")
    return ACTIVATIONS[name]


# ---- the two computations -----------------------------------------------------------------------


def forward(
    rows_of: Layout | Segments,
    x: Array,
    w: Float64,
    b: Float64 | float,
    eps: float,
    activation: str | None,
    *,
    centred: bool = True,
) -> tuple[Float64, Float64, Float64]:
    """y, mean and rstd."""
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}, wanted at least 0")
    activate = activation_of(activation)
    with np.errstate(all="ignore"):
        rows = spread(rows_of.rows(x), rows_of.valid, eps, centred)
        rstd = rows.rstd(eps)
        xh = np.where(rows.constant, 0, rows.deviations * rstd)
        return (
            rows_of.restore(activate(xh * w + b)),
            rows_of.restore_stats(np.ldexp(rows.mean, rows.exponent)),
            rows_of.restore_stats(np.ldexp(rstd, -rows.exponent)),
        )


def backward(
    rows_of: Layout | Segments,
    dy: Array,
    x: Array,
    r: Float64,
    w: Float64,
    parameter_shapes: Sequence[tuple[int, ...] | None],
    output_mask: Sequence[bool],
    *,
    centred: bool = True,
    output: tuple[Float64, Float64 | float] | None = None,
) -> Any:
    """dx, dweight and, if there is a second shape, dbias. `output`: weight and bias, x being y."""
    if dy.shape != x.shape:
        raise ValueError(f"dy: got shape {dy.shape}, wanted {x.shape}, the shape of x")
    wanted = 1 + len(parameter_shapes)
    if len(output_mask) != wanted:
        raise ValueError(f"output_mask: got {len(output_mask)} items, wanted {wanted}")
    valid = rows_of.valid
    results: list[Float64 | None] = [None] * wanted
    with np.errstate(all="ignore"):
        if output is None:
            xh, r, idle = _xh_of_input(rows_of.rows(x), valid, r, centred)
        else:
            xh, r, idle = _xh_of_output(rows_of.rows(x), valid, r, *output)
        dy = rows_of.rows(dy).astype(xh.dtype)
        for k, (terms, shape) in enumerate(zip((dy * xh, dy), parameter_shapes, strict=False), 1):
            if output_mask[k]:
                results[k] = rows_of.parameter_gradient(terms, shape)
        if output_mask[0]:
            g = dy * w
            towards = g - xh * mean_of(g * xh, valid)
            if centred:
                towards = towards - mean_of(g, valid)
            results[0] = rows_of.restore(np.where(idle, 0, r * towards))
    return tuple(results)


def _xh_of_input(x: Array, valid: Any, r: Float64, centred: bool) -> tuple[Any, Any, Any]:
    """xh, r and whether dx is 0: a constant row of eps = 0."""
    rows = spread(x, valid, 0.0, centred)
    lost = np.isinf(r)
    scaled_r = np.where(lost, rows.rstd(0.0), np.ldexp(r, rows.exponent))
    xh = np.where(valid & ~rows.constant, rows.deviations * scaled_r, 0)
    r = np.where(lost, np.ldexp(scaled_r, -rows.exponent), r)
    return xh, r, lost & rows.constant


def _xh_of_output(
    y: Array, valid: Any, r: Float64, w: Float64, b: Float64 | float
) -> tuple[Any, Any, Any]:
    xh = np.where(valid, (widen(y) - b) / w, 0)
    return xh, r, np.isinf(r) & ~xh.any(-1, keepdims=True)


def offset_weight(rows_of: Layout | Segments, weight: ArrayLike | None, offset: float) -> Float64:
    return rows_of.parameter("weight", weight, 1.0) + (0.0 if weight is None else offset)


def rms_eps(eps: float | None, *arrays: Array) -> float:
    if eps is not None:
        return eps
    wide = any(array.dtype.itemsize > 4 for array in arrays)
    return float(np.finfo(np.float64 if wide else np.float32).eps)


def shape_of(*parameters: ArrayLike | None) -> tuple[int, ...] | None:
    """That of the first parameter that is there."""
    return next((np.shape(p) for p in parameters if p is not None), None)
