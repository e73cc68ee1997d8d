"""How errors are counted: the bounds that fastnorm keeps, each as error over what it allows.

For float32 the allowed error is 1e-6 times

    y         |weight| max(1, max|xh|) + |bias|     (for unit weights: max(1, max|y|))
    dx        rstd max|g|, with g = dy weight
    dweight   the sum over rows of |dy| max(1, |xh|)
    dbias     the sum over rows of |dy|

with xh the normalised row; max|..| is taken over the row. For float64 it is as many ulps. An xh
next to 0 is the difference of x and a mean of the row's size: it is known to digits of the row, not
to digits of its own, hence the 1 for y and for dweight. Everything is compared with
`fastnorm.reference`; rows are the last axis.

float16 and bfloat16 are computed in float32 and rounded once: to the allowed error comes half an
ulp of the type that is stored (`stored_error`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastnorm import reference

Array = NDArray[Any]

# The reference works in temporaries of float64; so many elements at a time keep them in bounds.
CHUNK = 1 << 21


def bound(dtype: Any) -> float:
    """The largest error allowed, in the units above: 1e-6 for what is computed in float32."""
    computed = np.float64 if np.dtype(dtype).itemsize == 8 else np.float32
    return 1e-6 * float(np.finfo(computed).eps / np.finfo(np.float32).eps)


# ---- any op: what is left to the caller is to say what would be exact ----------------------------


def affine_error(y: Array, xh: Array, weight: Any = 1.0, bias: Any = 0.0) -> float:
    """The largest error of y = xh * weight + bias, xh being exact; inf for a NaN.

    weight and bias broadcast against xh: those of a norm, of each head or of each sample.
    """
    w, b = np.asarray(weight, np.float64), np.asarray(bias, np.float64)
    return _ratio(y - (xh * w + b), np.abs(w) * np.maximum(1, _largest(xh)) + np.abs(b))


def gradient_error(dx: Array, exact: Array, rstd: Array, g: Array) -> float:
    """The largest error of dx, with g = dy weight and rstd of the shape of the other axes."""
    return _ratio(dx - exact, np.asarray(rstd, np.float64)[..., None] * _largest(g))


def sum_error(total: Array, exact: Array, magnitudes: Array) -> float:
    """The largest error of dweight or dbias over the sum of its terms' magnitudes."""
    return _ratio(total - exact, magnitudes)


# Significant bits, and the exponent of the least normal number.
STORED = {"float16": (11, -14), "bfloat16": (8, -126), "float32": (24, -126)}


def ulp(values: Array, dtype: Any) -> Array:
    """The distance of neighbours in `dtype`, a type of `STORED`, around each value."""
    digits, least = STORED[np.dtype(dtype).name]
    magnitudes = np.maximum(np.abs(np.asarray(values, np.float64)), 2.0**least)
    return np.ldexp(1.0, np.frexp(magnitudes)[1] - digits)


def stored_error(y: Array, exact: Array, terms: Array) -> float:
    """The largest error of y, of a half type, over ``ulp(exact) / 2 + 1e-6 terms``: at most 1.

    `terms` are the magnitudes of what an element is the sum of, |xh weight| + |bias| for a forward
    pass; rstd max|g| for dx. Where exact is beyond the type's range, y is infinite.
    """
    with np.errstate(over="ignore"):
        overflow = np.isinf(exact.astype(y.dtype).astype(np.float64))
    got = y.astype(np.float64)
    error = np.where(overflow & (got == np.copysign(np.inf, exact)), 0, got - exact)
    return _ratio(error, ulp(exact, y.dtype) / 2 + bound(y.dtype) * terms)


# ---- layer norm ----------------------------------------------------------------------------------


def layer_norm_error(
    y: Array, x: Array, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5
) -> float:
    """The largest error of y = layer_norm(x, x.shape[-1], weight, bias, eps); inf for a NaN."""
    return layer_norm_errors([y], x, weight, bias, eps)[0]


