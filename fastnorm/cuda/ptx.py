"""Instructions that Numba has no words for: wide loads and stores, conversions, exact products.

A *chunk* is a few neighbouring elements that a thread moves together, up to 16 bytes at a time.
Loads and stores are inline PTX under a predicate: a chunk past the end of its row costs no branch
(which would keep the compiler from issuing all loads of a row before the first is waited for), no
traffic, and reads as zeros.

Every function here makes one for a type and a size; `words` are what a chunk is while it is as
it came, `values` what is computed with. Numba's simulator gets plain Python in their place.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numba
import numba.cuda
import numpy as np
from numba import types
from numba.core import config

from .plan import SIZES

try:
    _extending = importlib.import_module("numba.cuda.extending")
except ImportError:
    _extending = importlib.import_module("numba.core.extending")
if not hasattr(_extending, "intrinsic"):  # Numba's own CUDA target has its CPU's
    _extending = importlib.import_module("numba.core.extending")

ir: Any = importlib.import_module("llvmlite.ir")
SIMULATED = bool(vars(config)["ENABLE_CUDASIM"])

# Numba's words, which stand for other things where it compiles than where it is checked.
cuda: Any = numba.cuda
int32: Any = numba.int32
int64: Any = numba.int64
uint32: Any = numba.uint32
uint64: Any = numba.uint64
float32: Any = numba.float32
float64: Any = numba.float64


def intrinsic(typing: Callable[..., Any]) -> Any:
    """A function of the device that is written in LLVM's language."""
    return _extending.intrinsic(typing)


#: How arrays travel: half types as their bits.
TRAVELS = {
    "float16": types.uint16, "bfloat16": types.uint16,
    "float32": types.float32, "float64": types.float64,
}  # fmt: skip

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_HALF, _FLOAT, _DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_FLOATS = {"float32": _FLOAT, "float64": _DOUBLE}


def word_type(kind: str) -> Any:
    """What holds elements as they came: 32 bits for one or two, 64 for a double."""
    return types.uint64 if kind == "float64" else types.uint32


