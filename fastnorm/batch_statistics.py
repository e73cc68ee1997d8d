"""Statistics of channels that are gathered in parts: exact sums of what each block of x has."""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from . import _core, checks, dialects, exact_sums, interop
from .call import why_copied
from .exact_sums import Doubles, Fixed, Flags

#: A block has so many consecutive samples where a sample has one element a channel.
ROWS = 64
# What is copied at a time, of x that the kernels cannot read as it lies.
_COPIED_BYTES = 1 << 23
# Squared deviations whose mean is smaller have lost digits to the end of the type's range.
_LEAST_SQUARE = {checks.FLOAT32: 2.0**-100, checks.FLOAT64: 2.0**-960}


class _Totals(NamedTuple):
    """What has been gathered, and never changes: adding makes another one."""

    elements: int
    #: The sums of n mean, and of m2 + n mean^2, over blocks of n elements.
    first: Fixed
    second: Fixed
    #: Channels with a NaN or Inf in them; those whose m2 is beyond float64.
    invalid: Flags
    overflowed: Flags

    @classmethod
    def zeros(cls, channels: int) -> _Totals:
        nothing, none = Fixed.zeros(channels), np.zeros(channels, np.bool_)
        return cls(0, nothing, nothing, none, none)

    def mean(self) -> Doubles:
        """first / count, or 0."""
        unit = self.first.low
        sums = self.first.integers(unit)
        results = [_quotient(total, max(self.elements, 1), unit) for total in sums]
        return np.where(self.invalid, np.nan, results)

    def m2_over(self, divisor: int) -> Doubles:
        """(second - first^2 / count) / divisor, or 0."""
        count = max(self.elements, 1)
        unit = min(self.second.low, 2 * self.first.low)
        shift = exact_sums.WIDTH * (2 * self.first.low - unit)
        sums, squares = self.first.integers(self.first.low), self.second.integers(unit)
        scaled = squares * count - (sums * sums << shift)
        results = [_quotient(total, count * divisor, unit) for total in scaled]
        return np.where(self.invalid, np.nan, np.where(self.overflowed, np.inf, results))

    def plus(self, other: _Totals) -> _Totals:
        return _Totals(
            self.elements + other.elements, self.first.plus(other.first),
            self.second.plus(other.second), self.invalid | other.invalid,
            self.overflowed | other.overflowed,
        )  # fmt: skip

    def compact(self) -> _Totals:
        """The same without what no result depends on."""
        lost = self.invalid | self.overflowed
        first, second = self.first.without(self.invalid), self.second.without(lost)
        return self._replace(first=first.compact(), second=second.compact())

    def is_equal(self, other: _Totals) -> bool:
        mine, others = self.compact(), other.compact()
        return (
            mine.elements == others.elements
            and np.array_equal(mine.invalid, others.invalid)
            and np.array_equal(mine.overflowed | mine.invalid, others.overflowed | others.invalid)
            and mine.first.is_equal(others.first)
            and mine.second.is_equal(others.second)
        )


