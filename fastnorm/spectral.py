"""Spectral norm: power iterations in NumPy, the vectors' norms and products by the kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import _core, checks
from .weight_calls import VectorCall, all_but
from .weight_repairs import stored


class _Matrix:
    """A weight as a matrix of the type that is computed in, `dim` first.

    Where a product with it leaves the range, it is scaled by a power of two, once and for all:
    `array` is W times 2^-exponent.
    """

    def __init__(self, weight: Any, dim: Any) -> None:
        self.vectors = VectorCall("weight", weight, lambda ndim: all_but(dim, ndim), False)
        self.compute = self.vectors.compute
        self.array, self.exponent = self.rows(self.vectors.source), 0

    def rows(self, array: np.ndarray) -> np.ndarray:
        """An array of the weight's shape as W is."""
        vectors = self.vectors
        flat = array.transpose(vectors.order).reshape(vectors.count, vectors.n)
        return checks.as_plain(flat, self.compute)

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
        least = float(np.ldexp(np.float64(eps), -self.exponent))
        done = _core.straight_unit_norm(vector, -1, least, None, True)
        if done is None:  # there is nothing in it
            return vector.astype(self.compute)
        unit, norm = done
        return (vector / norm if norm == least == 0 else unit).astype(self.compute)

    def sigma(self, u: np.ndarray, v: np.ndarray) -> np.float64:
        """u^T W v over 2^exponent."""
        return np.float64(u.astype(np.float64) @ self.times(v))

    def over(self, array: np.ndarray, sigma: np.float64) -> np.ndarray:
        """array / sigma, in the type of W."""
        divisor = sigma.astype(self.compute)
        is_normal = np.finfo(self.compute).tiny <= abs(divisor) < np.inf
        if not is_normal and sigma != 0:
            return (array.astype(np.float64) / sigma).astype(self.compute)
        return np.divide(array, divisor)

    def along(self, grad: np.ndarray, sigma: np.float64) -> float:
        """sum(grad * W) / sigma."""
        norm, refused, along = np.ones(1), np.zeros(1, np.uint8), np.zeros(1)
        if grad.size:
            _core.weight_norm(
                (1, 1, 1, grad.size), self.compute, self.array, None, None, -1.0, norm, refused,
                grad, along, given=True,
            )  # fmt: skip
        if refused[0]:
            return float((grad.astype(np.float64) * self.over(self.array, sigma)).sum())
        return float(along[0] / sigma)

    def restored(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """A matrix in the weight's shape and type."""
        vectors = self.vectors
        shape = vectors.source.shape
        moved = stored(rows, vectors.dtype).reshape([shape[d] for d in vectors.order])
        values = moved.transpose(np.argsort(vectors.order))
        if out is None:
            return np.ascontiguousarray(values)
        out[...] = values
        return out


def _flattened(value: Any, shape: tuple[int, ...], name: str, dtype: np.dtype) -> np.ndarray:
    """A vector of one length, as a plain copy in `dtype`."""
    array = checks.as_floating(name, value)
    if array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, wanted {shape}")
    return checks.as_plain(array, dtype).copy()


def norm(weight: Any, u: Any, v: Any, n_power_iterations: Any, eps: Any, dim: Any, out: Any) -> Any:
    matrix = _Matrix(weight, dim)
    vectors = matrix.vectors
    count = checks.as_count("n_power_iterations", n_power_iterations, 0, "a number")
    least = checks.as_eps(eps)
    u_now = _flattened(u, vectors.lead, "u", matrix.compute)
    if v is None and not count:
        raise TypeError("v: got None, wanted a vector where there is no iteration to form it")
    v_now = None if v is None else _flattened(v, (vectors.n,), "v", matrix.compute)
    place = None
    if out is not None:
        place = vectors.checked_output(out, vectors.dtype, {"u": u, "v": v})
    with np.errstate(all="ignore"):
        for _ in range(count):
            v_now = matrix.short(matrix.times(u_now, transposed=True), least)
            u_now = matrix.short(matrix.times(v_now), least)
        assert v_now is not None
        sigma = matrix.sigma(u_now, v_now)
        y = matrix.restored(matrix.over(matrix.array, sigma), place)
        whole = np.asarray(np.ldexp(sigma, matrix.exponent))
    return y if out is None else out, whole, u_now, v_now


def norm_backward(dy: Any, weight: Any, u: Any, v: Any, sigma: Any, dim: Any) -> np.ndarray:
    matrix = _Matrix(weight, dim)
    vectors = matrix.vectors
    grad = matrix.rows(vectors.like_x("dy", dy))
    u_now = _flattened(u, vectors.lead, "u", matrix.compute)
    v_now = _flattened(v, (vectors.n,), "v", matrix.compute)
    known = None if sigma is None else _flattened(sigma, (), "sigma", checks.FLOAT64)
    with np.errstate(all="ignore"):
        formed = matrix.sigma(u_now, v_now)
        if known is not None and matrix.exponent == 0:
            formed = np.float64(known)
        along = matrix.along(grad, formed)
        away = np.multiply.outer((u_now * along).astype(matrix.compute), v_now)
        np.subtract(grad, away, out=away)
        dweight = matrix.over(away, formed)
        if matrix.exponent:
            dweight = np.ldexp(dweight, -matrix.exponent)
        return matrix.restored(dweight)
