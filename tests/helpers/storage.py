"""The types that arrays may hold, exact rounding to them, and rows that are hard for each."""

import contextlib

import numpy as np

from fastnorm import _core, accuracy

with contextlib.suppress(ImportError):
    import ml_dtypes  # noqa: F401  (np.dtype("bfloat16") needs it; without it, that is left out)


def _dtypes():
    for name in _core.DTYPES:
        with contextlib.suppress(TypeError):
            yield np.dtype(name)


STORAGE = tuple(_dtypes())
HALVES = tuple(dtype for dtype in STORAGE if dtype.itemsize == 2)
FLOAT32, FLOAT64 = np.dtype("f4"), np.dtype("f8")

# Largest, least normal and least number of each type.
LIMITS = {
    "float16": (65504.0, 2.0**-14, 2.0**-24),
    "bfloat16": ((2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-133),
    "float32": (float(np.finfo("f4").max), 2.0**-126, 2.0**-149),
    "float64": (float(np.finfo("f8").max), 2.0**-1022, 5e-324),
}
MANTISSA = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}


def compute_type(*dtypes):
    """What is computed in: float64 where one of them is."""
    return FLOAT64 if any(np.dtype(d) == FLOAT64 for d in dtypes) else FLOAT32


def cast(values, dtype):
    """astype without a word about overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(values).astype(dtype)


def rounded(values, dtype):
    """`values`, float32 or float64, rounded once to the nearest of `dtype`, ties to even.

    In integers and powers of two: ml_dtypes takes a float64 to bfloat16 by way of float32.
    """
    values = np.asarray(values)
    if dtype == values.dtype:
        return values.copy()
    if dtype in (FLOAT32, FLOAT64):
        return cast(values, dtype)
    wide = cast(values, FLOAT64)
    unit = accuracy.ulp(np.where(np.isfinite(wide), wide, 0), dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = np.where(np.isfinite(wide), np.rint(wide / unit) * unit, wide)
        beyond = np.abs(nearest) > LIMITS[dtype.name][0]
        nearest = np.where(beyond, np.copysign(np.inf, wide), np.copysign(nearest, wide))
        return nearest.astype(np.float32).astype(dtype)  # both exact


def special_rows(rng, n, dtype):
    """Ordinary rows among rows that take every special path of the type: (20, n)."""
    largest, tiny, least = LIMITS[dtype.name]
    digits = MANTISSA[dtype.name]
    normal = rng.standard_normal((20, n))
    rows = normal.copy()
    with np.errstate(over="ignore"):
        rows[1] = normal[1] + 2.0 ** (digits - 3)  # the mean is all that fits the type
        rows[2] = 2.0**digits * 2 + 2 * rng.integers(0, 3, n)
        rows[4] = np.nan
        rows[5, n // 2] = np.inf
        rows[6, -1] = np.nan
        rows[8] = 0
        rows[9] = 1.1
        rows[10] = np.where(np.arange(n) % 2, largest, -largest)
        rows[11] = largest
        rows[12] = np.clip(normal[12] / 8, -1, 1) * largest
        rows[13] = normal[13] * tiny
        rows[14] = np.clip(np.rint(normal[14] * 4), -9, 9) * least
        rows[15] = least
        rows[16] = np.append(np.zeros(n - 1), 1.0)
        rows[18] = -0.0
        rows[19] = np.sort(normal[19])
    return cast(rows, dtype)
