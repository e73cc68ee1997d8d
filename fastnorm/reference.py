"""The readable definition of every op, in NumPy: float64 results, no kernels, no tricks of speed.

It has the names and the signatures of the fast functions, less what is about storage (``out``,
``sum_out``, ``dtype``, ``round_before_weight``; ``sum_dtype`` stands for ``round_sum``), so that it
serves as the oracle of the tests, as the baseline of the benchmarks and as the place to read what
an op means. Input of up to 32 bits is worked on in float64, wider input in ``np.longdouble``, so
that the result is right to the last digits of the type it is compared with. Rows of any finite size
are right: they are divided by a power of two before anything is squared.

Notation: a row holds the n values x that are normalised together, m is their mean, v their
population variance (divided by n), r = 1/sqrt(v + eps) and xh = (x - m) r. For RMS norm the same
with m = 0: v is then the mean of x^2.

For every op: x may be an array_like of real numbers (float16 and ml_dtypes' bfloat16 too) of any
shape and layout. ``return_stats=True`` adds mean and rstd (for RMS norm rstd alone), of the shape
of the axes that are not normalised. ``activation`` is None, "relu", "silu", "gelu" (by erf) or
"gelu_tanh" and is applied to y last; the backward functions take the gradient of what it was
applied to. Results are float64. A TypeError is raised for what does not hold real numbers and for
arguments that exclude each other; a ValueError for shapes that do not fit, axes out of range or
repeated, eps negative or NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .reference_channels import (
    adaptive_instance_norm,
    batch_norm,
    batch_norm_backward,
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
)
from .reference_fused import (
    adaptive_layer_norm,
    adaptive_layer_norm_backward,
    add_layer_norm,
    add_layer_norm_backward,
    add_rms_norm,
    add_rms_norm_backward,
    parallel_layer_norm,
)
from .reference_rows import (
    Axes,
    Float64,
    backward,
    forward,
    layout_of,
    offset_weight,
    real,
    rms_eps,
    segments_of,
    shape_of,
    spread,
)
from .reference_weights import (
    spectral_norm,
    spectral_norm_backward,
    unit_norm,
    unit_norm_backward,
    weight_norm,
    weight_norm_backward,
)

__all__ = [
    "adaptive_instance_norm",
    "adaptive_layer_norm",
    "adaptive_layer_norm_backward",
    "add_layer_norm",
    "add_layer_norm_backward",
    "add_rms_norm",
    "add_rms_norm_backward",
    "batch_norm",
    "batch_norm_backward",
    "dynamic_int8",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "moments",
    "parallel_layer_norm",
    "rms_norm",
    "rms_norm_backward",
    "segment_layer_norm",
    "segment_layer_norm_backward",
    "segment_rms_norm",
    "segment_rms_norm_backward",
    "spectral_norm",
    "spectral_norm_backward",
    "unit_norm",
    "unit_norm_backward",
    "weight_norm",
    "weight_norm_backward",
]


def layer_norm(
    x: ArrayLike,
    normalized_shape: Axes = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: Axes = None,
    return_stats: bool = False,
    activation: str | None = None,
    lengths: ArrayLike | None = None,
    mask: ArrayLike | None = None,
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
        absent; then it counts as ones or zeros. Dimensions before those broadcast against x's
        other axes: (heads, size) for x (..., heads, size) has parameters for each head.
    eps : float
        Added to the variance, in the units of x squared. At least 0.
    axis : int or sequence of int, optional
        The axes that are normalised together, as in Keras, instead of ``normalized_shape``.
    return_stats : bool
        Return ``(y, mean, rstd)``; mean and rstd have the shape of the other axes.
    activation : str, optional
        "relu", "silu", "gelu" or "gelu_tanh", applied to y.
    lengths : array_like of int, optional
        Broadcastable to the shape of the other axes: only the first ``lengths[row]`` elements of a
        row, in C order, belong to it; the rest of y is 0.
    mask : array_like of bool, optional
        Broadcastable to x's shape: only the True elements belong to their row; the rest of y is 0.

    Returns
    -------
    float64 array of x's shape, or three arrays
        A constant row is exactly ``bias``, even with eps = 0, where its rstd is inf; with
        eps = inf every finite row is, and its rstd 0. A row that holds a NaN or an infinity is NaN
        throughout, its mean and rstd too. A row of length 0 has mean 0 and rstd NaN.

    Raises
    ------
    TypeError
        ``normalized_shape`` and ``axis`` together, ``lengths`` and ``mask`` together; x not of
        real numbers.
    ValueError
        Shapes that do not fit, no axis, axes out of range or repeated, eps negative or NaN.
    """
    x = real("x", x)
    layout = layout_of(x, normalized_shape, axis, lengths, mask)
    w = layout.parameter("weight", weight, 1.0)
    b = layout.parameter("bias", bias, 0.0)
    y, mean, rstd = forward(layout, x, w, b, eps, activation)
    return (y, mean, rstd) if return_stats else y


