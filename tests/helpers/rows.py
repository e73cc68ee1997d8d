"""Rows to test with: distributions that break sums, and rows at the edges of the number range."""

import numpy as np

DISTRIBUTIONS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "uniform": lambda rng, n: rng.random(n) - 0.5,
    "sorted": lambda rng, n: np.sort(rng.standard_normal(n)),
    "lognormal": lambda rng, n: rng.lognormal(0, 2, n),
    "cauchy": lambda rng, n: rng.standard_cauchy(n),
    "spikes": lambda rng, n: np.where(rng.random(n) < 0.01, 1e4, 0) + 1e-3 * rng.standard_normal(n),
    "one outlier": lambda rng, n: np.append(np.zeros(n - 1), 1.0),
    "alternating": lambda rng, n: np.where(np.arange(n) % 2, 0.3, -0.3),
    "ramp": lambda rng, n: np.arange(n) / n,
    "two values": lambda rng, n: np.where(rng.random(n) < 0.5, 0.7, -0.1),
}

# Means in units of the row's own standard deviation.
MEANS = (0, 1, 55.5, 1e3, 1e5, 1e6, 1e7)


def spread(values):
    """The standard deviation, or 1 where there is none."""
    return float(np.std(values)) or 1.0


def distribution_row(rng, kind, n, mean, dtype):
    """A row of `kind` whose mean is `mean` times its standard deviation."""
    values = DISTRIBUTIONS[kind](rng, n)
    return (values + mean * spread(values)).astype(dtype)


def hard_rows(rng, n, dtype):
    """Ordinary rows among rows that take every special path there is: (rows, n)."""
    info = np.finfo(dtype)
    normal = rng.standard_normal((24, n))
    rows = normal.astype(dtype)
    rows[1] = normal[1] + 2.0 ** (info.nmant - 3)  # the mean is all that fits the type
    rows[2] = 2.0**info.nmant * 2 + 2 * rng.integers(0, 3, n)  # its rounding exceeds the deviations
    rows[4] = np.nan
    rows[5, n // 2] = np.nan
    rows[6, n // 3] = np.inf
    rows[7, -1] = -np.inf
    rows[9] = 0
    rows[10] = 1.1
    rows[11] = np.where(np.arange(n) % 2, info.max, -info.max)
    rows[12] = info.max
    rows[13] = normal[13] / 8 * float(info.max)
    rows[14] = normal[14] * float(info.tiny)
    rows[15] = normal[15] * float(info.smallest_subnormal) * 100
    rows[16] = info.smallest_subnormal
    rows[18] = DISTRIBUTIONS["cauchy"](rng, n)
    rows[19] = DISTRIBUTIONS["one outlier"](rng, n)
    rows[20] = np.sort(normal[20])
    rows[21] = -0.0
    return rows
