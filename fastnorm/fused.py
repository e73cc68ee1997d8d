"""Ops that are made of the kernels' steps and have no straight path of their own: adaptive and
parallel layer norm, packed rows, and the gradients of the ops with a residual.

Shapes: D stands for the normalized (trailing) shape, B for the first axis of x.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from .dispatch import handlers

Activation: TypeAlias = Literal["relu", "silu", "gelu", "gelu_tanh"] | None


def adaptive_layer_norm(
    x: Any, scale: Any, shift: Any, normalized_shape: Any = None, eps: float = 1e-6, *,
    gate: Any = None, residual: Any = None, out: Any = None, sum_out: Any = None,
    dtype: Any = None, round_sum: bool = True, return_stats: bool = False,
    activation: Activation = None,
) -> Any:  # fmt: skip
    """Layer normalization with a scale and shift of each sample: ``y = xh * (1 + scale) + shift``.

    With `residual`, what is normalised is ``sum = residual + gate * x``, which is returned too: the
    output x of one sub-layer joins the stream, and the next sub-layer's input is made.

    Parameters
    ----------
    x : array_like
        Of shape (B, ..., *D), any type and layout.
    scale, shift : array_like
        Of shape (B, *D), broadcast over what lies between, or of as many axes as x with full
        normalized ones. ``1 + scale`` is rounded in float32 (float64 for float64 input). `shift`
        may be None.
    normalized_shape : int or sequence of int, optional
        Trailing shape D. Default: the last axis.
    eps : float
        Added to the variance; not negative.
    gate : array_like, optional
        As `scale`; only with `residual`. Product and sum are each rounded in float32.
    residual : array_like, optional
        Of x's shape.
    out, sum_out, dtype, round_sum, return_stats, activation
        As for :func:`fastnorm.add_layer_norm`.

    Returns
    -------
    y : ndarray
        Of x's shape and type, or `dtype`; followed by its scale where that is int8.
    sum : ndarray
        With `residual`.
    mean, rstd : ndarray
        With `return_stats`, of the leading shape.

    Raises
    ------
    TypeError, ValueError
        As :func:`fastnorm.layer_norm`; TypeError for a gate without a residual.

    References
    ----------
    Peebles, Xie: Scalable Diffusion Models with Transformers (adaLN), arXiv 2212.09748 (2022).
    Perez et al.: FiLM, arXiv 1709.07871 (2017).
    """
    return handlers["adaptive_layer_norm"](
        x, scale, shift, normalized_shape, eps, gate, residual, out, sum_out, dtype, round_sum,
        return_stats, activation,
    )  # fmt: skip


def adaptive_layer_norm_backward(
    dy: Any, x: Any, scale: Any, normalized_shape: Any, mean: Any, rstd: Any, *,
    output_mask: Any = (True, True, True),
) -> Any:  # fmt: skip
    """Gradients of :func:`adaptive_layer_norm`: dx, dscale and dshift.

    Parameters
    ----------
    dy, x : array_like
        Gradient of the output, and what was normalised (with a residual: the sum).
    scale, normalized_shape
        The forward call's.
    mean, rstd : array_like
        What the forward call returned with ``return_stats=True``.
    output_mask : three bools
        Which of dx, dscale, dshift to compute; the others come back as None.

    Returns
    -------
    dx : ndarray or None
        Of x's shape and type.
    dscale, dshift : ndarray or None
        Of scale's shape, float32 (float64 for float64 input), summed over each sample's rows.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As :func:`fastnorm.layer_norm_backward`.
    """
    return handlers["adaptive_layer_norm_backward"](
        dy, x, scale, normalized_shape, mean, rstd, output_mask
    )


def parallel_layer_norm(
    x: Any, normalized_shape: Any, weights: Any, biases: Any = None, eps: float = 1e-5, *,
    out: Any = None, dtype: Any = None, return_stats: bool = False, activation: Activation = None,
) -> Any:  # fmt: skip
    """Several layer norms of one x, which is read, and its statistics formed, once.

    Parameters
    ----------
    x, normalized_shape, eps, dtype, return_stats, activation
        As for :func:`fastnorm.layer_norm`.
    weights, biases : sequence of array_like or None
        One pair for each result; `biases` may be left out.
    out : sequence of ndarray or None, optional
        One for each result. They may overlap neither x nor each other.

    Returns
    -------
    ys : tuple of ndarray
        With int8, followed by a tuple of their scales.
    mean, rstd : ndarray
        With `return_stats`.

    Raises
    ------
    TypeError, ValueError
        As :func:`fastnorm.layer_norm`; ValueError for sequences of different lengths.
    """
    return handlers["parallel_layer_norm"](
        x, normalized_shape, weights, biases, eps, out, dtype, return_stats, activation
    )


def add_layer_norm_backward(
    dy: Any, dsum: Any, sum: Any, normalized_shape: Any, mean: Any, rstd: Any, weight: Any = None,
    bias: Any = None, *, axis: Any = None, output_mask: Any = (True, True, True),
) -> Any:  # fmt: skip
    """Gradients of :func:`fastnorm.add_layer_norm`: dx, dweight and dbias.

    Parameters
    ----------
    dy, dsum : array_like
        Gradients of the two results y and sum; `dsum` may be None.
    sum : array_like
        What the forward call returned.
    normalized_shape, mean, rstd, weight, bias, axis, output_mask
        As for :func:`fastnorm.layer_norm_backward`.

    Returns
    -------
    dx : ndarray or None
        The gradient of x and of residual alike, of sum's type. linear_bias's is its sum over rows.
    dweight, dbias : ndarray or None
        As :func:`fastnorm.layer_norm_backward`.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As :func:`fastnorm.layer_norm_backward`.
    """
    return handlers["add_layer_norm_backward"](
        dy, dsum, sum, normalized_shape, mean, rstd, weight, bias, axis, output_mask
    )


def add_rms_norm_backward(
    dy: Any, dsum: Any, sum: Any, normalized_shape: Any, rstd: Any, weight: Any = None, *,
    axis: Any = None, offset: float = 0.0, output_mask: Any = (True, True),
) -> Any:  # fmt: skip
    """Gradients of :func:`fastnorm.add_rms_norm`: dx and dweight.

    Parameters, results and errors are those of :func:`fastnorm.add_layer_norm_backward` and
    :func:`fastnorm.rms_norm_backward`.
    """
    return handlers["add_rms_norm_backward"](
        dy, dsum, sum, normalized_shape, rstd, weight, axis, offset, output_mask
    )


def segment_layer_norm(
    x: Any, offsets: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *,
    out: Any = None, dtype: Any = None, return_stats: bool = False, activation: Activation = None,
) -> Any:  # fmt: skip
    """Layer normalization of packed rows: segment s is all of ``x[offsets[s]:offsets[s + 1]]``.

    Each segment has one mean and variance, over all of its elements and features, and the bits that
    it has alone.

    Parameters
    ----------
    x : array_like
        Of shape (total, *features), any type.
    offsets : array_like of int
        S + 1 of them, ascending from 0 to total.
    weight, bias : array_like, optional
        Of shape `features`, the same along a segment.
    eps, out, dtype, return_stats, activation
        As for :func:`fastnorm.layer_norm`.

    Returns
    -------
    y : ndarray
        Of x's shape and type, or `dtype`; with int8 followed by a scale for each segment.
    mean, rstd : ndarray
        With `return_stats`, of shape (S,). Those of empty segments are 0 and NaN.

    Raises
    ------
    TypeError, ValueError
        As :func:`fastnorm.layer_norm`.

    References
    ----------
    PyTorch Geometric's LayerNorm(mode="graph"), whose batch vector says what `offsets` say here.
    """
    return handlers["segment_layer_norm"](
        x, offsets, weight, bias, eps, out, dtype, return_stats, activation
    )


def segment_layer_norm_backward(
    dy: Any, x: Any, offsets: Any, mean: Any, rstd: Any, weight: Any = None, bias: Any = None, *,
    output_mask: Any = (True, True, True),
) -> Any:  # fmt: skip
    """Gradients of :func:`segment_layer_norm`: dx, dweight and dbias.

    Parameters
    ----------
    dy, x : array_like
        Gradient of the output, and the input, of one shape.
    offsets, weight, bias
        The forward call's.
    mean, rstd : array_like
        What the forward call returned with ``return_stats=True``.
    output_mask : three bools
        Which of dx, dweight, dbias to compute; the others come back as None.

    Returns
    -------
    dx : ndarray or None
        Of x's shape and type.
    dweight, dbias : ndarray or None
        Of shape `features`, float32 (float64 for float64 input).

    Raises
    ------
    TypeError, ValueError, MemoryError
        As :func:`fastnorm.layer_norm_backward`.
    """
    return handlers["segment_layer_norm_backward"](
        dy, x, offsets, mean, rstd, weight, bias, output_mask
    )


def segment_rms_norm(
    x: Any, offsets: Any, weight: Any = None, eps: float | None = None, *, offset: float = 0.0,
    out: Any = None, dtype: Any = None, return_stats: bool = False, activation: Activation = None,
) -> Any:  # fmt: skip
    """Root mean square normalization of packed rows.

    Parameters, results and errors are those of :func:`segment_layer_norm` and
    :func:`fastnorm.rms_norm`.
    """
    return handlers["segment_rms_norm"](
        x, offsets, weight, eps, offset, out, dtype, return_stats, activation
    )


def segment_rms_norm_backward(
    dy: Any, x: Any, offsets: Any, rstd: Any, weight: Any = None, *, offset: float = 0.0,
    output_mask: Any = (True, True),
) -> Any:  # fmt: skip
    """Gradients of :func:`segment_rms_norm`: dx and dweight.

    Parameters, results and errors are those of :func:`segment_layer_norm_backward` and
    :func:`fastnorm.rms_norm_backward`.
    """
    return handlers["segment_rms_norm_backward"](dy, x, offsets, rstd, weight, offset, output_mask)
