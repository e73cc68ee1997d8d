"""The errors of batch, group and instance norm, in the units of `fastnorm.accuracy`.

What is said of rows there is true of units here (fastnorm.reference_channels): max|xh| and max|g|
are taken over all that is normalised together. Arrays are (N, C, ...), channels first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastnorm import accuracy
from fastnorm import reference_channels as reference

Array = NDArray[Any]
Gradients = tuple[Array, Array, Array]  # dx, dweight, dbias


# ---- batch norm: some channels at a time --------------------------------------------------------


def batch_norm_error(
    y: Array,
    x: Array,
    running: tuple[Array, Array] | None,
    weight: Array,
    bias: Array,
    eps: float = 1e-5,
) -> float:
    """The largest error of y; `running` are mean and variance in inference, None in training."""
    worst = 0.0
    for some in _chunks(x, 1):
        part = x[:, some]
        xh, *_ = _batch_norm(part, running and (running[0][some], running[1][some]), eps)
        units = reference.whole_channels(reference.planes_of(part, 1))
        worst = max(worst, _affine_error(units, y[:, some], xh, weight[some], bias[some]))
    return worst


def batch_norm_backward_errors(
    gradients: Gradients,
    dy: Array,
    x: Array,
    running: tuple[Array, Array] | None,
    weight: Array,
    eps: float = 1e-5,
) -> tuple[float, float, float]:
    """The largest errors of (dx, dweight, dbias)."""
    dx, dweight, dbias = gradients
    worst = [0.0, 0.0, 0.0]
    for some in _chunks(x, 1):
        part, dy_part, w = x[:, some], dy[:, some].astype(np.float64), weight[some]
        given = running and (running[0][some], running[1][some])
        xh, mean, rstd = _batch_norm(part, given, eps)
        before = given or (None, None)
        training = running is None
        exact = reference.batch_norm_backward(
            dy_part, part, before[0], before[1], w, None, training, eps, mean=mean, rstd=rstd
        )
        units = reference.whole_channels(reference.planes_of(part, 1))
        found = dweight[some], dbias[some]
        sums = map(accuracy.sum_error, found, exact[1:], _magnitudes(units, dy_part, xh))
        errors = _dx_error(units, dx[:, some], exact[0], rstd, dy_part, w), *sums
        worst = [max(pair) for pair in zip(worst, errors, strict=True)]
    return worst[0], worst[1], worst[2]


def running_error(
    found: tuple[Array, Array], before: tuple[Array, Array], x: Array, momentum: float = 0.1
) -> float:
    """Of running mean and variance after one call in training, torch's dialect.

    In units of the sum of their terms' magnitudes, which for a mean are those of x.
    """
    worst = 0.0
    for some in _chunks(x, 1):
        part = x[:, some]
        mean, variance = (array[some].astype(np.float64) for array in before)
        largest = np.abs(part.astype(np.float64)).max((0, *range(2, x.ndim)))
        scales = np.abs(mean) + largest, np.abs(variance)
        reference.batch_norm(part, mean, variance, training=True, momentum=momentum)
        for got, exact, scale in zip(found, (mean, variance), scales, strict=True):
            worst = max(worst, accuracy.sum_error(got[some], exact, scale + np.abs(exact)))
    return worst


def _batch_norm(x: Array, running: tuple[Array, Array] | None, eps: float) -> Any:
    """xh, mean and rstd."""
    mean, variance = running or (None, None)
    return reference.batch_norm(
        x, mean, variance, training=running is None, eps=eps, return_stats=True
    )


# ---- group and instance norm: some samples at a time --------------------------------------------


def group_norm_error(
    y: Array, x: Array, num_groups: int, weight: Array, bias: Array, eps: float = 1e-5
) -> float:
    """The largest error of y; instance norm has as many groups as channels."""
    worst = 0.0
    for some in _chunks(x, 0):
        xh = reference.group_norm(x[some], num_groups, eps=eps)
        units = reference.groups_of(reference.planes_of(x[some], 1), num_groups)
        worst = max(worst, _affine_error(units, y[some], xh, weight, bias))
    return worst


def group_norm_backward_errors(
    gradients: Gradients,
    dy: Array,
    x: Array,
    num_groups: int,
    weight: Array,
    eps: float = 1e-5,
) -> tuple[float, float, float]:
    """The largest errors of (dx, dweight, dbias)."""
    dx, *found = gradients
    dx_error = 0.0
    sums, magnitudes = np.zeros((2, len(weight))), np.zeros((2, len(weight)))
    for some in _chunks(x, 0):
        part, dy_part = x[some], dy[some].astype(np.float64)
        xh, mean, rstd = reference.group_norm(part, num_groups, eps=eps, return_stats=True)
        exact = reference.group_norm_backward(dy_part, part, num_groups, mean, rstd, weight)
        units = reference.groups_of(reference.planes_of(part, 1), num_groups)
        dx_error = max(dx_error, _dx_error(units, dx[some], exact[0], rstd, dy_part, weight))
        sums += exact[1:]
        magnitudes += _magnitudes(units, dy_part, xh)
    dweight_error, dbias_error = map(accuracy.sum_error, found, sums, magnitudes)
    return dx_error, dweight_error, dbias_error


# ---- what they share ----------------------------------------------------------------------------


def _affine_error(units: reference.Units, y: Array, xh: Array, weight: Array, bias: Array) -> float:
    parameters = units.parameter("weight", weight, 1.0), units.parameter("bias", bias, 0.0)
    return accuracy.affine_error(units.rows(y), units.rows(xh), *parameters)


def _dx_error(
    units: reference.Units, dx: Array, exact: Array, rstd: Array, dy: Array, weight: Array
) -> float:
    g = units.rows(dy) * units.parameter("weight", weight, 1.0)
    return accuracy.gradient_error(units.rows(dx), units.rows(exact), rstd.reshape(-1), g)


def _magnitudes(units: reference.Units, dy: Array, xh: Array) -> tuple[Array, Array]:
    """Those of the terms of dweight and of dbias, summed."""
    sizes, rows = np.abs(units.rows(dy)), np.abs(units.rows(xh))
    terms = sizes * np.maximum(1, rows), sizes
    return units.parameter_gradient(terms[0], None), units.parameter_gradient(terms[1], None)


def _chunks(x: Array, axis: int) -> Iterator[slice]:
    """Slices of an axis, of as many elements as `fastnorm.accuracy` takes at a time."""
    length = x.shape[axis]
    step = max(1, accuracy.CHUNK * length // max(1, x.size))
    return (slice(first, first + step) for first in range(0, length, step))
