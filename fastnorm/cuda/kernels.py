"""A spec's kernel as a function for Numba, and the types of its arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from numba import types

from . import backward, channel_kernels, forward, plan, ptx
from .ptx import float32, float64, int64
from .rows import inlined

FACTORIES: dict[str, Callable[[plan.Spec], Any]] = {
    "forward": forward.forward,
    "forward_wide": forward.forward_wide,
    "backward": backward.backward,
    "backward_wide": backward.backward_wide,
    "backward_columns": backward.columns,
    "reduce": backward.reduce,
    "fill": backward.fill,
    **{name: getattr(channel_kernels, name) for name in plan.CHANNEL_NUMBERS},
}


def kernel(spec: plan.Spec, name: str = "kernel") -> Any:
    """The function: it takes what plan.arguments names, and no more."""
    body = FACTORIES[spec.kernel](spec)
    given = plan.arguments(spec)
    # What the call has not got is passed as something of a type that the code would take; the code
    # that would use it is not compiled.
    arrays = {operand for operand, _ in spec.types}
    stand_ins = dict.fromkeys(plan.REALS, "0")
    passed = []
    for parameter in inspect.signature(body).parameters:
        if parameter in given:
            passed.append(parameter)
        elif parameter in _ARRAYS and parameter not in arrays:
            passed.append(spec.types[0][0])
        else:
            passed.append(stand_ins.get(parameter, "1"))
    text = f"def {name}({', '.join(given)}):\n    body({', '.join(passed)})\n"
    scope = {"body": inlined(body)}
    exec(text, scope)
    return scope[name]


_ARRAYS = (
    *plan.ROW_OPERANDS, *plan.PARAMETERS, *plan.STATISTICS, "partials1", "result1", "moments",
    "running_mean", "running_var", "coefficients", "sums",
)  # fmt: skip


@functools.cache
def signature(spec: plan.Spec) -> tuple[Any, ...]:
    """The types of its arguments."""
    kinds = dict(spec.types)
    numbers = {"q": int64, "f": float32, "d": float64}
    return tuple(
        types.Array(ptx.TRAVELS[kinds[name]], 1, "C") if letter == "a" else numbers[letter]
        for name, letter in zip(plan.arguments(spec), plan.layout(spec), strict=True)
    )
