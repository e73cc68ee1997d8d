"""The ops of `fastnorm.reference` that normalise weights, or vectors to length 1: weight norm,
spectral norm, unit norm. Float64 results, of the names and signatures of the fast functions, less
what is about storage (``out``, ``dtype``).

A vector is divided by a power of two before anything is squared, so that no norm of finite numbers
leaves the range. Input of up to 32 bits is worked on in float64, wider input in ``np.longdouble``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple
from numpy.typing import ArrayLike

from .reference_rows import Array, Float64, real, widen

# ---- weight norm --------------------------------------------------------------------------------


def weight_norm(
    v: ArrayLike, g: ArrayLike, dim: int | None = 0, *, return_stats: bool = False
) -> Any:
    """Weight normalisation (Salimans and Kingma 2016, arXiv:1602.07868): ``w = g v / ||v||``.

    Parameters
    ----------
    v : array_like of real numbers, at least one dimension
    g : array_like
        Broadcastable to v's shape with 1 in the place of every axis but `dim`.
    dim : int, optional
        The axis along which vectors lie side by side: each norm is over all the others. None: one
        norm of the whole array. Negative numbers count from the end.
    return_stats : bool
        Return ``(w, norm)``; norm has v's axes, with 1 in the place of all but `dim`, or
        the shape () where dim is None.

    Returns
    -------
    float64 array of v's shape, or two arrays
        There is no eps: a vector of zeros gives NaN, as in torch; so does one that is not finite.

    Raises
    ------
    TypeError, ValueError
        For what does not hold real numbers, shapes that do not fit, a dim out of range.
    """
    v = real("v", v)
    axes = _other_axes(v, dim)
    unit, mantissa, exponent = _unit(widen(v), axes)
    with np.errstate(all="ignore"):
        w = unit * _gain(g, mantissa)
    norm = np.ldexp(mantissa, exponent)
    norm = norm.reshape(()) if dim is None else norm
    return (_float64(w), _float64(norm)) if return_stats else _float64(w)


def weight_norm_backward(
    dw: ArrayLike,
    v: ArrayLike,
    g: ArrayLike,
    dim: int | None = 0,
    *,
    norm: ArrayLike | None = None,
    output_mask: Sequence[bool] = (True, True),
) -> tuple[Any, Any]:
    """The gradients of `weight_norm`: with u = v / ||v||::

        dg = sum(dw u)        dv = g / ||v|| (dw - u dg)

    ``norm`` is not looked at. dv has v's shape, dg g's; what `output_mask` leaves out is None.
    """
    v = real("v", v)
    axes = _other_axes(v, dim)
    unit, mantissa, exponent = _unit(widen(v), axes)
    dw = widen(real("dw", dw)).astype(unit.dtype)
    along = (dw * unit).sum(axes, keepdims=True)
    with np.errstate(all="ignore"):
        dv = np.ldexp((dw - unit * along) * (_gain(g, mantissa) / mantissa), -exponent)
    dg = _summed_to(along, np.shape(g))
    wants_dv, wants_dg = output_mask
    return _float64(dv) if wants_dv else None, _float64(dg) if wants_dg else None


# ---- unit norm ----------------------------------------------------------------------------------


def unit_norm(
    x: ArrayLike, axis: int | Sequence[int] = -1, eps: float = 1e-12, *, return_stats: bool = False
) -> Any:
    """Vectors of length 1: ``y = x / max(||x||, eps)`` (torch.nn.functional.normalize, p = 2).

    Parameters
    ----------
    x : array_like of real numbers
    axis : int or sequence of int
        The axes that make a vector.
    eps : float
        What is divided by where the norm is less. At least 0.
    return_stats : bool
        Return ``(y, norm)``; norm has the shape of the other axes.

    Returns
    -------
    float64 array of x's shape, or two arrays
        A vector of zeros stays one, also where eps is 0.
    """
    x = real("x", x)
    axes = _axes(x, axis)
    unit, mantissa, exponent = _unit(widen(x), axes)
    norm = np.ldexp(mantissa, exponent)
    with np.errstate(all="ignore"):
        y = np.where(norm < eps, widen(x) / eps, np.where(norm == 0, 0, unit))
    return (_float64(y), _float64(norm.squeeze(axes))) if return_stats else _float64(y)


def unit_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    axis: int | Sequence[int] = -1,
    eps: float = 1e-12,
    *,
    norm: ArrayLike | None = None,
) -> Any:
    """The gradient of `unit_norm`: with y = x / ||x||, ``dx = (dy - y sum(dy y)) / ||x||``.

    Where the norm is less than eps, ``dx = dy / eps``; where both are 0, it is 0. ``norm`` is not
    looked at.
    """
    x = real("x", x)
    axes = _axes(x, axis)
    unit, mantissa, exponent = _unit(widen(x), axes)
    dy = widen(real("dy", dy)).astype(unit.dtype)
    norm = np.ldexp(mantissa, exponent)
    with np.errstate(all="ignore"):
        dx = np.ldexp((dy - unit * (dy * unit).sum(axes, keepdims=True)) / mantissa, -exponent)
        dx = np.where(norm < eps, dy / eps, np.where(norm == 0, 0, dx))
    return _float64(dx)


# ---- spectral norm ------------------------------------------------------------------------------


def spectral_norm(
    weight: ArrayLike,
    u: ArrayLike,
    v: ArrayLike | None = None,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int = 0,
) -> tuple[Float64, Float64, Float64, Float64]:
    """Spectral normalisation (Miyato et al. 2018, arXiv:1802.05957): ``y = weight / sigma``.

    W is the weight as a matrix: `dim` first, all other axes after it as one. `n_power_iterations`
    times ``v = W^T u / max(||W^T u||, eps)`` and ``u = W v / max(||W v||, eps)``; then
    ``sigma = u^T W v``.

    Returns
    -------
    y, sigma, u, v : float64 arrays
        Of the weight's shape, of shape (), and of W's two lengths.
    """
    weight = real("weight", weight)
    wide = widen(weight)
    matrix = _matrix(wide, dim)
    u = widen(real("u", u)).astype(wide.dtype)
    if v is None and n_power_iterations < 1:
        raise TypeError("v: got None, wanted a vector where there is no iteration to form it")
    v = u[:0] if v is None else widen(real("v", v)).astype(wide.dtype)
    with np.errstate(all="ignore"):
        for _ in range(n_power_iterations):
            v = _shortened(matrix.T @ u, eps)
            u = _shortened(matrix @ v, eps)
        sigma = u @ (matrix @ v)
        y = wide / sigma
    return _float64(y), _float64(sigma), _float64(u), _float64(v)


def spectral_norm_backward(
    dy: ArrayLike,
    weight: ArrayLike,
    u: ArrayLike,
    v: ArrayLike,
    sigma: ArrayLike | None = None,
    dim: int = 0,
) -> Float64:
    """The gradient of `spectral_norm`, u and v being constants::

        dweight = (dy - sum(dy weight) / sigma u v^T) / sigma

    ``sigma`` is not looked at: it is u^T W v.
    """
    weight = real("weight", weight)
    wide = widen(weight)
    matrix, dy = _matrix(wide, dim), _matrix(widen(real("dy", dy)).astype(wide.dtype), dim)
    u, v = (widen(real(*named)).astype(wide.dtype) for named in (("u", u), ("v", v)))
    with np.errstate(all="ignore"):
        s = u @ (matrix @ v)
        dweight = (dy - (dy * (matrix / s)).sum() * np.outer(u, v)) / s
    moved = dweight.reshape(np.moveaxis(wide, dim, 0).shape)
    return _float64(np.moveaxis(moved, 0, dim))


# ---- what they share ----------------------------------------------------------------------------


def _other_axes(v: Array, dim: int | None) -> tuple[int, ...]:
    if v.ndim == 0:
        raise ValueError("v: got an array of 0 dimensions, wanted at least 1")
    if dim is None:
        return tuple(range(v.ndim))
    if not -v.ndim <= dim < v.ndim:
        raise ValueError(f"dim: got {dim}, wanted an axis of {v.ndim}")
    return tuple(d for d in range(v.ndim) if d != dim % v.ndim)


def _axes(x: Array, axis: int | Sequence[int]) -> tuple[int, ...]:
    return normalize_axis_tuple(axis, x.ndim, "axis")


def _unit(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """x / ||x||, and the norm as mantissa and exponent of two, axes kept.

    0 / 0 is NaN, and so is all of what is not finite.
    """
    largest = np.abs(x).max(axes, keepdims=True, initial=0)
    with np.errstate(all="ignore"):
        finite = np.isfinite(largest)
        exponent = np.where(finite, np.frexp(largest)[1], 0)
        scaled = np.ldexp(x, -exponent)
        mantissa = np.sqrt((scaled * scaled).sum(axes, keepdims=True))
        mantissa = np.where(finite, mantissa, np.nan)
        return scaled / mantissa, mantissa, exponent


def _gain(g: ArrayLike, like: Array) -> Array:
    array = real("g", g)
    try:
        return np.broadcast_to(array, like.shape).astype(like.dtype)
    except ValueError:
        message = f"g: got shape {array.shape}, wanted one that broadcasts to {like.shape}"
        raise ValueError(message) from None


def _summed_to(array: Array, shape: tuple[int, ...]) -> Array:
    """Over the axes along which an array of `shape` was broadcast."""
    padded = (1,) * (array.ndim - len(shape)) + shape
    summed = tuple(d for d, n in enumerate(padded) if n == 1)
    return array.sum(summed, keepdims=True).reshape(shape)


def _matrix(array: Array, dim: int) -> Array:
    moved = np.moveaxis(array, dim, 0)
    return moved.reshape(moved.shape[0], -1)


def _shortened(vector: Array, eps: float) -> Array:
    return vector / max(np.sqrt(vector @ vector), vector.dtype.type(eps))


def _float64(array: Array) -> Float64:
    with np.errstate(over="ignore"):  # norms of the largest numbers
        return np.asarray(array, np.float64)
