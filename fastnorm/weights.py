"""Norms of weights, and of vectors: weight norm, spectral norm, unit norm.

A vector over its length is RMS norm with eps = 0 and a weight of 1 / sqrt(n), so it is rms_norm's
kernel that forms every norm here: it is right for every finite input, and gives the same bits on
every CPU. What a kernel's float cannot hold (a norm of 1e-40, of 1e300) is formed apart, in
`_split`, for the few vectors that have it.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.exceptions import AxisError

from . import _core, checks, interop
from .call import as_output

#: From here on the kernel that takes a weight for each row gains more than its call costs.
_MANY = 1 << 16
#: A row's weight is repeated so many times at most, and at least, for the kernel to load it.
_RUN = range(64, 513)


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
    if type(dim) is int and dim == 0 and out is None and dtype is None and return_stats is False:
        w = _plain_weight_norm(v, g)
        if w is not None:
            return w
    return interop.run(_weight_norm, _FORWARD, v, g, dim, out, dtype, return_stats, main="v")


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

    Notes
    -----
    The sums run in another order where `dim` is the last axis: the last bits may be others than
    those of the transposed arrays.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> v, g, dw = np.float32([[1, 1, 1, 1]]), np.float32([[4]]), np.float32([[1, 2, 3, 2]])
    >>> fastnorm.weight_norm_backward(dw, v, g)
    (array([[-2.,  0.,  2.,  0.]], dtype=float32), array([[4.]], dtype=float32))
    """
    return interop.run(_weight_norm_backward, _BACKWARD, dw, v, g, dim, norm, output_mask, main="v")


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
        The axes that make a vector, in any number.
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
    if type(axis) is int and axis == -1 and out is None and dtype is None and return_stats is False:
        y = _plain_unit_norm(x, eps)
        if y is not None:
            return y
    return interop.run(_unit_norm, _UNIT, x, axis, eps, out, dtype, return_stats)


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
    return interop.run(_unit_norm_backward, _UNIT_BACKWARD, dy, x, axis, eps, norm)


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
        _spectral_norm, _SPECTRAL, weight, u, v, n_power_iterations, eps, dim, out, main="weight"
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
        _spectral_norm_backward, _SPECTRAL_BACKWARD, dy, weight, u, v, sigma, dim, main="weight"
    )


_FORWARD = ("v", "g", "dim", "out", "dtype", "return_stats")
_BACKWARD = ("dw", "v", "g", "dim", "norm", "output_mask")
_UNIT = ("x", "axis", "eps", "out", "dtype", "return_stats")
_UNIT_BACKWARD = ("dy", "x", "axis", "eps", "norm")
_SPECTRAL = ("weight", "u", "v", "n_power_iterations", "eps", "dim", "out")
_SPECTRAL_BACKWARD = ("dy", "weight", "u", "v", "sigma", "dim")


# ---- arguments -----------------------------------------------------------------------------------