def layer_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    normalized_shape: Axes,
    mean: ArrayLike | None,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axes = None,
    output_mask: Sequence[bool] = (True, True, True),
    from_output: bool = False,
    lengths: ArrayLike | None = None,
    mask: ArrayLike | None = None,
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
        The gradient of the loss with respect to y (before the activation).
    x, normalized_shape, weight, bias, axis, lengths, mask
        As `layer_norm` had them. bias has no influence on any gradient, unless ``from_output``.
    mean, rstd : array_like
        x's own statistics as `layer_norm` returned them, with or without kept axes of length 1.
        mean, often rounded to float32, is no more than a pivot: what it lost is formed again from
        x, so its value does not matter here.
    output_mask : three bools
        Which of dx, dweight and dbias are wanted.
    from_output : bool
        ``x`` is the y that `layer_norm` returned (without an activation), as in Apex's
        memory-efficient mode: xh = (y - bias) / weight. ``mean`` is not read and may be None. Where
        a weight is 0, nothing is known of xh, and the row's gradients are not finite.

    Returns
    -------
    (dx, dweight, dbias) : float64 arrays of x's shape and of the parameters', None where masked.
        An absent parameter's gradient has the other's shape, or else the normalised one. Without
        rows, dweight and dbias are 0. Where rstd is inf (eps = 0), dx and xh are 0 for a constant
        row, and r is taken from x for any other.

    Raises
    ------
    TypeError, ValueError
        As for `layer_norm`.
    """
    x, dy = real("x", x), real("dy", dy)
    layout = layout_of(x, normalized_shape, axis, lengths, mask)
    if not from_output:
        layout.statistic("mean", mean)
    r = layout.statistic("rstd", rstd)
    shapes = shape_of(weight, bias), shape_of(bias, weight)
    w = layout.parameter("weight", weight, 1.0)
    b = layout.parameter("bias", bias, 0.0)
    output = (w, b) if from_output else None
    return backward(layout, dy, x, r, w, shapes, output_mask, output=output)


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
    x = real("x", x)
    layout = layout_of(x, None, axis)
    with np.errstate(all="ignore"):
        rows = spread(layout.rows(x), layout.valid, 0.0, centred=True)
        return (
            layout.restore_stats(np.ldexp(rows.mean, rows.exponent)),
            layout.restore_stats(np.ldexp(rows.square, 2 * rows.exponent)),
        )


# ---- RMS norm -----------------------------------------------------------------------------------


def rms_norm(
    x: ArrayLike,
    normalized_shape: Axes = None,
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    axis: Axes = None,
    offset: float = 0.0,
    return_stats: bool = False,
    activation: str | None = None,
    lengths: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Any:
    """Root mean square layer normalisation (Zhang and Sennrich 2019, arXiv:1910.07467).

    For each row::

        y = x / sqrt(sum(x^2)/n + eps) * (weight + offset)

    Parameters
    ----------
    x, normalized_shape, weight, axis, activation, lengths, mask
        As for `layer_norm`. An absent weight counts as ones, and offset is not used.
    eps : float, optional
        Added to the mean square. Default: the machine epsilon of the type that the fast function
        computes in: float64's for float64, else float32's (as in torch).
    offset : float
        Added to the weight: 1 in Gemma, whose weights start at 0.
    return_stats : bool
        Return ``(y, rstd)``.

    Returns
    -------
    float64 array of x's shape, or two arrays
        A row of zeros is 0, even with eps = 0, where its rstd is inf. NaN, infinities and rows of
        length 0 as for `layer_norm`.

    Raises
    ------
    TypeError, ValueError
        As for `layer_norm`.
    """
    x = real("x", x)
    layout = layout_of(x, normalized_shape, axis, lengths, mask)
    w = offset_weight(layout, weight, offset)
    y, _, rstd = forward(layout, x, w, 0.0, rms_eps(eps, x), activation, centred=False)
    return (y, rstd) if return_stats else y


def rms_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    normalized_shape: Axes,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: Axes = None,
    offset: float = 0.0,
    output_mask: Sequence[bool] = (True, True),
    from_output: bool = False,
    lengths: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> tuple[Any, Any]:
    """The gradients of `rms_norm` with respect to x and weight.

    With xh = x r, g = dy * (weight + offset), and the mean over the row::

        dx      = r (g - xh mean(g xh))
        dweight = sum over rows of dy xh

    Parameters, results and errors are those of `layer_norm_backward`, less mean and bias; with
    ``from_output``, xh = y / (weight + offset).
    """
    x, dy = real("x", x), real("dy", dy)
    layout = layout_of(x, normalized_shape, axis, lengths, mask)
    r = layout.statistic("rstd", rstd)
    w = offset_weight(layout, weight, offset)
    output = (w, 0.0) if from_output else None
    shapes = (shape_of(weight),)
    dx, dweight = backward(layout, dy, x, r, w, shapes, output_mask, centred=False, output=output)
    return dx, dweight


# ---- packed rows --------------------------------------------------------------------------------


def segment_layer_norm(
    x: ArrayLike,
    offsets: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    return_stats: bool = False,
    activation: str | None = None,
) -> Any:
    """Layer norm of each of ``x[offsets[s]:offsets[s+1]]``, all of it one row in C order (PyTorch
    Geometric's LayerNorm(mode="graph")).

    Parameters
    ----------
    x : array_like of shape (total, *features)
    offsets : array_like of S + 1 ints
        Ascending, from 0 to total.
    weight, bias : array_like of shape features, optional
        Repeated along the segment.
    eps, return_stats, activation
        As for `layer_norm`; mean and rstd have the shape (S,). An empty segment has mean 0, rstd
        NaN.

    Returns
    -------
    y or (y, mean, rstd) : float64 arrays.

    Raises
    ------
    TypeError, ValueError
        As for `layer_norm`; offsets that are not integers or do not ascend from 0 to total.
    """
    x = real("x", x)
    segments = segments_of(x, offsets)
    w = segments.parameter("weight", weight, 1.0)
    b = segments.parameter("bias", bias, 0.0)
    y, mean, rstd = forward(segments, x, w, b, eps, activation)
    return (y, mean, rstd) if return_stats else y


def segment_layer_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    offsets: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    output_mask: Sequence[bool] = (True, True, True),
) -> tuple[Any, Any, Any]:
    """The gradients of `segment_layer_norm` with respect to x, weight and bias.

    As `layer_norm_backward` of each segment; dweight and dbias, of shape features, are summed along
    the segments and over them.
    """
    x, dy = real("x", x), real("dy", dy)
    segments = segments_of(x, offsets)
    segments.statistic("mean", mean)
    r = segments.statistic("rstd", rstd)
    w = segments.parameter("weight", weight, 1.0)
    segments.parameter("bias", bias, 0.0)
    dx, dweight, dbias = backward(segments, dy, x, r, w, (None, None), output_mask)
    return dx, dweight, dbias


def segment_rms_norm(
    x: ArrayLike,
    offsets: ArrayLike,
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
    return_stats: bool = False,
    activation: str | None = None,
) -> Any:
    """RMS norm of each of ``x[offsets[s]:offsets[s+1]]``, all of it one row in C order.

    Parameters, results and errors are those of `segment_layer_norm` and `rms_norm`.
    """
    x = real("x", x)
    segments = segments_of(x, offsets)
    w = offset_weight(segments, weight, offset)
    y, _, rstd = forward(segments, x, w, 0.0, rms_eps(eps, x), activation, centred=False)
    return (y, rstd) if return_stats else y


def segment_rms_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    offsets: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    offset: float = 0.0,
    output_mask: Sequence[bool] = (True, True),
) -> tuple[Any, Any]:
    """The gradients of `segment_rms_norm` with respect to x and weight: `rms_norm_backward` of each
    segment, dweight as in `segment_layer_norm_backward`.
    """
    x, dy = real("x", x), real("dy", dy)
    segments = segments_of(x, offsets)
    r = segments.statistic("rstd", rstd)
    w = offset_weight(segments, weight, offset)
    dx, dweight = backward(segments, dy, x, r, w, (None,), output_mask, centred=False)
    return dx, dweight


# ---- 8-bit results ------------------------------------------------------------------------------


def dynamic_int8(
    y: ArrayLike, normalized_shape: Axes = None, *, axis: Axes = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Each row of y in 8 bits and a scale, y being near q * scale (vLLM's formula)::

        scale = max(max|y| / 127, tiny)
        q     = y / scale, rounded to the nearest, half to even, within -127 to 127

    Not in float64 as all else here, but in y's own float32 or float64, by IEEE division; the scale
    is rounded to float32, and tiny is float32's least normal number. The results are what the fast
    functions return for ``dtype=np.int8``, if y is what they would have stored.

    Parameters
    ----------
    y : array_like of float32 or float64; the half types are taken to float32
    normalized_shape, axis
        As for `layer_norm`.

    Returns
    -------
    (q, scale)
        int8 of y's shape and float32 of the shape of the other axes. A row that holds a NaN has the
        scale NaN, one that holds an infinity the scale inf; either is 0 throughout.
    """
    y = real("y", y)
    layout = layout_of(y, normalized_shape, axis)
    rows = layout.rows(y if y.dtype == np.float64 else y.astype(np.float32))
    with np.errstate(all="ignore"):
        largest = np.abs(rows).max(-1, keepdims=True, initial=0)
        scale = np.maximum((largest / rows.dtype.type(127)).astype(np.float32), _TINY)
        q = np.clip(np.rint(rows / scale.astype(rows.dtype)), -127, 127)
    q = np.where(np.isnan(q), 0, q)
    return layout.restore(q).astype(np.int8), scale.reshape(layout.outer)


_TINY = np.finfo(np.float32).tiny