class BatchStatistics:
    """Count, mean and variance of each channel, from a stream, from parts, from many machines.

    `update` takes what comes, `merge` what others have gathered, and both add without rounding. So
    the order in which parts come does not matter, and neither does where x is cut, as long as cuts
    fall between blocks: the results have the same bits. A block is what one sample has of a channel
    ((N, C, L), (N, C, H, W), (N, H, W, C), ...); of (N, C) it is 64 consecutive samples, counted
    from the beginning of each `update`. Cuts elsewhere change results by a few units in the last
    place at most.

    The mean and the sum of squares of a block are found as a batch norm's own are, and a result is
    rounded once more, when it is asked for. Of float64 input means are off by at most 1e-12
    standard deviations (and their own last bit), variances by 1e-12 of themselves, also where the
    mean is a million standard deviations; of other types, by 1e-6.

    A NaN or Inf makes its channel's results NaN, for good, and no other's. Any number of threads
    may update one object; what one of them reads is from before or after an update.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    channel_axis : int
        The axis of x that channels lie on: 1, or -1 for channels last, or any other but 0, which
        the samples have.

    Raises
    ------
    TypeError, ValueError
        If an argument is no integer, `num_features` is negative, or `channel_axis` 0.

    References
    ----------
    Chan, Golub, LeVeque: Updating Formulae and a Pairwise Algorithm for Computing Sample Variances
    (1979), whose formula is evaluated exactly here.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> statistics = fastnorm.BatchStatistics(2)
    >>> x = np.arange(12.0).reshape(2, 2, 3)
    >>> statistics.update(x[:1]).update(x[1:])
    BatchStatistics(2, channel_axis=1, count=6)
    >>> statistics.mean, statistics.var()
    (array([4., 7.]), array([9.66666667, 9.66666667]))
    >>> statistics == fastnorm.BatchStatistics(2).update(x)
    True
    """

    def __init__(self, num_features: int, *, channel_axis: int = 1) -> None:
        self._channels = checks.as_count("num_features", num_features, 0, "an integer")
        self._axis = _as_channel_axis(channel_axis)
        self._totals = _Totals.zeros(self._channels)
        self._lock = threading.Lock()

    @property
    def num_features(self) -> int:
        """C, the number of channels."""
        return self._channels

    @property
    def channel_axis(self) -> int:
        """The axis of x that channels lie on."""
        return self._axis

    # ---- gathering ------------------------------------------------------------------------------

    def update(self, x: Any) -> BatchStatistics:
        """Add the elements of x.

        Parameters
        ----------
        x : array_like
            At least 2 axes, the first of them samples, C channels on `channel_axis`. float16,
            bfloat16, float32 or float64 (integers become float64); tensors too. Without elements it
            changes nothing.

        Returns
        -------
        BatchStatistics
            The object itself.

        Raises
        ------
        TypeError, ValueError
            If x is not of such a type or shape. Nothing has been added then.
        """
        array = checks.as_floating("x", interop.convert("x", x))
        if array.dtype.kind == "V" and not interop.is_bits(array.dtype):
            _core.set_bfloat16(array.dtype)
        axis = self._axis_of(array)
        if array.size:
            self._add(_gathered(array, axis))
        return self

    def merge(self, other: BatchStatistics) -> BatchStatistics:
        """Add what `other` has gathered, which may have had its channels on another axis.

        Returns
        -------
        BatchStatistics
            The object itself.

        Raises
        ------
        TypeError, ValueError
            If `other` is none, or of another number of channels.
        """
        if not isinstance(other, BatchStatistics):
            raise TypeError(f"other: got {type(other).__name__}, wanted BatchStatistics")
        if other._channels != self._channels:
            raise ValueError(
                f"other: got statistics of {other._channels} channels, wanted {self._channels}"
            )
        self._add(other._totals)
        return self

    def _add(self, totals: _Totals) -> None:
        with self._lock:
            self._totals = self._totals.plus(totals)

    def _axis_of(self, x: np.ndarray) -> int:
        """The channels' axis, counted from the front."""
        axis = self._axis + x.ndim if self._axis < 0 else self._axis
        if x.ndim < 2 or not 0 < axis < x.ndim or x.shape[axis] != self._channels:
            raise ValueError(
                f"x: got shape {x.shape}, wanted samples on axis 0 and {self._channels} channels "
                f"on axis {self._axis}"
            )
        return axis

    # ---- results --------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """How many elements of each channel there have been."""
        return self._totals.elements

    @property
    def mean(self) -> Doubles:
        """The mean of each channel, float64, (C,); 0 where there are no elements."""
        return self._totals.mean()

    @property
    def m2(self) -> Doubles:
        """The sum of squared deviations from the mean, float64, (C,); 0 without elements."""
        return self._totals.m2_over(1)

    def var(self, ddof: int = 0) -> Doubles:
        """The variance of each channel, ``m2 / (count - ddof)``, float64, (C,).

        ddof = 0 is the variance of these elements, which normalises in training; ddof = 1 the
        unbiased estimate for where they come from. NaN where ``count - ddof`` is not positive.

        Raises
        ------
        TypeError, ValueError
            If `ddof` is not an integer of at least 0.
        """
        totals, removed = self._totals, checks.as_count("ddof", ddof, 0, "an integer")
        if totals.elements <= removed:
            return np.full(self._channels, np.nan)
        return totals.m2_over(totals.elements - removed)

    def running(self, dialect: str = "torch") -> tuple[Doubles, Doubles]:
        """The mean and variance that a batch norm of this dialect keeps, float64, (C,).

        torch keeps the unbiased variance (of a single element: 0), "keras", "flax" and "onnx" the
        biased one.

        Raises
        ------
        TypeError, ValueError
            If the dialect is unknown, or there have been no elements.
        """
        totals, rules = self._totals, dialects.as_dialect(dialect)
        if not totals.elements:
            raise ValueError("count: got 0, wanted statistics of at least one element")
        removed = 1 if rules.is_unbiased and totals.elements > 1 else 0
        return totals.mean(), totals.m2_over(totals.elements - removed)

    # ---- copying and comparing ------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_totals": self._totals.compact(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        assert isinstance(other, BatchStatistics)
        return (
            (self._channels, self._axis) == (other._channels, other._axis)
            and self._totals.is_equal(other._totals)
        )  # fmt: skip

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self._channels}, channel_axis={self._axis}, "
            f"count={self.count})"
        )