class _Vectors:
    """An array, and which of its axes make a vector.

    `seen` gives an array of the same shape as (vectors..., elements...), a view.
    """

    def __init__(self, name: str, value: Any, axes_of: Callable[[np.ndarray], Any]) -> None:
        self.name = name
        self.array = checks.as_floating(name, value)
        if self.array.ndim == 0:
            raise ValueError(f"{name}: got an array of 0 dimensions, wanted at least 1")
        self.shape = self.array.shape
        self.dtype = self.array.dtype.newbyteorder("=")
        self.compute = checks.compute_type(self.dtype)
        self.axes: tuple[int, ...] = axes_of(self.array)
        rest = tuple([d for d in range(len(self.shape)) if d not in self.axes])
        self.order = (*rest, *self.axes)
        self.lead = tuple([self.shape[d] for d in rest])
        self.elements = tuple([self.shape[d] for d in self.axes])
        self.kept = tuple([1 if d in self.axes else n for d, n in enumerate(self.shape)])
        self.n = math.prod(self.elements)
        self.in_rows = self.order == tuple(range(len(self.shape)))

    def seen(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(self.order)

    def as_rows(self, array: np.ndarray) -> np.ndarray:
        """As a matrix of a vector each row: a view where that can be."""
        return self.seen(array).reshape(math.prod(self.lead), self.n)

    def result(self, dtype: Any) -> np.dtype:
        """The type of the result."""
        if dtype is None:
            return self.dtype
        kind = checks.as_result_type(dtype)
        if kind == checks.INT8:
            raise TypeError(f"dtype: got {dtype!r}, wanted float16, bfloat16, float32 or float64")
        return kind

    def like(self, name: str, value: Any) -> np.ndarray:
        """Another array of this shape, in the type that is computed in."""
        array = checks.as_floating(name, value)
        if array.shape != self.shape:
            raise ValueError(
                f"{name}: got shape {array.shape}, wanted {self.shape}, the shape of {self.name}"
            )
        return checks.as_plain(array, self.compute)

    def output(self, out: Any, kind: np.dtype, inputs: dict[str, Any]) -> np.ndarray | None:
        if out is None:
            return None
        place: np.ndarray = as_output(out, kind)
        checks.check_out("out", place, self.shape, kind)
        checks.check_apart("out", place, {self.name: self.array, **inputs}, (self.name,))
        return place

    def norms(self, value: Any) -> np.ndarray | None:
        """Norms that the caller has, in float64 of the leading shape."""
        if value is None:
            return None
        return checks.as_statistic("norm", value, self.lead, self.kept, checks.FLOAT64)


def as_dim(dim: Any, ndim: int, wanted: str = "an integer") -> int:
    """One axis of an array of `ndim` dimensions, not negative."""
    try:
        index = operator.index(dim)
    except TypeError:
        raise TypeError(f"dim: got {dim!r}, wanted {wanted}") from None
    if not -ndim <= index < ndim:  # which may be more than NumPy's own check can take
        raise AxisError(index, ndim, "dim")
    return index % ndim


def _all_but(dim: int, ndim: int) -> tuple[int, ...]:
    return tuple([d for d in range(ndim) if d != dim])


def _weight_vectors(v: Any, dim: Any) -> _Vectors:
    if dim is None:
        return _Vectors("v", v, lambda array: tuple(range(array.ndim)))
    wanted = "an integer or None"
    return _Vectors("v", v, lambda array: _all_but(as_dim(dim, array.ndim, wanted), array.ndim))


def _gains(g: Any, vectors: _Vectors) -> np.ndarray:
    """g in float64, of v's axes with 1 in the place of all but dim."""
    array = checks.as_real("g", g)
    if array is None:
        raise TypeError("g: got None, wanted an array")
    try:
        spread = np.broadcast_to(interop.widened(array), vectors.kept)
    except ValueError:
        raise ValueError(
            f"g: got shape {array.shape}, wanted one that broadcasts to {vectors.kept}"
        ) from None
    return spread.astype(np.float64)


def _flattened(value: Any, shape: tuple[int, ...], name: str, dtype: np.dtype) -> np.ndarray:
    """A vector of one length, as a plain copy in `dtype`."""
    array = checks.as_floating(name, value)
    if array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, wanted {shape}")
    return checks.as_plain(array, dtype).copy()


def _has_same_memory(a: np.ndarray | None, b: np.ndarray) -> bool:
    return a is not None and bool(np.may_share_memory(a, b))


# ---- the kernels ---------------------------------------------------------------------------------


def _where(vectors: _Vectors) -> dict[str, Any]:
    """What rms_norm is told of the axes; in rows, of the shape, which is the shorter way there."""
    if vectors.in_rows:
        return {"normalized_shape": vectors.elements or (1,)}
    return {"normalized_shape": None, "axis": vectors.axes}


def _with_axis(vectors: _Vectors, array: np.ndarray) -> np.ndarray:
    """Vectors of one number each have no axis of their own: they get one."""
    return array if vectors.axes else array[..., np.newaxis]


def _rms_norm(
    vectors: _Vectors, weight: np.ndarray | None, kind: np.dtype, out: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """rms_norm without an eps, in `kind`, and rstd = sqrt(n) / ||x|| of each vector, flat."""
    dtype = None if kind == vectors.dtype else kind
    if _is_soon_copied(vectors):
        rows = np.ascontiguousarray(vectors.seen(vectors.array))
        y, rstd = _core.rms_norm(
            rows, vectors.elements, weight, 0.0, dtype=dtype, return_stats=True
        )
        whole = interop.as_bits(y).transpose(np.argsort(vectors.order))
        return _in_place(whole, out), rstd.ravel()
    y, rstd = _core.rms_norm(
        _with_axis(vectors, vectors.array), weight=weight, eps=0.0,
        out=None if out is None else _with_axis(vectors, out), dtype=dtype, return_stats=True,
        **_where(vectors),
    )  # fmt: skip
    y = interop.as_bits(y.reshape(vectors.shape)) if out is None else out
    return y, rstd.ravel()


def _in_place(array: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    """An array's elements in `out`, or, C-contiguous, in an array of their own."""
    if out is None:
        return np.ascontiguousarray(array)
    out[...] = array
    return out


def _is_soon_copied(vectors: _Vectors) -> bool:
    """Whether to bring vectors into rows costs less than to read them where they lie."""
    if vectors.in_rows:
        return False
    side_by_side = vectors.order[0] == len(vectors.shape) - 1
    return vectors.array.size < (_MANY // 4 if side_by_side else _MANY)


def _per_element(vectors: _Vectors, value: float) -> np.ndarray:
    """A weight that is the same for all of a vector."""
    return np.full(vectors.elements or (1,), value, vectors.compute)


def _times_rows(
    vectors: _Vectors, weight: np.ndarray, kind: np.dtype, run: int, out: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """rms_norm with a weight for each row, in one call of the kernel.

    It takes weights for each row and element. To load them as fast as it can, it must find a run of
    them side by side; other elements of the row see the same run.
    """
    shape = (weight.size, vectors.n // run, run)
    spread = np.broadcast_to(np.repeat(weight, run).reshape(-1, 1, run), shape)
    y, rstd = _core.rms_norm(
        vectors.array.reshape(shape), shape[1:], spread, 0.0,
        out=None if out is None else out.reshape(shape), dtype=kind, return_stats=True,
    )  # fmt: skip
    return interop.as_bits(y.reshape(vectors.shape)) if out is None else out, rstd


@functools.cache
def _run_of(n: int) -> int:
    """The longest run of weights that divides a row of n; 0 where there is none."""
    return max((run for run in _RUN if n % run == 0), default=0)


def _times(
    vectors: _Vectors, weight: np.ndarray, kind: np.dtype, out: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """rms_norm with a weight for each vector, and rstd; rounded to `kind` once."""
    contiguous = vectors.lead and vectors.in_rows and vectors.array.flags.c_contiguous
    run = _run_of(vectors.n) if contiguous and vectors.array.size >= _MANY else 0
    if run and (out is None or out.flags.c_contiguous):
        return _times_rows(vectors, weight, kind, run, out)
    direct = kind == vectors.compute
    y, rstd = _rms_norm(vectors, None, vectors.compute, out if direct else None)
    np.multiply(y, weight.reshape(vectors.kept), out=y)
    return _stored(y, kind, out), rstd


def _stored(values: np.ndarray, kind: np.dtype, out: np.ndarray | None = None) -> np.ndarray:
    """`values`, rounded once to `kind`, in `out` if there is one."""
    if values.dtype != kind:
        if interop.is_bfloat16(kind) and values.dtype == checks.FLOAT64:
            values = interop.to_odd(values)
        values = interop.to_bits(values) if kind == interop.BITS else values.astype(kind)
    if out is None or out is values:
        return values
    out[...] = values
    return out


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a * b, b of a's shape or 1 along some axes; in memory that may have been used before."""
    product: np.ndarray = _core.new_result(a.shape, a.dtype)[0]
    return np.multiply(a, b, out=product)


def _dots(vectors: _Vectors, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The scalar product of each vector of a with that of b, in float64; C-contiguous arrays."""
    if vectors.lead and vectors.axes and vectors.order[0] == len(vectors.shape) - 1:
        # Side by side as they lie: what backward sums over rows, for a weight.
        shape, ones = (vectors.n, vectors.lead[0]), np.ones(vectors.n, vectors.compute)
        product = _core.rms_norm_backward(
            a.reshape(shape), b.reshape(shape), shape[1], ones, output_mask=(False, True)
        )[1]
        return product.astype(np.float64)
    products = np.ascontiguousarray(vectors.as_rows(_product(a, b)))
    mean, variance = np.empty((2, len(products)), vectors.compute)
    _core.moments_rows(1, vectors.compute, products, mean, variance)
    return mean.astype(np.float64) * vectors.n


# ---- small and ordinary calls, without what others take ------------------------------------------


def _is_plain(x: Any) -> bool:
    return (
        type(x) is np.ndarray
        and (x.dtype is checks.FLOAT32 or x.dtype is checks.FLOAT64)
        and 0 < x.size < _MANY
        and x.flags.c_contiguous
    )


def _plain_weight_norm(v: Any, g: Any) -> np.ndarray | None:
    """weight_norm of rows, or None where they want more care; the bits are the same."""
    if not (_is_plain(v) and _is_plain(g) and g.ndim == v.ndim > 1 and g.size == len(v) == len(g)):
        return None
    w, rstd = _core.rms_norm(v, v.shape[1:], None, 0.0, return_stats=True)
    with np.errstate(all="ignore"):
        weight = (g.astype(np.float64) / math.sqrt(v.size // len(v))).astype(v.dtype)
        ordinary = _are_ordinary(rstd, weight.ravel())
        return np.multiply(w, weight, out=w) if ordinary else None


def _plain_unit_norm(x: Any, eps: Any) -> np.ndarray | None:
    """unit_norm of rows, or None where they want more care; the bits are the same."""
    if not (_is_plain(x) and type(eps) is float and x.ndim):
        return None
    root = math.sqrt(x.shape[-1])
    weight = np.full(x.shape[-1], 1 / root, x.dtype)
    y, rstd = _core.rms_norm(x, None, weight, 0.0, return_stats=True)
    # Not so for NaN; a norm next to eps is told in float64.
    return y if float(rstd.max()) * eps < 0.999 * root and eps >= 0 else None


# ---- norms beyond the range of the type that is computed in --------------------------------------


def _split(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of rows of any type: u, of length 1; the norm as a mantissa and an exponent of two.

    A row of zeros has a u of NaN; one that is not finite, a norm of NaN too.
    """
    wide = interop.widened(rows).astype(np.float64)
    largest = np.abs(wide).max(axis=1, keepdims=True, initial=0)
    finite = np.isfinite(largest)
    exponent = np.where(finite, np.frexp(largest)[1], 0)
    scaled = np.ldexp(wide, -exponent)
    mantissa = np.sqrt((scaled * scaled).sum(axis=1, keepdims=True))
    mantissa[~finite] = np.nan
    return scaled / mantissa, mantissa[:, 0], exponent[:, 0]


class _Norms:
    """Norms as mantissa and exponent; `odd` are those that rstd, or a float64, cannot tell."""

    def __init__(self, vectors: _Vectors, rstd: np.ndarray) -> None:
        self.mantissa = math.sqrt(vectors.n) / rstd.astype(np.float64)
        self.exponent = np.zeros(len(rstd), np.int32)
        self.odd = _is_odd(rstd) | (self.mantissa == np.inf)
        self.units: np.ndarray | None = None
        if self.odd.any():
            rows = vectors.as_rows(vectors.array)[self.odd]
            self.units, self.mantissa[self.odd], self.exponent[self.odd] = _split(rows)

    def values(self) -> np.ndarray:
        return np.ldexp(self.mantissa, self.exponent)


def _is_odd(scales: np.ndarray) -> np.ndarray:
    """Which are not as exact as their type can be: beyond its normal numbers."""
    size = np.abs(scales)
    return ~((size >= np.finfo(scales.dtype).tiny) & (size < np.inf))


def _put(vectors: _Vectors, array: np.ndarray, which: np.ndarray, rows: np.ndarray) -> None:
    """Rows in place of some vectors of an array."""
    values = _stored(rows.astype(vectors.compute, copy=False), array.dtype)
    vectors.seen(array)[which.reshape(vectors.lead)] = values.reshape(-1, *vectors.elements)


# ---- weight norm ---------------------------------------------------------------------------------


def _weight_norm(v: Any, g: Any, dim: Any, out: Any, dtype: Any, return_stats: Any) -> Any:
    if interop.asks_for_bits(v, dtype):
        v, g, dtype = interop.as_bits(v), interop.as_bits(g), None
    vectors = _weight_vectors(v, dim)
    kind = vectors.result(dtype)
    gains = _gains(g, vectors).ravel()
    place = vectors.output(out, kind, {"g": g})
    if not vectors.array.size:
        w = np.empty(vectors.shape, kind) if place is None else place
        lengths = np.zeros(vectors.kept) if return_stats else None
    else:
        with np.errstate(all="ignore"):
            w, lengths = _weight_normed(vectors, gains, kind, place, bool(return_stats))
    w = w if out is None else out
    return w if lengths is None else (w, _as_stats(vectors, lengths, _shape_of_g(vectors, dim)))


def _as_stats(vectors: _Vectors, lengths: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    with np.errstate(all="ignore"):
        return lengths.astype(vectors.compute).reshape(shape)


def _shape_of_g(vectors: _Vectors, dim: Any) -> tuple[int, ...]:
    return () if dim is None else vectors.kept


def _weight_normed(
    vectors: _Vectors, gains: np.ndarray, kind: np.dtype, place: np.ndarray | None,
    wants_norms: bool,
) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
    """w, and the norms where they are wanted, in float64."""
    # Vectors that take care are read once more: not from where the result has been written.
    in_place = _has_same_memory(place, vectors.array)
    weight = (gains / math.sqrt(vectors.n)).astype(vectors.compute)
    w, rstd = _times(vectors, weight, kind, None if in_place else place)
    if not _are_ordinary(rstd, weight):
        care = ~np.isfinite(rstd) | (~np.isfinite(1 / weight) & (gains != 0))
        units = _split(vectors.as_rows(vectors.array)[care])[0]
        _put(vectors, w, care, units * gains[care, np.newaxis])
    lengths = _Norms(vectors, rstd).values() if wants_norms else None
    if place is not None and in_place:
        place[...] = w
        w = place
    return w, lengths


def _are_ordinary(rstd: np.ndarray, weight: np.ndarray) -> bool:
    """Whether all are finite, those of the weight's inverse too, in one product.

    An rstd is not where its vector is 0 or next to 0, or not finite itself; 1 / weight is not where
    the weight is 0 or too small to have its digits.
    """
    return math.isfinite(np.dot(rstd, 1 / weight))


def _weight_norm_backward(
    dw: Any, v: Any, g: Any, dim: Any, norm: Any, output_mask: Any
) -> tuple[np.ndarray | None, np.ndarray | None]:
    vectors = _weight_vectors(v, dim)
    grad = vectors.like("dw", dw)
    gains = _gains(g, vectors).ravel()
    given = vectors.norms(norm)
    wants_dv, wants_dg = checks.as_mask(output_mask, "dv, dg")
    shape = np.shape(g)
    if not vectors.array.size:
        empty = np.empty(vectors.shape, vectors.dtype), np.zeros(shape, vectors.compute)
        return empty[0] if wants_dv else None, empty[1] if wants_dg else None
    with np.errstate(all="ignore"):
        units, norms = _units(vectors, given)
        along = _dots(vectors, grad, units)
        along[norms.mantissa == 0] = np.nan
        dg = _summed_to(along.reshape(vectors.kept), shape).astype(vectors.compute)
        dv = _weight_gradient(vectors, grad, units, norms, along, gains) if wants_dv else None
    return dv, dg if wants_dg else None


def _units(vectors: _Vectors, given: np.ndarray | None) -> tuple[np.ndarray, _Norms]:
    """Each vector divided by its norm, in the type that is computed in and C-contiguous."""
    if given is not None:
        rstd = (math.sqrt(vectors.n) / given).astype(vectors.compute).ravel()
        if not _is_odd(rstd).any():
            norms = _Norms(vectors, rstd)
            norms.mantissa = given.ravel()
            shorten = (1 / norms.mantissa).astype(vectors.compute).reshape(vectors.kept)
            return _product(checks.as_plain(vectors.array, vectors.compute), shorten), norms
    weight = _per_element(vectors, 1 / math.sqrt(vectors.n))
    units, rstd = _rms_norm(vectors, weight, vectors.compute, None)
    norms = _Norms(vectors, rstd)
    if norms.units is not None:
        _put(vectors, units, norms.odd, norms.units)
    return np.ascontiguousarray(units), norms


def _weight_gradient(
    vectors: _Vectors, grad: np.ndarray, units: np.ndarray, norms: _Norms, along: np.ndarray,
    gains: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """dv = g / ||v|| (dw - u dg), which takes the place of u."""
    kept, compute = vectors.kept, vectors.compute
    np.multiply(units, along.astype(compute).reshape(kept), out=units)
    np.subtract(grad, units, out=units)
    factor = gains / norms.mantissa
    scale = np.ldexp(factor, -norms.exponent).astype(compute)
    odd = _is_odd(scale) & (gains != 0)
    rows = vectors.as_rows(units)[odd].astype(np.float64) if odd.any() else None
    np.multiply(units, scale.reshape(kept), out=units)
    if rows is not None:
        _put(vectors, units, odd, np.ldexp(rows * factor[odd, None], -norms.exponent[odd, None]))
    return _stored(units, vectors.dtype)


def _summed_to(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Over the axes along which an array of `shape` was broadcast."""
    padded = (1,) * (array.ndim - len(shape)) + shape
    summed = tuple([d for d, n in enumerate(padded) if n == 1])
    return array.sum(summed, keepdims=True).reshape(shape)


# ---- unit norm -----------------------------------------------------------------------------------


def _unit_vectors(x: Any, axis: Any) -> _Vectors:
    return _Vectors("x", x, lambda array: checks.as_axes(axis, array.ndim))


def _unit_norm(x: Any, axis: Any, eps: Any, out: Any, dtype: Any, return_stats: Any) -> Any:
    if interop.asks_for_bits(x, dtype):
        x, dtype = interop.as_bits(x), None
    vectors = _unit_vectors(x, axis)
    kind, least = vectors.result(dtype), checks.as_eps(eps)
    place = vectors.output(out, kind, {})
    if not vectors.array.size:
        y = np.empty(vectors.shape, kind) if place is None else place
        norm = np.zeros(vectors.lead, vectors.compute)
    else:
        with np.errstate(all="ignore"):
            y, norms = _shortened(vectors, least, kind, place)
            norm = norms.values().astype(vectors.compute)
    y = y if out is None else out
    return (y, norm.reshape(vectors.lead)) if return_stats else y


def _shortened(
    vectors: _Vectors, eps: float, kind: np.dtype, place: np.ndarray | None
) -> tuple[np.ndarray, _Norms]:
    in_place = _has_same_memory(place, vectors.array)
    weight = _per_element(vectors, 1 / math.sqrt(vectors.n))
    y, rstd = _rms_norm(vectors, weight, kind, None if in_place else place)
    norms = _Norms(vectors, rstd)
    short = norms.values() < eps
    if short.any():
        _put(vectors, y, short, _wide_rows(vectors, vectors.array, short) / eps)
    if place is not None and in_place:
        place[...] = y
    return y, norms


def _wide_rows(vectors: _Vectors, array: np.ndarray, which: np.ndarray) -> np.ndarray:
    return interop.widened(vectors.as_rows(array)[which]).astype(np.float64)


def _unit_norm_backward(dy: Any, x: Any, axis: Any, eps: Any, norm: Any) -> np.ndarray:
    vectors = _unit_vectors(x, axis)
    grad = vectors.like("dy", dy)
    given, least = vectors.norms(norm), checks.as_eps(eps)
    if not vectors.array.size:
        return np.empty(vectors.shape, vectors.dtype)
    with np.errstate(all="ignore"):
        weight = _per_element(vectors, 1 / math.sqrt(vectors.n))
        if given is None:
            rstd = _rms_norm(vectors, weight, vectors.dtype, None)[1]
        else:
            rstd = (math.sqrt(vectors.n) / given).astype(vectors.compute).ravel()
        norms = _Norms(vectors, rstd)
        dx = _core.rms_norm_backward(
            grad, vectors.array, rstd=rstd.reshape(vectors.lead), weight=weight,
            output_mask=(True, False), **_where(vectors),
        )[0]  # fmt: skip
        dx = interop.as_bits(dx)
        _put_short_gradients(vectors, grad, norms, least, dx)
    return dx


def _put_short_gradients(
    vectors: _Vectors, grad: np.ndarray, norms: _Norms, eps: float, dx: np.ndarray
) -> None:
    """The gradients of vectors that are shorter than eps, or out of the kernel's range."""
    length = norms.values()
    short, zero = length < eps, norms.mantissa == 0
    if norms.units is not None:
        rows, at = _wide_rows(vectors, grad, norms.odd), norms.odd
        rows -= norms.units * (rows * norms.units).sum(axis=1, keepdims=True)
        rows = np.ldexp(rows / norms.mantissa[at, None], -norms.exponent[at, None])
        _put(vectors, dx, at, np.where(zero[at, None], 0, rows))
    if short.any():
        _put(vectors, dx, short, _wide_rows(vectors, grad, short) / eps)


# ---- spectral norm -------------------------------------------------------------------------------


class _Matrix:
    """A weight as a matrix of the type that is computed in, `dim` first.

    Where a product with it leaves the range, it is scaled by a power of two, once and for all:
    `array` is W times 2^-exponent.
    """

    def __init__(self, weight: Any, dim: Any) -> None:
        self.vectors = _Vectors("weight", weight, lambda a: _all_but(as_dim(dim, a.ndim), a.ndim))
        self.compute = self.vectors.compute
        rows = checks.as_plain(self.vectors.as_rows(self.vectors.array), self.compute)
        self.array, self.exponent = rows, 0

    def times(self, vector: np.ndarray, transposed: bool = False) -> np.ndarray:
        """W^T u or W v in float64, over 2^exponent."""
        product = (self.array.T if transposed else self.array) @ vector
        largest = float(np.abs(product).max(initial=0))
        if self.exponent == 0 and not 1e-25 < largest < 1e30 and self.scale():
            return self.times(vector, transposed)
        return product.astype(np.float64)

    def scale(self) -> bool:
        largest = float(np.abs(self.array).max(initial=0))
        self.exponent = math.frexp(largest)[1] if 0 < largest < math.inf else 0
        self.array = np.ldexp(self.array, -self.exponent)
        return self.exponent != 0

    def short(self, vector: np.ndarray, eps: float) -> np.ndarray:
        """vector / max(||vector||, eps), a product with `array`, in the type of W."""
        _, mantissa, exponent = _split(vector[np.newaxis])
        length = np.ldexp(mantissa[0], exponent[0])
        least = np.ldexp(np.float64(eps), -self.exponent)
        return (vector / np.maximum(length, least)).astype(self.compute)

    def sigma(self, u: np.ndarray, v: np.ndarray) -> np.float64:
        """u^T W v over 2^exponent."""
        return np.float64(u.astype(np.float64) @ self.times(v))

    def over(self, array: np.ndarray, sigma: np.float64) -> np.ndarray:
        """array / sigma, in the type of W."""
        divisor = sigma.astype(self.compute)
        if _is_odd(divisor) and sigma != 0:
            return (array.astype(np.float64) / sigma).astype(self.compute)
        return np.divide(array, divisor)

    def restored(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """A matrix in the weight's shape and type."""
        vectors = self.vectors
        values = _stored(rows, vectors.dtype).reshape(*vectors.lead, *vectors.elements)
        return _in_place(values.transpose(np.argsort(vectors.order)), out)


def _spectral_norm(
    weight: Any, u: Any, v: Any, n_power_iterations: Any, eps: Any, dim: Any, out: Any
) -> Any:
    matrix = _Matrix(weight, dim)
    vectors = matrix.vectors
    count = checks.as_count("n_power_iterations", n_power_iterations, 0, "a number")
    least = checks.as_eps(eps)
    u_now = _flattened(u, vectors.lead, "u", matrix.compute)
    if v is None and not count:
        raise TypeError("v: got None, wanted a vector where there is no iteration to form it")
    v_now = None if v is None else _flattened(v, (vectors.n,), "v", matrix.compute)
    place = vectors.output(out, vectors.dtype, {"u": u, "v": v})
    with np.errstate(all="ignore"):
        for _ in range(count):
            v_now = matrix.short(matrix.times(u_now, transposed=True), least)
            u_now = matrix.short(matrix.times(v_now), least)
        assert v_now is not None
        sigma = matrix.sigma(u_now, v_now)
        y = matrix.restored(matrix.over(matrix.array, sigma), place)
        whole = np.asarray(np.ldexp(sigma, matrix.exponent))
    return y if out is None else out, whole, u_now, v_now


def _spectral_norm_backward(
    dy: Any, weight: Any, u: Any, v: Any, sigma: Any, dim: Any
) -> np.ndarray:
    matrix = _Matrix(weight, dim)
    vectors = matrix.vectors
    grad = vectors.as_rows(vectors.like("dy", dy))
    u_now = _flattened(u, vectors.lead, "u", matrix.compute)
    v_now = _flattened(v, (vectors.n,), "v", matrix.compute)
    known = None if sigma is None else _flattened(sigma, (), "sigma", checks.FLOAT64)
    with np.errstate(all="ignore"):
        formed = matrix.sigma(u_now, v_now)
        if known is not None and matrix.exponent == 0:
            formed = np.float64(known)
        along = _sum(_product(grad, matrix.over(matrix.array, formed)), matrix.compute)
        away = np.multiply.outer((u_now * along).astype(matrix.compute), v_now)
        np.subtract(grad, away, out=away)
        dweight = matrix.over(away, formed)
        if matrix.exponent:
            dweight = np.ldexp(dweight, -matrix.exponent)
        return matrix.restored(dweight)


def _sum(array: np.ndarray, compute: np.dtype) -> float:
    """Of all elements, by the kernel."""
    if not array.size:
        return 0.0
    mean, variance = np.empty((2, 1), compute)
    _core.moments_rows(1, compute, np.ascontiguousarray(array).reshape(1, -1), mean, variance)
    return float(mean[0]) * array.size
