"""Ops that are made of the kernels' steps and are no functions of _core: adaptive and parallel
layer norm, packed rows, and the gradients of the ops with a residual.

Shapes: D stands for the normalized (trailing) shape, B for the first axis of x.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from . import _core
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
    normalized_shape, eps
        As for :func:`fastnorm.layer_norm`; eps is 1e-6 where it is left out, as in DiT.
    gate : array_like, optional
        As `scale`; only with `residual`. Product and sum are each rounded in float32.
    residual : array_like, optional
        Of x's shape.
    out, sum_out, dtype, round_sum, return_stats, activation
        As for :func:`fastnorm.add_layer_norm`.

    Returns
    -------
    y, scale, sum, mean, rstd : ndarray
        As :func:`fastnorm.add_layer_norm`; the sum only with `residual`.

    Raises
    ------
    TypeError, ValueError
        As :func:`fastnorm.layer_norm`; TypeError for a gate without a residual.

    References
    ----------
    Peebles, Xie: Scalable Diffusion Models with Transformers (adaLN), arXiv 2212.09748 (2022).
    Perez et al.: FiLM, arXiv 1709.07871 (2017).

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> x = np.float32([[[1, 3], [2, 8]]])  # one sample of two tokens
    >>> fastnorm.adaptive_layer_norm(x, np.float32([[1, 0]]), np.float32([[0, 5]]), eps=0.0)
    array([[[-2.,  6.],
            [-2.,  6.]]], dtype=float32)
    >>> y, s = fastnorm.adaptive_layer_norm(x, x, None, gate=np.float32([[2, 2]]), residual=x)
    >>> s
    array([[[ 3.,  9.],
            [ 6., 24.]]], dtype=float32)
    """
    if gate is None and residual is None and sum_out is None:
        done = _core.straight_adaptive(
            x, scale, shift, normalized_shape, eps, out, dtype, return_stats, activation
        )
        if done is not None:
            return done
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

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> x, scale = np.float32([[[1, 3], [2, 8]]]), np.float32([[1, 0]])
    >>> y, mean, rstd = fastnorm.adaptive_layer_norm(x, scale, None, eps=0.0, return_stats=True)
    >>> dx, dscale, dshift = fastnorm.adaptive_layer_norm_backward(x, x, scale, 2, mean, rstd)
    >>> dscale, dshift
    (array([[-3., 11.]], dtype=float32), array([[ 3., 11.]], dtype=float32))
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
        Each as :func:`fastnorm.layer_norm` gives it; with int8, followed by a tuple of scales.
    mean, rstd : ndarray
        With `return_stats`, once for all.

    Raises
    ------
    TypeError, ValueError
        As :func:`fastnorm.layer_norm`; ValueError for sequences of different lengths.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> x = np.float32([[1, 3], [2, 8]])
    >>> fastnorm.parallel_layer_norm(x, 2, [None, np.float32([2, 5])], eps=0.0)
    (array([[-1.,  1.],
           [-1.,  1.]], dtype=float32), array([[-2.,  5.],
           [-2.,  5.]], dtype=float32))
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

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> x, residual, dy = np.float32([[[1, 3]], [[0, 5]], [[4, 0]]])
    >>> y, s, mean, rstd = fastnorm.add_layer_norm(x, residual, eps=0.0, return_stats=True)
    >>> dsum = np.ones_like(s)
    >>> dx, dweight, dbias = fastnorm.add_layer_norm_backward(dy, dsum, s, 2, mean, rstd)
    >>> dx, dweight
    (array([[1., 1.]], dtype=float32), array([-4.,  0.], dtype=float32))
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

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> x, residual, dy = np.float32([[[1, 3]], [[0, 4]], [[5, 0]]])
    >>> y, s, rstd = fastnorm.add_rms_norm(x, residual, return_stats=True)
    >>> fastnorm.add_rms_norm_backward(dy, None, s, 2, rstd)
    (array([[ 0.98, -0.14]], dtype=float32), array([1., 0.], dtype=float32))
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

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> x = np.float32([[1], [3], [2], [4], [2], [4]])
    >>> fastnorm.segment_layer_norm(x, [0, 2, 6], eps=0.0).ravel()
    array([-1.,  1., -1.,  1., -1.,  1.], dtype=float32)
    """
    if out is None and dtype is None and return_stats is False:
        done = _core.straight_segments(x, offsets, weight, bias, eps, activation, False, 0.0)
        if done is not None:
            return done
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
    dy, x, mean, rstd, weight, bias, output_mask
        As for :func:`fastnorm.layer_norm_backward`, of the shapes that the forward call has.
    offsets : array_like of int
        The forward call's.

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

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> x, dy = np.float32([[1, 3, 2, 4], [1, 2, 3, 7]])
    >>> y, mean, rstd = fastnorm.segment_layer_norm(x, [0, 2, 4], return_stats=True)
    >>> dx, dweight, dbias = fastnorm.segment_layer_norm_backward(dy, x, [0, 2, 4], mean, rstd)
    >>> dbias
    array(13., dtype=float32)
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

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> fastnorm.segment_rms_norm(np.float32([[1], [7], [3], [3], [3]]), [0, 2, 5]).ravel()
    array([0.2, 1.4, 1. , 1. , 1. ], dtype=float32)
    """
    if out is None and dtype is None and return_stats is False:
        done = _core.straight_segments(x, offsets, weight, None, eps, activation, True, offset)
        if done is not None:
            return done
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

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> x, dy = np.float32([[1, 7, 3, 3], [5, 0, 2, 1]])
    >>> y, rstd = fastnorm.segment_rms_norm(x, [0, 2, 4], return_stats=True)
    >>> dx, dweight = fastnorm.segment_rms_norm_backward(dy, x, [0, 2, 4], rstd)
    >>> dweight
    array(4., dtype=float32)
    """
    return handlers["segment_rms_norm_backward"](dy, x, offsets, rstd, weight, offset, output_mask)
