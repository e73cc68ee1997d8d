"""What kernels share: sums over the threads of a row, and its statistics' limits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba.cuda

from . import ptx
from .plan import WARP
from .ptx import cuda, float32, float64, int32, int64, uint32, uint64

FULL = 0xFFFFFFFF
REAL = {"float32": float32, "float64": float64}
INTEGER = {"float32": int32, "float64": int64}

_jit: Any = numba.cuda.jit


def inlined(function: Callable[..., Any]) -> Any:
    """A function of the device, which becomes part of those that call it."""
    # Not this module's `cuda`, which the simulator replaces while a kernel runs.
    return _jit(device=True, inline="always")(function)


# What Numba has for these is signed: divided, or as an index, it would take a register more and a
# case of its own for what is less than zero, which they never are.


@inlined
def this_thread() -> int:
    """Its number in the block."""
    return int64(uint32(cuda.threadIdx.x))


@inlined
def this_block() -> int:
    """Its number in the grid."""
    return int64(uint32(cuda.blockIdx.x))


@inlined
def all_blocks() -> int:
    """How many there are in the grid."""
    return int64(uint32(cuda.gridDim.x))


@inlined
def parameter_row(row: int, div: int, mod: int) -> int:
    """Which of a parameter's rows a row has."""
    return int64(uint64(row) // uint64(div) % uint64(mod))


class Range(NamedTuple):
    """Limits of the type that is computed in."""

    #: Variances below may have lost digits to underflow of squares.
    least: float
    most: float
    #: The bits of infinity; where the exponent begins; the stored one of numbers in [0.5, 1).
    infinity: int
    mantissa: int
    half: int


RANGE = {
    "float32": Range(2.0**-80, 3.4028234663852886e38, 0x7F800000, 23, 126),
    "float64": Range(2.0**-600, 1.7976931348623157e308, 0x7FF << 52, 52, 1022),
}


@functools.cache
def room_size(threads: int, rows: int) -> int:
    """Numbers of shared memory for the sums below: three a warp, and twice, see `phase`."""
    return 6 * max(1, threads * rows // WARP) if threads > WARP else 1


def _shuffles(threads: int) -> int:
    return threads.bit_length() - 1


@functools.cache
def summing(threads: int, rows: int, count: int) -> Any:
    """``(a, b, c, room, phase)``: `count` of these summed over a row's threads, as a triple.

    All threads get the same bits: a butterfly adds the same pairs in each lane. Beyond a warp there
    is one barrier: `phase` alternates between 0 and 1 from sum to sum, so that one half of the room
    is written while others may still read from the other.
    """
    lanes, warps = min(threads, WARP), max(1, threads // WARP)
    steps, wide_steps = _shuffles(lanes), _shuffles(warps)
    all_warps = warps * rows

    @inlined
    def within(value: Any, first: int, number: int) -> Any:
        for k in range(number):
            value += cuda.shfl_xor_sync(FULL, value, first >> k)
        return value

    @inlined
    def in_warps(a: Any, b: Any, c: Any, room: Any, phase: int) -> Any:
        a = within(a, lanes >> 1, steps)
        if count > 1:
            b = within(b, lanes >> 1, steps)
        if count > 2:
            c = within(c, lanes >> 1, steps)
        return a, b, c

    @inlined
    def in_blocks(a: Any, b: Any, c: Any, room: Any, phase: int) -> Any:
        a, b, c = in_warps(a, b, c, room, phase)
        warp, lane = this_thread() // WARP, this_thread() % WARP
        half = phase * 3 * all_warps
        if lane == 0:
            room[half + warp] = a
            if count > 1:
                room[half + all_warps + warp] = b
            if count > 2:
                room[half + 2 * all_warps + warp] = c
        cuda.syncthreads()
        other = half + warp // warps * warps + lane % warps
        a = within(room[other], warps >> 1, wide_steps)
        if count > 1:
            b = within(room[other + all_warps], warps >> 1, wide_steps)
        if count > 2:
            c = within(room[other + 2 * all_warps], warps >> 1, wide_steps)
        return a, b, c

    return in_blocks if threads > WARP else in_warps


@functools.cache
def largest(threads: int, rows: int) -> Any:
    """``(value, room)``: the largest of a row's threads; beyond a warp with two barriers."""
    lanes, warps = min(threads, WARP), max(1, threads // WARP)
    steps, wide_steps = _shuffles(lanes), _shuffles(warps)

    @inlined
    def within(value: Any, first: int, number: int) -> Any:
        for k in range(number):
            other = cuda.shfl_xor_sync(FULL, value, first >> k)
            value = other if other > value else value
        return value

    @inlined
    def in_warps(value: Any, room: Any) -> Any:
        return within(value, lanes >> 1, steps)

    @inlined
    def in_blocks(value: Any, room: Any) -> Any:
        value = within(value, lanes >> 1, steps)
        warp, lane = this_thread() // WARP, this_thread() % WARP
        if lane == 0:
            room[warp] = value
        cuda.syncthreads()
        value = within(room[warp // warps * warps + lane % warps], warps >> 1, wide_steps)
        cuda.syncthreads()
        return value

    return in_blocks if threads > WARP else in_warps


@functools.cache
def anyone(threads: int, rows: int) -> Any:
    """``(flag)``: whether it is set for a row of this warp, or block, whose rows branch alike."""
    if threads > WARP and rows > 1:

        @inlined
        def among(flag: bool) -> bool:
            return cuda.syncthreads_or(int32(flag)) != 0

    elif threads > WARP:

        @inlined
        def among(flag: bool) -> bool:
            return flag  # all threads have the same sums

    else:

        @inlined
        def among(flag: bool) -> bool:
            return cuda.any_sync(FULL, flag)

    return among


@functools.cache
def scaling(compute: str) -> Any:
    """``(value, exponent)``: value * 2**exponent, in two steps: the power may be out of range."""
    power = ptx.power_of_two(compute)

    @inlined
    def scaled(value: Any, exponent: int) -> Any:
        half = exponent >> 1
        return value * power(half) * power(exponent - half)

    return scaled


@functools.cache
def reciprocal(compute: str) -> Any:
    """``(number)``: 1/number of a number of columns."""
    real, about = REAL[compute], ptx.approximate("rcp")

    @inlined
    def exact(number: int) -> Any:
        return real(1) / real(number)

    @inlined
    def refined(number: int) -> Any:
        value = real(number)
        first = about(value)
        return cuda.fma(first, cuda.fma(-value, first, real(1)), first)

    return exact if compute == "float64" else refined


@functools.cache
def inverse_root(compute: str) -> Any:
    """``(number)``: 1/sqrt(number), infinity of 0."""
    real, about = REAL[compute], ptx.approximate("rsqrt")
    # Below, one step of Newton's would overflow; what is left is right to 2 ulps.
    least, half = 2.0**-120, 0.5

    @inlined
    def exact(number: Any) -> Any:
        return real(1) / real(math.sqrt(number))

    @inlined
    def refined(number: Any) -> Any:
        first = about(number)
        rest = cuda.fma(-number * first, first, real(1))
        better = cuda.fma(first * real(half), rest, first)
        return better if least <= number and number < most else first

    most = RANGE[compute].most
    return exact if compute == "float64" else refined


def log2(power: int) -> int:
    return power.bit_length() - 1
