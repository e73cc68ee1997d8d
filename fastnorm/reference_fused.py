"""The ops of `fastnorm.reference` that do more than one norm of one array: a residual that is added
first, parameters of each sample, several norms of the same x. To be called from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .reference_rows import (
    Array,
    Axes,
    Layout,
    backward,
    forward,
    layout_of,
    offset_weight,
    real,
    rms_eps,
    shape_of,
    widen,
)

# ---- a residual is added first ------------------------------------------------------------------


def add_layer_norm(
    x: ArrayLike,
    residual: ArrayLike,
    normalized_shape: Axes = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: Axes = None,
    linear_bias: ArrayLike | None = None,
    sum_dtype: DTypeLike | None = None,
    return_stats: bool = False,
    activation: str | None = None,
) -> tuple[Any, ...]:
    """The sum s = (x + linear_bias) + residual and its layer norm (ONNX Runtime's
    SkipLayerNormalization, whose eps is 1e-12).

    Parameters
    ----------
    x : array_like
        The output of a linear layer.
    residual : array_like of x's shape
    normalized_shape, weight, bias, eps, axis, return_stats, activation
        As for `layer_norm`.
    linear_bias : array_like of the normalised shape, optional
        The bias of the linear layer, where it was left out.
    sum_dtype : dtype, optional
        Work the sum out as the fast functions do, each addition rounded to float32 (to float64 for
        a sum in float64), and round it to this type before it is normalised. Default: unrounded.

    Returns
    -------
    (y, sum) or (y, sum, mean, rstd) : float64 arrays.

    Raises
    ------
    TypeError, ValueError
        As for `layer_norm`.
    """
    x = real("x", x)
    layout = layout_of(x, normalized_shape, axis)
    w = layout.parameter("weight", weight, 1.0)
    b = layout.parameter("bias", bias, 0.0)
    s = _sum(layout, x, real("residual", residual), sum_dtype, linear_bias=linear_bias)
    y, mean, rstd = forward(layout, real("sum", s), w, b, eps, activation)
    return (y, _float64(s), mean, rstd) if return_stats else (y, _float64(s))


def add_layer_norm_backward(
    dy: ArrayLike,
    dsum: ArrayLike | None,
    sum: ArrayLike,
    normalized_shape: Axes,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axes = None,
    output_mask: Sequence[bool] = (True, True, True),
) -> tuple[Any, Any, Any]:
    """The gradients of `add_layer_norm`: dx, the same for x and for residual, dweight and dbias.

    ``dsum`` is the gradient with respect to the sum that was returned, None where there is none;
    ``dx = dsum + what layer_norm_backward(dy, sum, ...) says``. The gradient of linear_bias is dx
    summed over the rows. Parameters, results and errors are those of `layer_norm_backward`.
    """
    s, dy = real("sum", sum), real("dy", dy)
    layout = layout_of(s, normalized_shape, axis)
    layout.statistic("mean", mean)
    r = layout.statistic("rstd", rstd)
    w = layout.parameter("weight", weight, 1.0)
    layout.parameter("bias", bias, 0.0)
    shapes = shape_of(weight, bias), shape_of(bias, weight)
    dx, dweight, dbias = backward(layout, dy, s, r, w, shapes, output_mask)
    return _with_dsum(dx, dsum), dweight, dbias


def add_rms_norm(
    x: ArrayLike,
    residual: ArrayLike,
    normalized_shape: Axes = None,
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    axis: Axes = None,
    linear_bias: ArrayLike | None = None,
    offset: float = 0.0,
    sum_dtype: DTypeLike | None = None,
    return_stats: bool = False,
    activation: str | None = None,
) -> tuple[Any, ...]:
    """The sum s = (x + linear_bias) + residual and its RMS norm.

    Parameters and errors are those of `add_layer_norm` and `rms_norm`.

    Returns
    -------
    (y, sum) or (y, sum, rstd) : float64 arrays.
    """
    x, residual = real("x", x), real("residual", residual)
    layout = layout_of(x, normalized_shape, axis)
    w = offset_weight(layout, weight, offset)
    s = _sum(layout, x, residual, sum_dtype, linear_bias=linear_bias)
    eps = rms_eps(eps, x, residual)
    y, _, rstd = forward(layout, real("sum", s), w, 0.0, eps, activation, centred=False)
    return (y, _float64(s), rstd) if return_stats else (y, _float64(s))


def add_rms_norm_backward(
    dy: ArrayLike,
    dsum: ArrayLike | None,
    sum: ArrayLike,
    normalized_shape: Axes,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: Axes = None,
    offset: float = 0.0,
    output_mask: Sequence[bool] = (True, True),
) -> tuple[Any, Any]:
    """The gradients of `add_rms_norm`: dx, the same for x and for residual, and dweight.

    As `add_layer_norm_backward`, with what `rms_norm_backward` says.
    """
    s, dy = real("sum", sum), real("dy", dy)
    layout = layout_of(s, normalized_shape, axis)
    r = layout.statistic("rstd", rstd)
    w = offset_weight(layout, weight, offset)
    shapes = (shape_of(weight),)
    dx, dweight = backward(layout, dy, s, r, w, shapes, output_mask, centred=False)
    return _with_dsum(dx, dsum), dweight


# ---- scale and shift of each sample -------------------------------------------------------------


def adaptive_layer_norm(
    x: ArrayLike,
    scale: ArrayLike,
    shift: ArrayLike | None,
    normalized_shape: Axes = None,
    eps: float = 1e-6,
    *,
    gate: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    sum_dtype: DTypeLike | None = None,
    return_stats: bool = False,
    activation: str | None = None,
) -> Any:
    """Adaptive layer norm (DiT's adaLN, Peebles and Xie 2022, arXiv:2212.09748; FiLM)::

        y = xh (1 + scale) + shift

    With a residual, what is normalised is the sum ``residual + gate * x``: x, a sub-layer's output,
    joins the stream, and the next adaptive norm follows at once.

    Parameters
    ----------
    x : array_like of shape (B, ..., *normalized)
    scale, shift, gate : array_like
        Of shape (B, *normalized): one for each sample, the same for all its tokens. Or of as many
        dimensions as x, broadcastable to x's shape, the normalised axes in full. shift and gate may
        be absent; then they count as zeros and ones.
    normalized_shape, eps, return_stats, activation
        As for `layer_norm`.
    residual : array_like of x's shape, optional
    sum_dtype : dtype, optional
        As for `add_layer_norm`; the product with the gate is rounded too.

    Returns
    -------
    y or (y, mean, rstd) : float64 arrays; with a residual (y, sum) or (y, sum, mean, rstd).

    Raises
    ------
    TypeError, ValueError
        As for `layer_norm`. A gate without a residual is a TypeError.
    """
    x = real("x", x)
    if gate is not None and residual is None:
        raise TypeError("gate: got an array, wanted None without a residual")
    layout = layout_of(x, normalized_shape, None)
    w = 1 + layout.parameter("scale", _of_samples("scale", scale, layout), 0.0)
    b = layout.parameter("shift", _of_samples("shift", shift, layout), 0.0)
    if residual is None:
        y, mean, rstd = forward(layout, x, w, b, eps, activation)
        return (y, mean, rstd) if return_stats else y
    gate = _of_samples("gate", gate, layout)
    s = _sum(layout, x, real("residual", residual), sum_dtype, gate=gate)
    y, mean, rstd = forward(layout, real("sum", s), w, b, eps, activation)
    return (y, _float64(s), mean, rstd) if return_stats else (y, _float64(s))


def adaptive_layer_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    scale: ArrayLike,
    normalized_shape: Axes,
    mean: ArrayLike,
    rstd: ArrayLike,
    *,
    output_mask: Sequence[bool] = (True, True, True),
) -> tuple[Any, Any, Any]:
    """The gradients of `adaptive_layer_norm` with respect to x (or the sum), scale and shift.

    `layer_norm_backward` with weight = 1 + scale; dscale and dshift, of scale's shape, are summed
    over the rows that share a scale. Where there was a residual, ``x`` is the sum.
    """
    x, dy = real("x", x), real("dy", dy)
    layout = layout_of(x, normalized_shape, None)
    layout.statistic("mean", mean)
    r = layout.statistic("rstd", rstd)
    full = _of_samples("scale", scale, layout)
    w = 1 + layout.parameter("scale", full, 0.0)
    shapes = (shape_of(full), shape_of(full))
    dx, *sums = backward(layout, dy, x, r, w, shapes, output_mask)
    dscale, dshift = (a if a is None else a.reshape(np.shape(scale)) for a in sums)
    return dx, dscale, dshift


# ---- several norms of one array -----------------------------------------------------------------


def parallel_layer_norm(
    x: ArrayLike,
    normalized_shape: Axes,
    weights: Sequence[ArrayLike | None],
    biases: Sequence[ArrayLike | None] | None = None,
    eps: float = 1e-5,
    *,
    return_stats: bool = False,
    activation: str | None = None,
) -> Any:
    """Several layer norms of the same x, which differ in their parameters alone (Falcon-40B's
    ``ln_attn`` and ``ln_mlp``).

    Parameters
    ----------
    weights, biases : sequences of the same length, of what `layer_norm` takes; None: all absent
    x, normalized_shape, eps, return_stats, activation
        As for `layer_norm`.

    Returns
    -------
    tuple of y, one for each weight; or (that tuple, mean, rstd).

    Raises
    ------
    TypeError, ValueError
        As for `layer_norm`.
    """
    biases = [None] * len(weights) if biases is None else biases
    if len(biases) != len(weights):
        raise ValueError(f"biases: got {len(biases)}, wanted {len(weights)}, as many as weights")
    x = real("x", x)
    layout = layout_of(x, normalized_shape, None)
    plain = layout.parameter("weight", None, 1.0)
    _, mean, rstd = forward(layout, x, plain, 0.0, eps, activation)
    ys = []
    for weight, bias in zip(weights, biases, strict=True):
        w = layout.parameter("weights", weight, 1.0)
        b = layout.parameter("biases", bias, 0.0)
        ys.append(forward(layout, x, w, b, eps, activation)[0])
    return (tuple(ys), mean, rstd) if return_stats else tuple(ys)


# ---- sums ---------------------------------------------------------------------------------------


def _sum(
    layout: Layout,
    x: Array,
    residual: Array,
    dtype: DTypeLike | None,
    *,
    linear_bias: ArrayLike | None = None,
    gate: ArrayLike | None = None,
) -> Any:
    """gate * (x + linear_bias) + residual."""
    if residual.shape != x.shape:
        raise ValueError(f"residual: got shape {residual.shape}, wanted {x.shape}, the shape of x")
    if linear_bias is not None and np.shape(linear_bias) != layout.inner:
        got = np.shape(linear_bias)
        raise ValueError(f"linear_bias: got shape {got}, wanted {layout.inner}")

    def working(array: Array) -> Any:
        if dtype is None:
            return widen(array)
        return array.astype(np.float32 if np.dtype(dtype).itemsize <= 4 else np.float64)

    def spread_out(name: str, value: ArrayLike) -> Any:
        rows = np.broadcast_to(layout.parameter(name, value, 0.0), layout.valid.shape)
        return working(layout.restore(rows))

    with np.errstate(all="ignore"):
        s = working(x)
        if linear_bias is not None:
            s = s + spread_out("linear_bias", linear_bias)
        if gate is not None:
            s = s * spread_out("gate", gate)
        s = s + working(residual)
        return s if dtype is None else s.astype(dtype)


def _float64(s: Array) -> Any:
    with np.errstate(over="ignore"):
        return s.astype(np.float64)


def _with_dsum(dx: Any, dsum: ArrayLike | None) -> Any:
    if dx is None or dsum is None:
        return dx
    dsum = real("dsum", dsum)
    if dsum.shape != dx.shape:
        raise ValueError(f"dsum: got shape {dsum.shape}, wanted {dx.shape}, the shape of sum")
    return dsum.astype(np.float64) + dx


def _of_samples(name: str, value: ArrayLike | None, layout: Layout) -> Any:
    """A parameter of each sample, (B, *normalized), as (B, 1, ..., *normalized)."""
    if value is None:
        return None
    array = real(name, value)
    wanted = (*layout.outer[:1], *layout.inner)
    if array.ndim == len(layout.shape):
        return array
    if array.shape != wanted:
        raise ValueError(f"{name}: got shape {array.shape}, wanted {wanted} or as many axes as x")
    tokens = (1,) * (len(layout.outer) - 1)
    return array.reshape(wanted[:1] + tokens + layout.inner)