def words_of(kind: str, count: int) -> int:
    """How many words hold `count` elements; a half alone takes one too."""
    return max(1, count // 2) if SIZES[kind] == 2 else count


def _data(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    return context.make_array(kind)(context, builder, value).data


def _element(builder: Any, data: Any, index: Any) -> Any:
    return builder.gep(data, [index])


def _address(builder: Any, data: Any, index: Any, size: int) -> Any:
    """An element's address in global memory, as an integer."""
    base = builder.ptrtoint(data, _I64)
    # Numba's arrays hold generic addresses, which are also those of global memory.
    return builder.add(base, builder.mul(index, ir.Constant(_I64, size)))


def _asm(
    builder: Any, result: Any, arguments: Any, text: str, constraints: str, effect: bool
) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(ir.InlineAsm(kind, text, constraints, effect), arguments)


def _access(kind: str, count: int, access: int) -> tuple[int, int, Any, str, str]:
    """Of one access: bytes, words, a word's type in LLVM, its constraint, and the PTX suffix."""
    size = SIZES[kind]
    step = max(size, min(access, count * size))
    if kind == "float64":
        word, letter, bits = _I64, "l", 64
    elif step == 2:
        word, letter, bits = _I16, "h", 16
    else:
        word, letter, bits = _I32, "r", 32
    number = step * 8 // bits
    return step, number, word, letter, (f"v{number}." if number > 1 else "") + f"b{bits}"


@functools.cache
def fetch(kind: str, count: int, access: int, how: str) -> Any:
    """``(words, at, array, index, there)``: a chunk's words to words[at:], zeros if not `there`.

    `how` is "once" for what is read once and would only push parameters out of the L1 cache,
    "kept" for parameters, "own" for arrays that the kernel also writes; and for parameters that
    shall not be loaded ahead of a store that stands before them, where registers are few. "ahead"
    is "once" for what is asked for long before it is used: loads of memory that nothing writes
    (.nc), ptxas moves behind barriers and stores, to where they are first needed.
    """
    step, number, word, letter, suffix = _access(kind, count, access)
    size = SIZES[kind]
    cached = {
        "once": "nc.L1::no_allocate.", "ahead": "L1::no_allocate.", "kept": "nc.", "own": "",
    }[how]  # fmt: skip
    stays = how in ("own", "ahead")
    outputs = ", ".join(f"${i}" for i in range(number))
    operand = f"{{{outputs}}}" if number > 1 else outputs
    text = (
        f"{{ .reg .pred p; setp.ne.b32 p, ${number + 1}, 0; "
        f"@p ld.global.{cached}{suffix} {operand}, [${number}]; }}"
    )
    constraints = ",".join([f"={letter}"] * number + ["l", "r"] + [str(i) for i in range(number)])

    @intrinsic
    def fetch_chunk(typing: Any, words: Any, at: Any, array: Any, index: Any, there: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            into = _data(context, builder, words, arguments[0])
            start = context.cast(builder, arguments[1], at, types.int64)
            column = context.cast(builder, arguments[3], index, types.int64)
            flag = builder.zext(context.cast(builder, arguments[4], there, types.boolean), _I32)
            address = _address(builder, _data(context, builder, array, arguments[2]), column, size)
            result = word if number == 1 else ir.LiteralStructType([word] * number)
            zeros = [ir.Constant(word, 0)] * number
            for part in range(count * size // step):
                place = builder.add(address, ir.Constant(_I64, part * step))
                got = _asm(builder, result, [place, flag, *zeros], text, constraints, stays)
                for i in range(number):
                    one = got if number == 1 else builder.extract_value(got, i)
                    one = builder.zext(one, _I32) if word is _I16 else one
                    # Narrow accesses of halves: two 16-bit words make one.
                    at_word, high = part * number + i, 0
                    if word is _I16 and count > 1:
                        at_word, high = divmod(part, 2)
                    slot = _element(builder, into, builder.add(start, ir.Constant(_I64, at_word)))
                    if high:
                        one = builder.or_(
                            builder.load(slot), builder.shl(one, ir.Constant(_I32, 16))
                        )
                    builder.store(one, slot)
            return context.get_dummy_value()

        return types.none(words, at, array, index, there), build

    def simulated(words: Any, at: int, array: Any, index: int, there: bool) -> None:
        number_of_words = words_of(kind, count)
        if not there:
            words[at : at + number_of_words] = 0
            return
        chunk = np.ascontiguousarray(array[index : index + count])
        if size == 2 and count > 1:
            chunk = chunk.view(np.uint32)
        elif size > 2:
            chunk = chunk.view(f"u{size}")
        words[at : at + number_of_words] = chunk

    return simulated if SIMULATED else fetch_chunk


def _widened(builder: Any, kind: str, bits: Any, compute: str) -> Any:
    """A number of the type that is computed in, of a word of which it is the lower part."""
    if kind == "float64":
        value = builder.bitcast(bits, _DOUBLE)
        return value if compute == "float64" else builder.fptrunc(value, _FLOAT)
    if kind == "float16":
        value = builder.bitcast(builder.trunc(bits, _I16), _HALF)
        return builder.fpext(value, _FLOATS[compute])
    if kind == "bfloat16":
        bits = builder.shl(bits, ir.Constant(_I32, 16))
    value = builder.bitcast(bits, _FLOAT)
    return builder.fpext(value, _DOUBLE) if compute == "float64" else value


@functools.cache
def widen(kind: str, count: int, compute: str) -> Any:
    """``(values, first, words, at)``: values[first:], a chunk's numbers, from words[at:]."""
    pairs = SIZES[kind] == 2 and count > 1

    @intrinsic
    def widen_chunk(typing: Any, values: Any, first: Any, words: Any, at: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            into = _data(context, builder, values, arguments[0])
            begin = context.cast(builder, arguments[1], first, types.int64)
            data = _data(context, builder, words, arguments[2])
            start = context.cast(builder, arguments[3], at, types.int64)
            for i in range(count):
                place = builder.add(start, ir.Constant(_I64, i // 2 if pairs else i))
                bits = builder.load(_element(builder, data, place))
                if pairs and i % 2:
                    if kind == "bfloat16":
                        bits = builder.and_(bits, ir.Constant(_I32, 0xFFFF0000))
                        value = builder.bitcast(bits, _FLOAT)
                        if compute == "float64":
                            value = builder.fpext(value, _DOUBLE)
                    else:
                        bits = builder.lshr(bits, ir.Constant(_I32, 16))
                        value = _widened(builder, kind, bits, compute)
                else:
                    value = _widened(builder, kind, bits, compute)
                place = builder.add(begin, ir.Constant(_I64, i))
                builder.store(value, _element(builder, into, place))
            return context.get_dummy_value()

        return types.none(values, first, words, at), build

    def simulated(values: Any, first: int, words: Any, at: int) -> None:
        chunk = np.ascontiguousarray(words[at : at + words_of(kind, count)])
        values[first : first + count] = _numbers(chunk, kind, count)

    return simulated if SIMULATED else widen_chunk


def _numbers(words: Any, kind: str, count: int) -> Any:
    """Words as NumPy numbers, for the simulator."""
    if SIZES[kind] > 2:
        return words.view(kind)
    halves = words.view(np.uint16)[: 2 * len(words)]
    halves = halves if count > 1 else halves[:1]
    if kind == "float16":
        return halves.view(np.float16)
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _narrowed(builder: Any, kind: str, value: Any) -> Any:
    """The bits of a number rounded once to `kind`, as an integer of its size."""
    wide = value.type == _DOUBLE
    if kind == "float64":
        return builder.bitcast(value if wide else builder.fpext(value, _DOUBLE), _I64)
    if kind == "float32":
        return builder.bitcast(builder.fptrunc(value, _FLOAT) if wide else value, _I32)
    if kind == "float16":
        return builder.bitcast(builder.fptrunc(value, _HALF), _I16)
    if wide:
        value = _odd(builder, value)
    return _asm(builder, _I16, [value], "cvt.rn.bf16.f32 $0, $1;", "=h,f", False)


def _odd(builder: Any, value: Any) -> Any:
    """A double as a float whose last bit says that digits were cut off: safe to round again."""
    cut = _asm(builder, _FLOAT, [value], "cvt.rz.f32.f64 $0, $1;", "=f,d", False)
    inexact = builder.fcmp_ordered("!=", builder.fpext(cut, _DOUBLE), value)
    return builder.bitcast(
        builder.or_(builder.bitcast(cut, _I32), builder.zext(inexact, _I32)), _FLOAT
    )


def _pair(builder: Any, kind: str, low: Any, high: Any) -> Any:
    """Two numbers rounded to a half type, in one word; one instruction for floats."""
    if low.type == _DOUBLE:
        if kind == "float16":
            bits = [builder.zext(_narrowed(builder, kind, one), _I32) for one in (low, high)]
            return builder.or_(bits[0], builder.shl(bits[1], ir.Constant(_I32, 16)))
        low, high = _odd(builder, low), _odd(builder, high)
    name = {"float16": "f16x2", "bfloat16": "bf16x2"}[kind]
    return _asm(builder, _I32, [high, low], f"cvt.rn.{name}.f32 $0, $1, $2;", "=r,f,f", False)


@functools.cache
def narrow(kind: str, count: int) -> Any:
    """``(words, at, values)``: a chunk's numbers, rounded once, as words[at:]."""
    pairs = SIZES[kind] == 2 and count > 1

    @intrinsic
    def narrow_chunk(typing: Any, words: Any, at: Any, values: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            into = _data(context, builder, words, arguments[0])
            start = context.cast(builder, arguments[1], at, types.int64)
            data = _data(context, builder, values, arguments[2])

            def value(i: int) -> Any:
                return builder.load(_element(builder, data, ir.Constant(_I64, i)))

            for i in range(words_of(kind, count)):
                if pairs:
                    word = _pair(builder, kind, value(2 * i), value(2 * i + 1))
                else:
                    word = _narrowed(builder, kind, value(i))
                    word = builder.zext(word, _I32) if word.type == _I16 else word
                place = builder.add(start, ir.Constant(_I64, i))
                builder.store(word, _element(builder, into, place))
            return context.get_dummy_value()

        return types.none(words, at, values), build

    def simulated(words: Any, at: int, values: Any) -> None:
        bits = _bits(np.array(values[:count]), kind)
        if pairs:
            bits = bits.view(np.uint32)
        words[at : at + words_of(kind, count)] = bits

    return simulated if SIMULATED else narrow_chunk


def _bits(numbers: Any, kind: str) -> Any:
    """Numbers rounded to `kind` as integers, for the simulator."""
    if kind != "bfloat16":
        return numbers.astype(kind).view(f"u{SIZES[kind]}")
    bits = numbers.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


@functools.cache
def store(kind: str, count: int, access: int) -> Any:
    """``(array, index, words, at, there)``: words[at:] written as a chunk, if `there`."""
    step, number, word, letter, suffix = _access(kind, count, access)
    size = SIZES[kind]
    inputs = ", ".join(f"${i}" for i in range(number))
    operand = f"{{{inputs}}}" if number > 1 else inputs
    text = (
        f"{{ .reg .pred p; setp.ne.b32 p, ${number + 1}, 0; "
        f"@p st.global.{suffix} [${number}], {operand}; }}"
    )
    constraints = ",".join([letter] * number + ["l", "r"])

    @intrinsic
    def store_chunk(typing: Any, array: Any, index: Any, words: Any, at: Any, there: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            column = context.cast(builder, arguments[1], index, types.int64)
            start = context.cast(builder, arguments[3], at, types.int64)
            data = _data(context, builder, words, arguments[2])
            flag = builder.zext(context.cast(builder, arguments[4], there, types.boolean), _I32)
            address = _address(builder, _data(context, builder, array, arguments[0]), column, size)
            for part in range(count * size // step):
                values = []
                for i in range(number):
                    at_word, high = part * number + i, 0
                    if word is _I16 and count > 1:
                        at_word, high = divmod(part, 2)
                    slot = builder.add(start, ir.Constant(_I64, at_word))
                    one = builder.load(_element(builder, data, slot))
                    if high:
                        one = builder.lshr(one, ir.Constant(_I32, 16))
                    values.append(builder.trunc(one, _I16) if word is _I16 else one)
                place = builder.add(address, ir.Constant(_I64, part * step))
                _asm(builder, ir.VoidType(), [*values, place, flag], text, constraints, True)
            return context.get_dummy_value()

        return types.none(array, index, words, at, there), build

    def simulated(array: Any, index: int, words: Any, at: int, there: bool) -> None:
        if there:
            chunk = np.ascontiguousarray(words[at : at + words_of(kind, count)])
            bits = chunk.view(np.uint16) if size == 2 else chunk
            array[index : index + count] = bits[:count].view(array.dtype)

    return simulated if SIMULATED else store_chunk


@functools.cache
def rounded(kind: str, compute: str) -> Any:
    """``(value)``: a number rounded to `kind` and widened again."""

    @intrinsic
    def rounded_to(typing: Any, value: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            bits = _narrowed(builder, kind, arguments[0])
            bits = builder.zext(bits, _I32) if bits.type == _I16 else bits
            return _widened(builder, kind, bits, compute)

        return value(value), build

    def simulated(value: Any) -> Any:
        bits = _bits(np.array([value]), kind)
        words = bits.astype(np.uint32) if SIZES[kind] == 2 else bits
        return np.dtype(compute).type(_numbers(words, kind, 1)[0])

    return simulated if SIMULATED else rounded_to


@functools.cache
def bits_of(compute: str) -> Any:
    """``(value)``: its bits without the sign, as a signed integer: in the order of |value|,
    infinity above all numbers and NaN above that."""

    @intrinsic
    def magnitude(typing: Any, value: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            word = _I64 if compute == "float64" else _I32
            bits = builder.bitcast(arguments[0], word)
            return builder.and_(bits, ir.Constant(word, (1 << word.width - 1) - 1))

        return (types.int64 if compute == "float64" else types.int32)(value), build

    integer = np.dtype(f"i{SIZES[compute]}")

    def simulated(value: Any) -> Any:
        return abs(np.dtype(compute).type(value)).view(integer)

    return simulated if SIMULATED else magnitude


@functools.cache
def power_of_two(compute: str) -> Any:
    """``(exponent)``: 2 to a power within the normal numbers."""
    shift, bias = (52, 1023) if compute == "float64" else (23, 127)

    @intrinsic
    def power(typing: Any, exponent: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            word = _I64 if compute == "float64" else _I32
            kind = types.int64 if compute == "float64" else types.int32
            field = builder.add(
                context.cast(builder, arguments[0], exponent, kind), ir.Constant(word, bias)
            )
            bits = builder.shl(field, ir.Constant(word, shift))
            return builder.bitcast(bits, _FLOATS[compute])

        return getattr(types, compute)(exponent), build

    def simulated(exponent: int) -> Any:
        return np.ldexp(np.dtype(compute).type(1), int(exponent))

    return simulated if SIMULATED else power


@functools.cache
def product(compute: str) -> Any:
    """``(a, b)``: rounded by itself, where a compiler would fuse it with the sum that follows."""
    letter, suffix = ("d", "f64") if compute == "float64" else ("f", "f32")

    @intrinsic
    def rounded_product(typing: Any, a: Any, b: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind, text = _FLOATS[compute], f"mul.rn.{suffix} $0, $1, $2;"
            return _asm(builder, kind, arguments, text, f"={letter},{letter},{letter}", False)

        return a(a, b), build

    def simulated(a: Any, b: Any) -> Any:
        return a * b

    return simulated if SIMULATED else rounded_product


@functools.cache
def approximate(name: str) -> Any:
    """``(value)``: 1/x ("rcp") or 1/sqrt(x) ("rsqrt") of a float32 to an ulp or two; without the
    branches and calls of the exact ones, which take registers even where they are not taken."""

    @intrinsic
    def function(typing: Any, value: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return _asm(builder, _FLOAT, arguments, f"{name}.approx.f32 $0, $1;", "=f,f", False)

        return value(value), build

    def simulated(value: Any) -> Any:
        return np.float32(1) / (np.sqrt(value) if name == "rsqrt" else value)

    return simulated if SIMULATED else function


@intrinsic
def _exp2(typing: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _asm(builder, _FLOAT, arguments, "ex2.approx.f32 $0, $1;", "=f,f", False)

    return value(value), build


def _exp2_simulated(value: Any) -> Any:
    return np.exp2(value)


#: ``(value)``: 2**value to 2 ulps, of a float32.
exp2: Any = _exp2_simulated if SIMULATED else _exp2