def _as_channel_axis(value: Any) -> int:
    message = f"channel_axis: got {value!r}, wanted an integer other than 0, the samples' axis"
    try:
        axis = operator.index(value)
    except TypeError:
        raise TypeError(message) from None
    if not axis:
        raise ValueError(message)
    return axis


def _quotient(numerator: int, denominator: int, unit: int) -> float:
    """``numerator 2^(WIDTH unit) / denominator``, rounded once."""
    shift = exact_sums.WIDTH * unit
    try:
        # Python's division of integers is right to the last bit.
        return (numerator << max(shift, 0)) / (denominator << max(-shift, 0))
    except OverflowError:
        return math.inf if numerator > 0 else -math.inf


# ---- from x to sums ------------------------------------------------------------------------------


def _gathered(x: np.ndarray, axis: int) -> _Totals:
    """What x adds."""
    totals = _Totals.zeros(x.shape[axis])
    with np.errstate(all="ignore"):
        for n, moments in _blocks(x, axis):
            totals = totals.plus(_totals_of(n, moments))
    return totals


def _blocks(x: np.ndarray, axis: int) -> Iterator[tuple[int, Doubles]]:
    """The moments of blocks of n elements: n and (3, blocks, C), several times."""
    channels = x.shape[axis]
    n = math.prod(x.shape[1:]) // channels
    if x.ndim == 2:
        for piece in _pieces(x, ROWS):
            whole = len(piece) // ROWS * ROWS
            for part, rows in (piece[:whole], ROWS), (piece[whole:], len(piece) - whole):
                if len(part):
                    yield rows, moments_down(part.reshape(-1, rows, channels))
    elif axis == x.ndim - 1:
        for piece in _pieces(x, 1):
            yield n, moments_down(piece.reshape(-1, n, channels))
    else:
        for piece in _pieces(np.moveaxis(x, axis, 1), 1):
            planes = piece.reshape(-1, n)
            moments = _core.plane_moments(planes) if n > 1 else _alone(planes)
            yield n, moments.reshape(3, -1, channels)


def _alone(x: np.ndarray) -> Doubles:
    """Moments of blocks of one number: itself, and no deviation."""
    moments = np.zeros((3, x.size))
    moments[0] = checks.as_plain(x, checks.FLOAT64).reshape(-1)
    return moments


