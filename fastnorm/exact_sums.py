"""Sums without rounding: of float64 numbers, many at a time, for each of C channels.

A sum is a fixed-point number: limbs of 18 bits in int64, as many as its terms reach over. What is
added is cut into digits first, float64 integers of so few bits that NumPy adds them, and their
products, without rounding, in any order. So a total depends on its terms and on nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Doubles: TypeAlias = "NDArray[np.float64]"
Integers: TypeAlias = "NDArray[np.int64]"
Flags: TypeAlias = "NDArray[np.bool_]"

#: Bits of a limb, and of a digit that is to be squared.
WIDTH = 18
#: As many terms are added at a time.
MOST_TERMS = 1 << 16
# As many digits' products, at most 2^38 each, are added in float64 exactly. They stay in a cache.
_TILE = 1 << 13
# What int64 limbs may reach before their carries are brought up.
_ROOM = 1 << 62
_MASK = (1 << WIDTH) - 1
# An int64 in limbs' widths.
_PARTS = -(-64 // WIDTH)
# Every finite float64 is a multiple of 2^-1074, and tops are not followed below 2^-900: the factors
# that bring numbers to the size of a digit stay within float64.
_LEAST, _LEAST_TOP = -1074, -900


class Fixed(NamedTuple):
    """A number for each of C channels: the sum over k of ``limbs[k] 2^(WIDTH (low + k))``.

    Limbs have any sign. `bound`: none is larger. Nothing is ever changed in place.
    """

    limbs: Integers
    low: int
    bound: int

    @classmethod
    def zeros(cls, channels: int) -> Fixed:
        return cls(np.zeros((0, channels), np.int64), 0, 0)

    @classmethod
    def of_integers(cls, values: Iterable[int], low: int) -> Fixed:
        """Python integers, in units of ``2^(WIDTH low)``."""
        whole = np.array([*values, 0], object)[:-1]
        rows = []
        while whole.any():
            negative = whole < 0
            rows.append(np.where(negative, -(-whole & _MASK), whole & _MASK).astype(np.int64))
            whole = np.where(negative, -(-whole >> WIDTH), whole >> WIDTH)
        return cls(np.array(rows, np.int64).reshape(len(rows), whole.size), low, _MASK)

    def integers(self, low: int) -> Any:
        """The numbers as an array of Python integers, in units of ``2^(WIDTH low)``.

        `low` is at most the number's own.
        """
        total = np.zeros(self.limbs.shape[1], object)
        for row in self.limbs[::-1]:
            total = (total << WIDTH) + row.astype(object)
        return total << WIDTH * (self.low - low)

    def plus(self, other: Fixed) -> Fixed:
        if not len(other.limbs):
            return self
        if not len(self.limbs):
            return other
        if self.bound + other.bound >= _ROOM:
            return self.compact().plus(other.compact())
        low = min(self.low, other.low)
        high = max(self.low + len(self.limbs), other.low + len(other.limbs))
        limbs = np.zeros((high - low, self.limbs.shape[1]), np.int64)
        for term in self, other:
            limbs[term.low - low : term.low - low + len(term.limbs)] += term.limbs
        return Fixed(limbs, low, self.bound + other.bound)

    def times(self, factor: int) -> Fixed:
        """This number `factor` times; that is below 2^40."""
        carried = self if self.bound * factor < _ROOM else self.carried()
        return Fixed(carried.limbs * factor, carried.low, carried.bound * factor)

    def carried(self) -> Fixed:
        """The same number with limbs from 0 to 2^WIDTH - 1, but for the sign's."""
        limbs = np.zeros((len(self.limbs) + _PARTS, self.limbs.shape[1]), np.int64)
        limbs[: len(self.limbs)] = self.limbs
        for row, above in itertools.pairwise(limbs):
            above += row >> WIDTH
            row &= _MASK
        return Fixed(limbs, self.low, _MASK)

    def compact(self) -> Fixed:
        """The same number in as few limbs as it takes."""
        limbs, low = self.carried().limbs, self.low
        while len(limbs) > 1 and np.isin(limbs[-1], (-1, 0)).all():
            limbs[-2] += limbs[-1] << WIDTH
            limbs = limbs[:-1]
        used = np.flatnonzero(limbs.any(axis=1))
        first = int(used[0]) if used.size else len(limbs)
        return Fixed(limbs[first:].copy(), low + first, _MASK + 1)

    def without(self, channels: Flags) -> Fixed:
        """0 for these channels."""
        return Fixed(np.where(channels, 0, self.limbs), self.low, self.bound)

    def is_equal(self, other: Fixed) -> bool:
        difference = self.plus(other.times(1)._replace(limbs=-other.limbs)).carried()
        return not difference.limbs.any()


