"""`cvt`: from any type to any other, with its rounding and saturation."""

import numpy as np

from .alu import apply, builds
from .arithmetic import (
    add,
    bfloat16_bits,
    bfloat16_values,
    flush,
    narrow,
    odd_sum,
    saturate,
)
from .faults import Unsupported
from .formats import FORMATS, formats_in
from .frame import reader, writer

TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@builds("cvt")
def build_convert(instruction):
    target, source = formats_in(instruction.modifiers)[:2]
    if target.kind == "x":
        return build_pack(instruction, target, source)
    mode = next((w for w in instruction.modifiers if w in ("rn", "rz", "rm", "rp")), "")
    whole = next((TO_INTEGER[w] for w in instruction.modifiers if w in TO_INTEGER), None)
    flags = {name: name in instruction.modifiers for name in ("ftz", "sat", "relu")}
    if source.is_integer:
        return apply(instruction, [source], _from_integer(source, target, mode, flags["sat"]))
    return apply(instruction, [source], _from_float(source, target, mode, whole, flags))


def _from_integer(source, target, mode, saturating):
    if target.kind == "f":
        return lambda a: _integer_to_float(a, target.dtype, mode or "rn")
    if target.kind == "B":
        return lambda a: bfloat16_bits(_odd_integer(a), mode or "rn")
    if not saturating:
        return lambda a: a.astype(target.dtype)
    limits = np.iinfo(target.dtype)
    low, high = (
        max(limits.min, np.iinfo(source.dtype).min),
        min(limits.max, np.iinfo(source.dtype).max),
    )
    return lambda a: np.clip(a, source.dtype.type(low), source.dtype.type(high)).astype(
        target.dtype
    )


def _odd_integer(a):
    """An integer as float64, rounded to odd where float64 cannot hold it."""
    if a.dtype.itemsize < 8:
        return a.astype(np.float64)
    return odd_sum(*_parts(a))


def _parts(a):
    """An integer of 64 bits as the sum of two float64."""
    low = a & a.dtype.type(0xFFF)
    return (a - low).astype(np.float64), low.astype(np.float64)


def _integer_to_float(a, dtype, mode):
    if mode == "rn" and dtype != np.float16:
        return a.astype(dtype)
    if dtype == np.float64:
        return add(*_parts(a), mode)
    return narrow(_odd_integer(a), dtype, mode)


def _from_float(source, target, mode, whole, flags):
    """Widen, flush, round to a whole number, saturate, narrow: what the modifiers ask for."""

    def convert(a):
        a = bfloat16_values(a) if source.kind == "B" else a
        if flags["ftz"] and a.dtype == np.float32:
            a = flush(a)
        if target.is_integer:
            return _to_integer((whole or np.trunc)(a), target, source)
        if whole:
            a = whole(a)
        return _finish(_to_float(a, target, mode), target, flags)

    return convert


def _to_float(a, target, mode):
    if target.kind == "B":
        return bfloat16_bits(a, mode or "rn")
    if target.dtype.itemsize >= a.dtype.itemsize:
        return a.astype(target.dtype)
    return narrow(a, target.dtype, mode or "rn")


def _finish(a, target, flags):
    if flags["ftz"] and target.name == "f32":
        a = flush(a)
    if flags["sat"]:
        a = saturate(a)
    if flags["relu"]:
        negative = np.signbit(bfloat16_values(a) if target.kind == "B" else a)
        a = np.where(negative, a.dtype.type(0), a)[()]
    return a


def _to_integer(a, target, source):
    """Clamped to the target's range. NaN is 0, or the sign bit alone in 64 bits or from float64."""
    limits = np.iinfo(target.dtype)
    low, high = float(limits.min), float(limits.max)
    inside = (a >= low) & (a < high if target.size == 8 else a <= high)
    result = np.where(inside, a, 0).astype(target.dtype)
    result = np.where(a < low, target.dtype.type(limits.min), result)
    result = np.where(~inside & (a > 0), target.dtype.type(limits.max), result)
    wide = target.size == 8 or source.size == 8
    nan = target.storage.type(1 << 8 * target.size - 1 if wide else 0).view(target.dtype)
    return np.where(np.isnan(a), nan, result)[()]


def build_pack(instruction, target, source):
    """Two floats into one register, the first operand above."""
    if len(instruction.operands) != 3:
        raise Unsupported("a conversion of packed values")
    mode = next((w for w in instruction.modifiers if w in ("rn", "rz")), "rn")
    flags = {name: name in instruction.modifiers for name in ("ftz", "sat", "relu")}
    half = FORMATS[target.name.removesuffix("x2")]
    convert = _from_float(source, half, mode, None, flags)
    write = writer(instruction, instruction.operands[0])
    high, low = (reader(instruction, word, source) for word in instruction.operands[1:])

    def execute(frame, lanes):
        parts = [
            convert(read(frame, lanes)).view(np.uint16).astype(np.uint32) for read in (high, low)
        ]
        write(frame, lanes, (parts[0] << np.uint32(16)) | parts[1])

    return execute
