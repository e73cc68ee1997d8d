"""Binary floating-point formats in Python's integers and fractions, to judge roundings by."""

from fractions import Fraction
from typing import NamedTuple

import numpy as np


class Float(NamedTuple):
    """A format by the bits of its exponent and of its fraction."""

    name: str
    exponent: int
    fraction: int

    @property
    def bits(self):
        return 1 + self.exponent + self.fraction

    @property
    def infinity(self):
        return (1 << self.exponent) - 1 << self.fraction

    @property
    def words(self):
        return np.dtype(f"u{self.bits // 8}")

    def size(self, magnitude):
        """The value of a pattern without its sign; infinity as the number that would follow."""
        biased, low = divmod(magnitude, 1 << self.fraction)
        bias = (1 << self.exponent - 1) - 1
        if not biased:
            return Fraction(low) * Fraction(2) ** (1 - bias - self.fraction)
        return Fraction((1 << self.fraction) + low) * Fraction(2) ** (biased - bias - self.fraction)

    def parts(self, word):
        """Whether negative, and the pattern without the sign."""
        return bool(word >> self.bits - 1), word & (1 << self.bits - 1) - 1

    def value(self, word):
        """A finite pattern as a fraction."""
        negative, magnitude = self.parts(int(word))
        return -self.size(magnitude) if negative else self.size(magnitude)

    def is_rounded(self, word, exact, mode="rn"):
        """Whether a pattern is the rounding of a fraction, not 0."""
        negative, found = self.parts(int(word))
        if found > self.infinity or negative != (exact < 0):
            return False
        size = abs(exact)
        if mode == "rn":
            return self._is_nearest(found, size)
        if mode == "rz" or mode == ("rm" if exact > 0 else "rp"):
            return found < self.infinity and (
                self.size(found) <= size
                and (size < self.size(found + 1) or found + 1 == self.infinity)
            )
        if not found:
            return False
        return self.size(found - 1) < size and (size <= self.size(found) or found == self.infinity)

    def _is_nearest(self, found, size):
        value = self.size(found)
        if value == size or (found == self.infinity and size > value):
            return True
        other = found + 1 if size > value else found - 1
        if other > self.infinity or other < 0:
            return False
        here, there = abs(value - size), abs(self.size(other) - size)
        return here < there or (here == there and found % 2 == 0)


F16, BF16 = Float("f16", 5, 10), Float("bf16", 8, 7)
F32, F64 = Float("f32", 8, 23), Float("f64", 11, 52)


def finite_words(known, rng, count):
    """Finite patterns: of any exponent, of near ones, with few bits, and the ends."""
    any_word = rng.integers(0, 1 << known.bits, count, np.uint64)
    one = ((1 << known.exponent - 1) - 1) << known.fraction
    near = one + rng.integers(-4 << known.fraction, 4 << known.fraction, count)
    bare = near >> known.fraction << known.fraction
    few = near >> known.fraction - 3 << known.fraction - 3
    subnormal = rng.integers(0, 4 << known.fraction, count)
    ends = np.array([0, 1, known.infinity - 1, 1 << known.fraction, (1 << known.fraction) - 1, one])
    groups = [near, bare, few, subnormal, rng.choice(ends, count)]
    words = np.concatenate([any_word, *(group.astype(np.uint64) for group in groups)])
    words ^= rng.integers(0, 2, words.size, np.uint64) << np.uint64(known.bits - 1)
    finite = words & np.uint64((1 << known.bits - 1) - 1) < known.infinity
    words = rng.permutation(words[finite])[:count]
    return words.astype(known.words)
