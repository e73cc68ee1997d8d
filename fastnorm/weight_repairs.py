"""Vectors that leave the range of the type that is computed in: the kernels refuse them, and they
are put right here, in double precision and scaled by powers of two."""

from __future__ import annotations

import numpy as np

from . import _core, checks, interop


def split(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of rows of any type: u, of length 1; the norm as a mantissa and an exponent of two.

    A row of zeros has a u of NaN; one that is not finite, a norm of NaN too.
    """
    scaled, exponent = _scaled(rows)
    mantissa = np.sqrt((scaled * scaled).sum(axis=1, keepdims=True))
    mantissa[~np.isfinite(scaled).all(axis=1)] = np.nan
    return scaled / mantissa, mantissa[:, 0], exponent


def _scaled(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row times 2^-exponent, which brings its largest into [0.5, 1), as doubles."""
    wide = interop.widened(rows).astype(np.float64)
    largest = np.abs(wide).max(axis=1, initial=0)
    exponent = np.where(np.isfinite(largest), np.frexp(largest)[1], 0)
    return np.ldexp(wide, -exponent[:, np.newaxis]), exponent


def stored(values: np.ndarray, kind: np.dtype) -> np.ndarray:
    """`values`, rounded once to `kind`."""
    if values.dtype == kind:
        return values
    if interop.is_bfloat16(kind) and values.dtype == checks.FLOAT64:
        values = interop.to_odd(values)
    return interop.to_bits(values) if kind == interop.BITS else values.astype(kind)


class _Refused:
    """The vectors that were refused, as rows."""

    def __init__(self, layout: tuple[int, ...], refused: np.ndarray) -> None:
        self.layout = layout
        self.which = refused.astype(bool).reshape(layout[0], layout[2])

    def of(self, array: np.ndarray) -> np.ndarray:
        rows = self._seen(array)[self.which]
        return rows.reshape(len(rows), -1)

    def put(self, array: np.ndarray, values: np.ndarray) -> None:
        """Doubles, rounded to what is computed in before they are to anything narrower."""
        compute = checks.compute_type(array.dtype)
        rows = stored(values.astype(compute, copy=False), array.dtype.newbyteorder("="))
        self._seen(array)[self.which] = rows.reshape(len(rows), self.layout[1], self.layout[3])

    def _seen(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.layout).transpose(0, 2, 1, 3)


def put_right(
    layout: tuple[int, ...], v: np.ndarray, w: np.ndarray | None, g: np.ndarray | None, eps: float,
    norm: np.ndarray, refused: np.ndarray, dw: np.ndarray | None, along: np.ndarray | None,
) -> None:  # fmt: skip
    """What a kernel refused of a call of _core.weight_norm, with its arguments; norm and along are
    put right too."""
    vectors = _Refused(layout, refused)
    which = vectors.which.ravel()
    with np.errstate(all="ignore"):
        units, mantissa, exponent = split(vectors.of(v))
        norm[which] = np.ldexp(mantissa, exponent)
        gains = np.ones(1) if g is None else g.reshape(-1)[which].astype(np.float64)
        if dw is None or along is None:
            values = units * gains[:, np.newaxis]
            numerator = v
        else:
            values, along[which] = _gradients(vectors.of(dw), units, mantissa, exponent, gains)
            numerator = dw
        if eps >= 0:
            values = _shorter(vectors.of(numerator), values, norm[which], eps)
        if w is not None:
            vectors.put(w, values)


def _shorter(rows: np.ndarray, values: np.ndarray, norm: np.ndarray, eps: float) -> np.ndarray:
    """`values`, but rows / eps of vectors that are shorter than that; zeros where both are 0."""
    short = (norm < eps)[:, np.newaxis]
    values = np.where((norm == 0)[:, np.newaxis], 0, values)
    return np.where(short, interop.widened(rows).astype(np.float64) / eps, values)


def _gradients(
    rows: np.ndarray, units: np.ndarray, mantissa: np.ndarray, exponent: np.ndarray,
    gains: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """dv = g / ||v|| (dw - u dg), and dg = sum(dw u)."""
    grads, up = _scaled(rows)
    along = (grads * units).sum(axis=1)
    gain, more = np.frexp(gains)
    away = (grads - units * along[:, np.newaxis]) * (gain / mantissa)[:, np.newaxis]
    return np.ldexp(away, (up - exponent + more)[:, np.newaxis]), np.ldexp(along, up)


_core.register_careful_vectors(put_right)
