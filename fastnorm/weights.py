"""Norms of weights, and of vectors: weight norm, unit norm, spectral norm: the public functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from . import _core, checks, interop, spectral
from .dispatch import public_of
from .weight_calls import (
    BackwardCall,
    ForwardCall,
    UnitBackwardCall,
    as_unit_axes,
    as_weight_axes,
)


def weight_norm(
    v: Any, g: Any, dim: int | None = 0, *, out: Any = None, dtype: Any = None,
    return_stats: bool = False,
) -> Any:  # fmt: skip
    """Weight normalization: ``w = g * v / ||v||``, a weight's directions and lengths apart.

    Parameters
    ----------
    v : array_like
        float16, bfloat16, float32 or float64 of any shape and layout; integers become float64.
    g : array_like
        The lengths, of any real type: of v's axes, with 1 in the place of all but `dim`, or what
        broadcasts to that. torch's have these shapes, and () where dim is None.
    dim : int, optional
        The axis along which vectors lie side by side: each norm is over all other axes. None: one
        norm of the whole array. Negative numbers count from the end (torch's weight_norm takes -1
        for None).
    out : ndarray, optional
        Array for the result, of v's shape and the result's type. It may be v itself, but not
        overlap an input in another way.
    dtype : dtype, optional
        Type of the result, float16, bfloat16, float32 or float64; default: v's.
    return_stats : bool
        Also return the norms.

    Returns
    -------
    w : ndarray
        Of v's shape and type, or `dtype` (`out` where given).
    norm : ndarray
        With `return_stats`, of v's axes with 1 in the place of all but `dim`, or of shape () where
        that is None; float32 (float64 for float64 input).

    Raises
    ------
    TypeError
        For a type that is not supported, or a dim that is no integer.
    ValueError
        For shapes that do not fit, a dim out of range (``numpy.exceptions.AxisError``), and an
        `out` that is read-only or overlaps an input. Nothing is written then.

    Notes
    -----
    There is no eps: a vector of zeros has no direction and gives NaN, as in torch. A vector that
    holds a NaN or an infinity becomes NaN. A vector's result depends on that vector and its g
    alone.

    References
    ----------
    Salimans, Kingma: Weight Normalization, arXiv 1602.07868 (2016).

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> fastnorm.weight_norm(np.float32([[2, 2, 2, 2], [0, 2, 0, 0]]), np.float32([[8], [1]]))
    array([[4., 4., 4., 4.],
           [0., 1., 0., 0.]], dtype=float32)
    """
    if dtype is None:
        done = _core.straight_weight_norm(v, g, dim, out, return_stats)
        if done is not None:
            return done
    return handlers["weight_norm"](v, g, dim, out, dtype, return_stats)


def weight_norm_backward(
    dw: Any, v: Any, g: Any, dim: int | None = 0, *, norm: Any = None,
    output_mask: Any = (True, True),
) -> Any:  # fmt: skip
    """Gradients of :func:`weight_norm`: dv and dg. With u = v / ||v||, ``dg = sum(dw * u)`` and
    ``dv = g / ||v|| * (dw - u * dg)``.

    Parameters
    ----------
    dw, v : array_like
        Gradient of the result, and what was normalised.
    g, dim
        The forward call's.
    norm : array_like, optional
        v's own norms, as the forward call returned them with ``return_stats=True``; formed again
        where left out.
    output_mask : two bools
        Which of dv, dg to compute; the other comes back as None.

    Returns
    -------
    dv : ndarray or None
        Of v's shape and type.
    dg : ndarray or None
        Of g's shape, float32 (float64 for float64 input).

    Raises
    ------
    TypeError, ValueError
        As :func:`weight_norm`.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> v, g, dw = np.float32([[1, 1, 1, 1]]), np.float32([[4]]), np.float32([[1, 2, 3, 2]])
    >>> fastnorm.weight_norm_backward(dw, v, g)
    (array([[-2.,  0.,  2.,  0.]], dtype=float32), array([[4.]], dtype=float32))
    """
    done = _core.straight_weight_norm_backward(dw, v, g, dim, norm, output_mask)
    if done is not None:
        return done
    return handlers["weight_norm_backward"](dw, v, g, dim, norm, output_mask)


def unit_norm(
    x: Any, axis: Any = -1, eps: float = 1e-12, *, out: Any = None, dtype: Any = None,
    return_stats: bool = False,
) -> Any:  # fmt: skip
    """Vectors of length 1: ``y = x / max(||x||, eps)``, torch.nn.functional.normalize with p = 2.

    Parameters
    ----------
    x, out, dtype
        As v, out and dtype of :func:`weight_norm`.
    axis : int or tuple of int
        The axes that make a vector, in any number. (torch's `dim` is 1 where none is given.)
    eps : float
        What is divided by where the norm is less; not negative.
    return_stats : bool
        Also return the norms.

    Returns
    -------
    y : ndarray
        Of x's shape and type, or `dtype` (`out` where given). A vector of zeros stays one, with
        eps = 0 too.
    norm : ndarray
        With `return_stats`, of the shape of the other axes, float32 (float64 for float64 input).

    Raises
    ------
    TypeError, ValueError
        As :func:`weight_norm`; ValueError for an eps that is negative or NaN.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> fastnorm.unit_norm(np.float32([[3, 4], [0, 0]]))
    array([[0.6, 0.8],
           [0. , 0. ]], dtype=float32)
    """
    if dtype is None:
        done = _core.straight_unit_norm(x, axis, eps, out, return_stats)
        if done is not None:
            return done
    return handlers["unit_norm"](x, axis, eps, out, dtype, return_stats)


def unit_norm_backward(
    dy: Any, x: Any, axis: Any = -1, eps: float = 1e-12, *, norm: Any = None
) -> Any:
    """Gradient of :func:`unit_norm`: with y = x / ||x||, ``dx = (dy - y * sum(dy * y)) / ||x||``.

    Where the norm is less than eps it is ``dy / eps``, and 0 where both are 0.

    Parameters
    ----------
    dy, x : array_like
        Gradient of the result, and what was normalised.
    axis, eps
        The forward call's.
    norm : array_like, optional
        x's own norms, as the forward call returned them with ``return_stats=True``; formed again
        where left out.

    Returns
    -------
    dx : ndarray
        Of x's shape and type.

    Raises
    ------
    TypeError, ValueError
        As :func:`unit_norm`.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> fastnorm.unit_norm_backward(np.float32([1, 2, 3, 2]), np.float32([1, 1, 1, 1]))
    array([-0.5,  0. ,  0.5,  0. ], dtype=float32)
    """
    done = _core.straight_unit_norm_backward(dy, x, axis, eps, norm)
    if done is not None:
        return done
    return handlers["unit_norm_backward"](dy, x, axis, eps, norm)


def spectral_norm(
    weight: Any, u: Any, v: Any = None, n_power_iterations: int = 1, eps: float = 1e-12,
    dim: int = 0, *, out: Any = None,
) -> Any:  # fmt: skip
    """Spectral normalization: ``y = weight / sigma``, by the largest singular value.

    W is the weight as a matrix, `dim` first and all other axes after it as one. Each power
    iteration is ``v = W^T u / max(||W^T u||, eps)``, ``u = W v / max(||W v||, eps)``; then
    ``sigma = u^T W v``.

    Parameters
    ----------
    weight : array_like
        float16, bfloat16, float32 or float64 of any shape and layout; integers become float64.
    u, v : array_like
        Estimates of the first singular vectors, of as many elements as W has rows and columns. They
        are not written to. `v` is formed from `u`, and needed only without iterations.
    n_power_iterations : int
        How often to improve them; 0 in inference.
    eps : float
        What vectors are divided by where their norm is less; not negative.
    dim : int
        The axis of W's rows; 0 for linear layers and convolutions, 1 for transposed ones.
    out : ndarray, optional
        Array for the result, of the weight's shape and type. It may be `weight` itself, but not
        overlap an input in another way.

    Returns
    -------
    y : ndarray
        Of the weight's shape and type (`out` where given).
    sigma : ndarray
        float64, of shape ().
    u, v : ndarray
        The improved vectors, float32 (float64 for a float64 weight).

    Raises
    ------
    TypeError, ValueError
        As :func:`weight_norm`; TypeError where v is None and there is no iteration.

    Notes
    -----
    The products with W are NumPy's, so their last bits may differ with its BLAS and its threads.
    The order, v first, is that of the paper and of torch.nn.utils.spectral_norm; torch's
    parametrization improves u first. A weight of zeros gives NaN, as in torch.

    References
    ----------
    Miyato et al.: Spectral Normalization for Generative Adversarial Networks, arXiv 1802.05957
    (2018).

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> weight = np.float32([[3, 0], [0, 2]])
    >>> y, sigma, u, v = fastnorm.spectral_norm(weight, np.float32([1, 0]))
    >>> y, sigma
    (array([[1.       , 0.       ],
           [0.       , 0.6666667]], dtype=float32), array(3.))
    """
    return interop.run(
        spectral.norm, _SPECTRAL, weight, u, v, n_power_iterations, eps, dim, out, main="weight"
    )


def spectral_norm_backward(
    dy: Any, weight: Any, u: Any, v: Any, sigma: Any = None, dim: int = 0
) -> Any:
    """Gradient of :func:`spectral_norm`, u and v being constants:
    ``dweight = (dy - sum(dy * weight) / sigma * u v^T) / sigma``.

    Parameters
    ----------
    dy, weight : array_like
        Gradient of the result, and the weight.
    u, v, sigma
        What the forward call returned; sigma is formed again where left out.
    dim : int
        The forward call's.

    Returns
    -------
    dweight : ndarray
        Of the weight's shape and type.

    Raises
    ------
    TypeError, ValueError
        As :func:`spectral_norm`.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> weight, u = np.float32([[4, 0], [0, 2]]), np.float32([1, 0])
    >>> fastnorm.spectral_norm_backward(weight, weight, u, u)
    array([[-0.25,  0.  ],
           [ 0.  ,  0.5 ]], dtype=float32)
    """
    return interop.run(
        spectral.norm_backward, _SPECTRAL_BACKWARD, dy, weight, u, v, sigma, dim, main="weight"
    )


_SPECTRAL = ("weight", "u", "v", "n_power_iterations", "eps", "dim", "out")
_SPECTRAL_BACKWARD = ("dy", "weight", "u", "v", "sigma", "dim")


# ---- their calls ---------------------------------------------------------------------------------
# Each takes what the public function of its name takes, in that order.


def _weight_norm(
    v: Any, g: Any, dim: Any, out: Any, dtype: Any, return_stats: Any, explained: bool = False
) -> ForwardCall:
    return ForwardCall(
        "v", v, as_weight_axes(dim), _NEVER, out=out, dtype=dtype, return_stats=return_stats,
        explained=explained, has_g=True, g=g,
    )  # fmt: skip


def _weight_norm_backward(
    dw: Any, v: Any, g: Any, dim: Any, norm: Any, output_mask: Any, explained: bool = False
) -> BackwardCall:
    return BackwardCall(
        ("dw", "v"), dw, v, as_weight_axes(dim), _NEVER, norm, output_mask=output_mask,
        explained=explained, has_g=True, g=g,
    )  # fmt: skip


def _unit_norm(
    x: Any, axis: Any, eps: Any, out: Any, dtype: Any, return_stats: Any, explained: bool = False
) -> ForwardCall:
    return ForwardCall(
        "x", x, as_unit_axes(axis), checks.as_eps(eps), out=out, dtype=dtype,
        return_stats=return_stats, explained=explained, has_g=False,
    )  # fmt: skip


def _unit_norm_backward(
    dy: Any, x: Any, axis: Any, eps: Any, norm: Any, explained: bool = False
) -> BackwardCall:
    return UnitBackwardCall(
        ("dy", "x"), dy, x, as_unit_axes(axis), checks.as_eps(eps), norm, explained=explained,
        has_g=False,
    )  # fmt: skip


#: What no norm is less than: there is no eps.
_NEVER = -1.0

CALLS: dict[str, Callable[..., ForwardCall | BackwardCall]] = {
    call.__name__.removeprefix("_"): call
    for call in (_weight_norm, _weight_norm_backward, _unit_norm, _unit_norm_backward)
}


def _handler_of(call: Callable[..., ForwardCall | BackwardCall]) -> Callable[..., Any]:
    """The op itself, its arguments by position; they need not be ndarrays."""
    names = tuple(inspect.signature(call).parameters)[:-1]
    name = call.__name__.removeprefix("_")
    main = "v" if "v" in names else "x"

    def run(*converted: Any) -> Any:
        return call(*converted).run()

    return interop.runner(run, names, main, public_of(name))


handlers = {name: _handler_of(call) for name, call in CALLS.items()}
