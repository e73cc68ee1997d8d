"""Floating-point arithmetic with the roundings of PTX, in NumPy.

Where float64 cannot hold a result, it is rounded to odd: towards zero, the last bit then set if
anything was lost. A later rounding to a type at least two bits narrower is that of the exact result
(Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
"""

from fractions import Fraction

import numpy as np

SPLITTER = np.float64(2.0**27 + 1)


def two_sum(a, b):
    """a + b rounded, and what the rounding lost."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _halves(a):
    high = SPLITTER * a
    high = high - (high - a)
    return high, a - high


def two_product(a, b):
    """a * b rounded, and what the rounding lost, in float64 (Dekker)."""
    product = a * b
    a_high, a_low = _halves(a)
    b_high, b_low = _halves(b)
    lost = a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)
    return product, lost


def to_odd(value, lost):
    """The sum of a rounded value and what its rounding lost, rounded to odd."""
    value, lost = np.broadcast_arrays(value, lost)
    nothing = (value == 0) & (lost != 0)
    value = np.where(nothing, np.copysign(value, lost).astype(value.dtype), value)
    bits = value.view(f"i{value.itemsize}")
    even = (bits & 1 == 0) & (lost != 0) & ~np.isnan(lost)
    step = np.where((lost > 0) == ~np.signbit(value), 1, -1)
    return np.where(even, bits + step, bits).astype(bits.dtype).view(value.dtype)[()]


def odd_sum(a, b):
    """a + b in float64, rounded to odd; infinities and NaN as they are."""
    total, lost = two_sum(a, b)
    return np.where(np.isfinite(total), to_odd(total, lost), total)[()]


def directed(value, lost, mode):
    """A value that was rounded to nearest, rounded in another direction instead."""
    down = lost < 0
    up = lost > 0
    if mode == "rz":
        down, up = down & (value > 0), up & (value < 0)
    elif mode == "rm":
        up = np.False_
    else:
        down = np.False_
    value = np.where(down, np.nextafter(value, value.dtype.type(-np.inf)), value)
    return np.where(up, np.nextafter(value, value.dtype.type(np.inf)), value)[()]


def narrow(value, dtype, mode="rn"):
    """Round float64 or float32 to a narrower NumPy float."""
    rounded = value.astype(dtype)
    if mode in ("rn", ""):
        return rounded
    lost = np.where(np.isfinite(value), value - rounded.astype(value.dtype), 0)
    return directed(rounded, lost, mode)


def add(a, b, mode="rn"):
    """a + b in the type of both."""
    if mode == "rn":
        return a + b
    if a.dtype == np.float32:
        return narrow(odd_sum(a.astype(np.float64), b.astype(np.float64)), np.float32, mode)
    total, lost = two_sum(a, b)
    exact = np.isfinite(a) & np.isfinite(b)
    largest = np.copysign(np.finfo(a.dtype).max, total)
    finite = np.where(np.isinf(total) & exact, largest, total)
    lost = np.where(np.isinf(total) & exact, np.copysign(1.0, total), lost)
    zero = (finite == 0) & (a != 0) & (mode == "rm")
    return np.where(exact, np.where(zero, -0.0, directed(finite, lost, mode)), total)[()]


def multiply(a, b, mode="rn"):
    """a * b in the type of both."""
    if mode == "rn":
        return a * b
    if a.dtype == np.float32:
        return narrow(a.astype(np.float64) * b.astype(np.float64), np.float32, mode)
    return fma(a, b, np.copysign(np.zeros_like(a), a * b), mode)


def fma(a, b, c, mode="rn"):
    """a * b + c, rounded once."""
    if a.dtype == np.float64:
        return _fma64(a, b, c, mode)
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    if a.dtype == np.float32 and mode == "rn":
        return _fma32(product, c)
    return narrow(odd_sum(product, c), a.dtype, mode)


def _fma32(product, c):
    """An exact product plus c, in float32. Only sums between two floats need care."""
    total = product + c
    result = total.astype(np.float32)
    between = total.view(np.int64) & 0x1FFF_FFFF == 0x1000_0000
    doubtful = between | (np.abs(total) < 2.0**-125)
    if doubtful.any():
        odd = odd_sum(product, c).astype(np.float32)
        result = np.where(doubtful, odd, result)[()]
    return result


def _fma64(a, b, c, mode):
    """Fused in float64: what the product lost is kept, and the last sum is rounded once."""
    shape = np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c))
    a, b, c = np.broadcast_arrays(*map(np.atleast_1d, (a, b, c)))
    product, lost = two_product(a, b)
    size = np.abs(product)
    safe = (size > 2.0**-900) & (size < 2.0**1000) & (np.abs(c) < 2.0**1000)
    safe &= (np.abs(a) < 2.0**990) & (np.abs(b) < 2.0**990)
    plain = ~safe & ((a == 0) | (b == 0) | ~np.isfinite(a) | ~np.isfinite(b) | ~np.isfinite(c))
    if mode == "rn":
        low, rest = two_sum(c, lost)
        high, middle = two_sum(product, low)
        result = high + to_odd(*two_sum(middle, rest))
    else:
        result, safe = np.zeros_like(product), np.zeros_like(safe)
        plain &= ~np.isfinite(a * b + c)
    sums = np.where(np.isfinite(a) & np.isfinite(b) & ~np.isfinite(c), c, a * b + c)
    result = np.where(plain, sums, result)
    for place in map(tuple, np.argwhere(~(safe | plain))):  # none or one of a scalar
        result[place] = exact_fma(a[place], b[place], c[place], mode)
    return result.reshape(shape)[()]


def exact_fma(a, b, c, mode="rn"):
    """a * b + c of Python fractions, rounded once to float64."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if not exact:
        return _zero(a, b, c, mode)
    return round_fraction(exact, mode)


