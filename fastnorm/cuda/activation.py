"""relu, silu, gelu and gelu by tanh of one number, in the type that is computed in.

At minus infinity relu is 0 and the others are -0, their limit; NaN stays NaN. Errors are a few
units in the last place of 1 or of the result, whichever is larger.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from . import ptx
from .rows import REAL, inlined


@functools.cache
def activation(kind: str, compute: str) -> Any:
    """``(value)``: the activation of this name; "" is none."""
    real = REAL[compute]
    return {"": _none, "relu": _relu, "silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh}[kind](
        compute, real
    )


def _none(compute: str, real: Any) -> Any:
    @inlined
    def same(value: Any) -> Any:
        return value

    return same


def _relu(compute: str, real: Any) -> Any:
    zero = 0.0

    @inlined
    def relu(value: Any) -> Any:
        return real(zero) if value <= 0 else value

    return relu


def _logistic(compute: str, real: Any) -> Any:
    """``(value, rate)``: value / (1 + e**-rate)."""
    log2_e = math.log2(math.e)

    @inlined
    def in_float32(value: Any, rate: Any) -> Any:
        return value / (real(1) + ptx.exp2(-rate * real(log2_e)))

    @inlined
    def in_float64(value: Any, rate: Any) -> Any:
        return value / (real(1) + math.exp(-rate))

    return in_float64 if compute == "float64" else in_float32


def _silu(compute: str, real: Any) -> Any:
    logistic = _logistic(compute, real)
    lowest = -110.0 if compute == "float32" else -760.0

    @inlined
    def silu(value: Any) -> Any:
        value = real(lowest) if value < lowest else value
        return logistic(value, value)

    return silu


def _gelu_tanh(compute: str, real: Any) -> Any:
    logistic = _logistic(compute, real)
    rate = 2 * math.sqrt(2 / math.pi)
    lowest = -16.0 if compute == "float32" else -32.0

    @inlined
    def gelu_tanh(value: Any) -> Any:
        value = real(lowest) if value < lowest else value
        cubed = value * value * real(0.044715) + real(1)
        return logistic(value, value * cubed * real(rate))

    return gelu_tanh


def _gelu(compute: str, real: Any) -> Any:
    half_root = math.sqrt(0.5)
    lowest = -16.0 if compute == "float32" else -40.0

    @inlined
    def gelu(value: Any) -> Any:
        # The factor is formed by erfc, so that nothing cancels on the negative side.
        value = real(lowest) if value < lowest else value
        return value * (real(0.5) * math.erfc(-value * real(half_root)))

    return gelu