def layer_norm_errors(
    ys: Sequence[Array],
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> list[float]:
    """The same for several results of one call."""
    w, b = 1.0 if weight is None else weight, 0.0 if bias is None else bias
    worst = [0.0] * len(ys)
    for rows in _chunks(x):
        xh = reference.layer_norm(_rows(x)[rows], eps=eps)
        for k, y in enumerate(ys):
            worst[k] = max(worst[k], affine_error(_rows(y)[rows], xh, w, b))
    return worst


def layer_norm_backward_errors(
    gradients: tuple[Array, Array, Array],
    dy: Array,
    x: Array,
    weight: Array | None = None,
    eps: float = 1e-5,
) -> tuple[float, float, float]:
    """The largest errors of (dx, dweight, dbias); inf for a NaN."""
    dx, dweight, dbias = gradients
    cols = x.shape[-1]
    dx_error = 0.0
    sums = np.zeros((2, cols))
    magnitudes = np.zeros((2, cols))
    w = np.ones(cols) if weight is None else weight.astype(np.float64)
    for rows in _chunks(x):
        x_rows, dy_rows = _rows(x)[rows], _rows(dy)[rows].astype(np.float64)
        xh, mean, rstd = reference.layer_norm(x_rows, eps=eps, return_stats=True)
        exact = reference.layer_norm_backward(dy_rows, x_rows, cols, mean, rstd, w)
        dx_error = max(dx_error, gradient_error(_rows(dx)[rows], exact[0], rstd, dy_rows * w))
        sums += exact[1:]
        terms = np.abs(dy_rows) * np.maximum(1, np.abs(xh)), np.abs(dy_rows)
        magnitudes += terms[0].sum(0), terms[1].sum(0)
    return (
        dx_error,
        sum_error(dweight, sums[0], magnitudes[0]),
        sum_error(dbias, sums[1], magnitudes[1]),
    )


def moments_errors(statistics: tuple[Array, Array], x: Array) -> tuple[float, float]:
    """The largest errors of (mean, variance), over max|x| of the row and over the variance."""
    worst = np.zeros(2)
    for rows in _chunks(x):
        mean, variance = reference.moments(_rows(x)[rows])
        scales = _largest(_rows(x)[rows].astype(np.float64))[:, 0], variance
        for k, (exact, scale) in enumerate(zip((mean, variance), scales, strict=True)):
            got = np.reshape(statistics[k], -1)[rows]
            worst[k] = max(worst[k], _ratio(got - exact, scale))
    return float(worst[0]), float(worst[1])


# ---- RMS norm ------------------------------------------------------------------------------------


def rms_norm_error(
    y: Array,
    x: Array,
    weight: Array | None = None,
    eps: float | None = None,
    offset: float = 0.0,
) -> float:
    """The largest error of y = rms_norm(x, x.shape[-1], weight, eps, offset=offset)."""
    w = 1.0 if weight is None else weight.astype(np.float64) + offset
    worst = 0.0
    for rows in _chunks(x):
        xh = reference.rms_norm(_rows(x)[rows], eps=eps)
        worst = max(worst, affine_error(_rows(y)[rows], xh, w))
    return worst


def rms_norm_backward_errors(
    gradients: tuple[Array, Array],
    dy: Array,
    x: Array,
    weight: Array | None = None,
    eps: float | None = None,
    offset: float = 0.0,
) -> tuple[float, float]:
    """The largest errors of (dx, dweight); inf for a NaN."""
    dx, dweight = gradients
    cols = x.shape[-1]
    dx_error = 0.0
    total, magnitude = np.zeros(cols), np.zeros(cols)
    w = np.ones(cols) if weight is None else weight.astype(np.float64) + offset
    for rows in _chunks(x):
        x_rows, dy_rows = _rows(x)[rows], _rows(dy)[rows].astype(np.float64)
        xh, rstd = reference.rms_norm(x_rows, eps=eps, return_stats=True)
        exact = reference.rms_norm_backward(dy_rows, x_rows, cols, rstd, w)
        dx_error = max(dx_error, gradient_error(_rows(dx)[rows], exact[0], rstd, dy_rows * w))
        total += exact[1]
        magnitude += (np.abs(dy_rows) * np.maximum(1, np.abs(xh))).sum(0)
    return dx_error, sum_error(dweight, total, magnitude)


# ---- what they share -----------------------------------------------------------------------------


def _rows(a: Array) -> Array:
    return a.reshape(-1, a.shape[-1])


def _chunks(x: Array) -> Iterator[slice]:
    """The rows of x, some at a time."""
    count = _rows(x).shape[0]
    step = max(1, CHUNK // max(1, x.shape[-1]))
    return (slice(first, first + step) for first in range(0, count, step))


def _largest(rows: Array) -> Any:
    """max|..| of each row, in a column."""
    return np.max(np.abs(rows), axis=-1, keepdims=True, initial=0)


def _ratio(error: Array, scale: Array) -> float:
    """max(|error| / scale), where 0 / 0 is no error and NaN is the worst of all."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(error == 0, 0, np.abs(error) / scale)
    return float(np.max(np.where(np.isnan(ratios), np.inf, ratios), initial=0))