def _zero(a, b, c, mode):
    """The sign of a sum that is exactly zero."""
    product = np.copysign(1.0, a) * np.copysign(1.0, b)
    if (a == 0 or b == 0) and np.copysign(1.0, c) == product and c == 0:
        return np.float64(np.copysign(0.0, product))
    return np.float64(-0.0 if mode == "rm" else 0.0)


def round_fraction(exact, mode="rn"):
    """A fraction, not 0, as float64."""
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    unit = Fraction(2) ** max(exponent - 52, -1074)
    whole, rest = divmod(size, unit)
    up = {"rn": (2 * rest, whole % 2) > (unit, 0), "rz": False}
    up |= {"rp": bool(rest) and exact > 0, "rm": bool(rest) and exact < 0}
    rounded = (int(whole) + up[mode]) * unit
    try:
        value = float(rounded)
    except OverflowError:
        away = mode == "rn" or mode == ("rp" if exact > 0 else "rm")
        value = np.inf if away else np.finfo(np.float64).max
    return np.float64(value if exact > 0 else -value)


def divide(a, b, mode="rn"):
    """a / b in the type of both."""
    quotient = a / b
    if mode == "rn":
        return quotient
    remainder = -fma(quotient, b, -a)  # exact, barring underflow
    lost = np.where(np.isfinite(quotient), remainder * np.sign(b), 0)
    return directed(quotient, lost, mode)


def square_root(a, mode="rn"):
    """The root of a in its type."""
    root = np.sqrt(a)
    if mode == "rn":
        return root
    return directed(root, np.where(np.isfinite(root), -fma(root, root, -a), 0), mode)


def minimum(a, b, propagate=False):
    """The smaller, a number rather than NaN unless they propagate; -0 is less than +0."""
    least = np.minimum(a, b) if propagate else np.fmin(a, b)
    both_zero = (a == 0) & (b == 0)
    return np.where(both_zero & (np.signbit(a) | np.signbit(b)), least.dtype.type(-0.0), least)[()]


def maximum(a, b, propagate=False):
    """The larger, as `minimum`."""
    return -minimum(-a, -b, propagate)


def flush(value):
    """Numbers below the least normal one as zeros of their sign."""
    small = np.abs(value) < np.finfo(value.dtype).tiny
    return np.where(small, np.copysign(value.dtype.type(0), value), value)[()]


def saturate(value):
    """Into [0, 1]; NaN becomes 0."""
    one = value.dtype.type(1)
    return np.where(value > 0, np.minimum(value, one), value.dtype.type(0))[()]


def bfloat16_bits(value, mode="rn"):
    """float32 or float64 as the bits of bfloat16, rounded once."""
    if value.dtype == np.float64:
        single = value.astype(np.float32)
        lost = np.where(np.isfinite(value), value - single.astype(np.float64), 0)
        value = to_odd(single, lost)
    bits = value.view(np.uint32).astype(np.uint64)
    if mode == "rn":
        bits = bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))
    high = (bits >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), high)[()]


def bfloat16_values(bits):
    """The bits of bfloat16 as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