class _Rows:
    """Digits' sums, by their place: what is added to place i counts 2^(top - WIDTH (i + 1))."""

    def __init__(self, top: Integers) -> None:
        self.top = top
        self.rows: dict[int, Integers] = {}

    def add(self, place: int, channels: slice, row: Doubles) -> None:
        """Integers, at most 2^53 each."""
        if place not in self.rows:
            self.rows[place] = np.zeros(self.top.size, np.int64)
        self.rows[place][channels] += row.astype(np.int64)

    def total(self) -> Fixed:
        if not self.rows:
            return Fixed.zeros(self.top.size)
        deepest = max(self.rows) + 1
        whole = np.zeros((deepest, self.top.size), np.int64)
        for place, row in self.rows.items():
            whole[deepest - 1 - place] = row
        # In parts of a limb's width there is room for a shift to where a limb begins.
        limbs = np.zeros((deepest + _PARTS - 1, self.top.size), np.int64)
        for k in range(_PARTS):
            part = whole >> WIDTH * k
            limbs[k : k + deepest] += part & _MASK if k < _PARTS - 1 else part
        start, shift = np.divmod(self.top - WIDTH * deepest, WIDTH)
        limbs <<= shift
        low, count = int(start.min()), len(limbs)
        if low < start.max():
            narrow, channels = limbs, np.arange(self.top.size)
            limbs = np.zeros((count + int(start.max()) - low, self.top.size), np.int64)
            limbs[np.arange(count)[:, None] + (start - low), channels] = narrow
        return Fixed(limbs, low, _PARTS << 2 * WIDTH)


def sums(values: Doubles) -> Fixed:
    """The sums of (M, C) finite numbers over their first axis, M at most MOST_TERMS."""
    top = _top(values)
    rows = _Rows(top)
    for at, channels in _tiles(*values.shape):
        scaled = _scaled(values[at, channels], top[channels], 2 * WIDTH)
        if scaled is None:
            return _sums_of_integers(values)
        for i, digit in _digits(scaled, 2 * WIDTH):
            rows.add(2 * i + 1, channels, digit.sum(axis=0))
    return rows.total()


def sums_and_squares(values: Doubles, more: Doubles | None = None) -> tuple[Fixed, Fixed]:
    """The sums of ``values + more`` and of their squares, as `sums` has them."""
    parts = [values] if more is None else [values, more]
    top = np.maximum.reduce([_top(part) for part in parts])
    rows, squares = _Rows(top), _Rows(2 * top)
    for at, channels in _tiles(*values.shape):
        digits: dict[int, Doubles] = {}
        for part in parts:
            scaled = _scaled(part[at, channels], top[channels], WIDTH)
            if scaled is None:
                return _squares_of_integers(parts)
            for i, digit in _digits(scaled, WIDTH):
                digits[i] = digits[i] + digit if i in digits else digit
        found = sorted(digits.items())
        for k, (i, digit) in enumerate(found):
            rows.add(i, channels, digit.sum(axis=0))
            squares.add(2 * i + 1, channels, _dots(digit, digit))
            for j, later in found[k + 1 :]:
                squares.add(i + j + 1, channels, 2 * _dots(digit, later))
    return rows.total(), squares.total()


def _tiles(count: int, channels: int) -> Iterator[tuple[slice, slice]]:
    """(M, C) in parts that stay in a cache, of as many terms as can be added."""
    tall = min(count, _TILE)
    wide = _TILE // tall
    for channel in range(0, channels, wide):
        for start in range(0, count, tall):
            yield slice(start, start + tall), slice(channel, channel + wide)


def _dots(a: Doubles, b: Doubles) -> Doubles:
    # Of contiguous columns vecdot has a loop of its own; of others einsum.
    return np.vecdot(a.T, b.T) if a.flags.f_contiguous else np.einsum("mc,mc->c", a, b)


def _top(values: Doubles) -> Integers:
    """An exponent for each channel: all its numbers are below 2^top."""
    largest = np.maximum(values.max(axis=0), -values.min(axis=0))
    return np.maximum(np.frexp(largest)[1], _LEAST_TOP).astype(np.int64)


def _scaled(values: Doubles, top: Integers, width: int) -> Doubles | None:
    """The numbers brought below 2^width; None where some are too small to come along."""
    order: Any = "F" if len(values) > values.shape[1] else "C"  # long loops are quick ones
    scaled = np.multiply(values, np.ldexp(1.0, width - top), order=order)
    if top.max() > 0 and not np.array_equal(scaled * np.ldexp(1.0, top - width), values):
        return None
    return scaled


def _digits(rest: Doubles, width: int) -> Iterator[tuple[int, Doubles]]:
    """Numbers below 2^width as the sum over i of ``digit_i 2^(-width i)``, by those i that count.

    Digits are integers, at most 2^width, from the second on half of that. `rest` is used up.
    """
    place = 0
    while rest.any():
        digit = np.rint(rest)
        rest -= digit
        rest *= 2.0**width
        if place or digit.any():
            yield place, digit
        place += 1


# ---- numbers that no one factor suits: 1e300 and 1e-300 in a channel -----------------------------

_UNIT = _LEAST // WIDTH - 1  # the limb whose units all finite float64 are multiples of


def _as_integers(values: Doubles) -> Any:
    """Numbers as integers, in units of 2^(WIDTH _UNIT)."""
    ratios = [value.as_integer_ratio() for value in values.ravel().tolist()]
    whole = [n * ((1 << -WIDTH * _UNIT) // d) for n, d in ratios]
    return np.array([*whole, 0], object)[:-1].reshape(values.shape)


def _sums_of_integers(values: Doubles) -> Fixed:
    return Fixed.of_integers(_as_integers(values).sum(axis=0), _UNIT)


def _squares_of_integers(parts: list[Doubles]) -> tuple[Fixed, Fixed]:
    whole: Any = sum(map(_as_integers, parts))
    squares = (whole * whole).sum(axis=0)
    return Fixed.of_integers(whole.sum(axis=0), _UNIT), Fixed.of_integers(squares, 2 * _UNIT)