def moments_down(x: np.ndarray) -> Doubles:
    """Pivots, shifts and m2 of (blocks, n, C), contiguous, over n: (3, blocks, C)."""
    blocks, n, channels = x.shape
    if n == 1:
        return _alone(x).reshape(3, blocks, channels)
    if channels == 1:  # the same numbers, and a kernel that has more of them side by side
        return _core.plane_moments(x.reshape(blocks, n)).reshape(3, blocks, 1)
    compute = checks.compute_type(x.dtype)
    moments = _core.channels_last_moments(x.reshape(-1, channels), n, compute)
    m2 = moments[2]
    _put_right(x, moments, ~((m2 >= n * _LEAST_SQUARE[compute]) & np.isfinite(m2)))
    return moments


def _put_right(x: np.ndarray, moments: Doubles, doubtful: Flags) -> None:
    """Moments of these blocks again, in float64 and by a kernel that scales what is out of range.

    Here are, too, blocks of one number: from their moments alone they cannot be told from others.
    """
    found = np.nonzero(doubtful)
    step = max(_COPIED_BYTES // (8 * x.shape[1]), 1)
    for start in range(0, len(found[0]), step):
        block, channel = (index[start : start + step] for index in found)
        numbers = checks.as_plain(x[block, :, channel], checks.FLOAT64)
        moments[:, block, channel] = _core.plane_moments(numbers)


def _pieces(x: np.ndarray, step: int) -> Iterator[np.ndarray]:
    """x as the kernels can read it: as it is, or copies of some multiple of `step` samples."""
    if x.flags.c_contiguous and not why_copied(x):
        yield x
        return
    samples = max(_COPIED_BYTES // (x[:step].nbytes or 1), 1) * step
    for start in range(0, len(x), samples):
        yield np.require(x[start : start + samples], x.dtype.newbyteorder("="), ("C", "A"))


def _totals_of(n: int, moments: Doubles) -> _Totals:
    """What blocks of n elements add: (3, M, C), the pivots, shifts and m2 of M blocks."""
    blocks, channels = moments.shape[1:]
    moments, invalid, overflowed = _finite(moments)
    first = squares = within = Fixed.zeros(channels)
    for start in range(0, blocks, exact_sums.MOST_TERMS):
        pivot, shift, m2 = moments[:, start : start + exact_sums.MOST_TERMS]
        high, low = _rounded(pivot, shift, m2, n) if n > 1 else (pivot, None)
        means, their_squares = exact_sums.sums_and_squares(high, low)
        first, squares = first.plus(means), squares.plus(their_squares)
        if n > 1:
            within = within.plus(exact_sums.sums(m2))
    return _Totals(blocks * n, first.times(n), squares.times(n).plus(within), invalid, overflowed)


def _finite(moments: Doubles) -> tuple[Doubles, Flags, Flags]:
    """Moments with 0 for what is not finite, and the channels that are invalid or overflowed."""
    channels = moments.shape[2]
    if np.isfinite(moments.sum()):  # and if it is not, a closer look
        return moments, np.zeros(channels, np.bool_), np.zeros(channels, np.bool_)
    finite = np.isfinite(moments)
    invalid = (~finite[:2].all(axis=0) | np.isnan(moments[2])).any(axis=0)
    overflowed = ~finite[2].all(axis=0)
    return np.where(finite & ~invalid, moments, 0), invalid, overflowed


def _rounded(pivot: Doubles, shift: Doubles, m2: Doubles, n: int) -> tuple[Doubles, Doubles]:
    """Means as sums of two numbers, to some 2^-50 of a block's standard deviation.

    All that is finer would make for more digits to add, and is less than the moments' own error.
    """
    coarse = np.sqrt(m2)
    coarse *= 6 / math.sqrt(n)
    high = pivot + coarse
    high -= coarse
    low = pivot - high
    low += shift
    low += coarse
    low -= coarse
    return high, low
