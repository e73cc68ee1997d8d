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
    """The largest error allowed, in the units above: 1e-6 for float32."""
    return 1e-6 * float(np.finfo(dtype).eps / np.finfo(np.float32).eps)


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
    worst = [0.0] * len(ys)
    for rows in _chunks(x):
        xh = reference.layer_norm(_rows(x)[rows], eps=eps)
        w = 1.0 if weight is None else weight.astype(np.float64)
        b = 0.0 if bias is None else bias.astype(np.float64)
        scale = np.abs(w) * np.maximum(1, _largest(xh)) + np.abs(b)
        exact = xh * w + b
        for k, y in enumerate(ys):
            worst[k] = max(worst[k], _ratio(_rows(y)[rows] - exact, scale))
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
        scale = rstd[:, None] * _largest(dy_rows * w)
        dx_error = max(dx_error, _ratio(_rows(dx)[rows] - exact[0], scale))
        sums += exact[1:]
        terms = np.abs(dy_rows) * np.maximum(1, np.abs(xh)), np.abs(dy_rows)
        magnitudes += terms[0].sum(0), terms[1].sum(0)
    errors = np.stack([dweight, dbias]) - sums
    return dx_error, _ratio(errors[0], magnitudes[0]), _ratio(errors[1], magnitudes[1])


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
