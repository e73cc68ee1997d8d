"""Where a call goes: the ops' table, and a handler for each op.

_core takes plain ndarrays straight down to the kernels. What is left arrives here: arguments are
checked, what the kernels cannot load is converted, and the call goes down through _core's
``*_rows`` functions. Each op makes one Call, of the kind that forward.py, backward.py or
segments.py has.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from . import _core, checks, interop
from .backward import NormBackwardCall
from .call import Call
from .forward import MomentsCall, NormCall, Pair
from .segments import SegmentNormBackwardCall, SegmentNormCall

# ---- the ops ------------------------------------------------------------------------------------
# Each takes what the public function of its name takes, in that order.


def _layer_norm(
    x: Any, normalized_shape: Any, weight: Any, bias: Any, eps: Any, axis: Any, out: Any,
    dtype: Any, return_stats: Any, activation: Any, lengths: Any, mask: Any,
    explained: bool = False,
) -> Call:  # fmt: skip
    return NormCall(
        x, normalized_shape, axis, [Pair(weight, bias, out)], eps, dtype=dtype,
        return_stats=return_stats, activation=activation, lengths=lengths, mask=mask,
        explained=explained,
    )  # fmt: skip


def _rms_norm(
    x: Any, normalized_shape: Any, weight: Any, eps: Any, axis: Any, out: Any, dtype: Any,
    offset: Any, round_before_weight: Any, return_stats: Any, activation: Any, lengths: Any,
    mask: Any, explained: bool = False,
) -> Call:  # fmt: skip
    return NormCall(
        x, normalized_shape, axis, [Pair(weight, None, out)], eps, rms=True, dtype=dtype,
        offset=offset, round_before_weight=round_before_weight, return_stats=return_stats,
        activation=activation, lengths=lengths, mask=mask, explained=explained,
    )  # fmt: skip


def _add_layer_norm(
    x: Any, residual: Any, normalized_shape: Any, weight: Any, bias: Any, eps: Any, axis: Any,
    out: Any, sum_out: Any, dtype: Any, linear_bias: Any, round_sum: Any, return_stats: Any,
    activation: Any, explained: bool = False,
) -> Call:  # fmt: skip
    return NormCall(
        x, normalized_shape, axis, [Pair(weight, bias, out)], eps, dtype=dtype,
        return_stats=return_stats, activation=activation, sum_out=sum_out, round_sum=round_sum,
        addends={"residual": _given("residual", residual), "linear_bias": linear_bias},
        explained=explained,
    )  # fmt: skip


def _add_rms_norm(
    x: Any, residual: Any, normalized_shape: Any, weight: Any, eps: Any, axis: Any, out: Any,
    sum_out: Any, dtype: Any, linear_bias: Any, offset: Any, round_before_weight: Any,
    round_sum: Any, return_stats: Any, activation: Any, explained: bool = False,
) -> Call:  # fmt: skip
    return NormCall(
        x, normalized_shape, axis, [Pair(weight, None, out)], eps, rms=True, dtype=dtype,
        offset=offset, round_before_weight=round_before_weight, return_stats=return_stats,
        activation=activation, sum_out=sum_out, round_sum=round_sum,
        addends={"residual": _given("residual", residual), "linear_bias": linear_bias},
        explained=explained,
    )  # fmt: skip


def _given(name: str, value: Any, wanted: str = "an array of x's shape") -> Any:
    if value is None:
        raise TypeError(f"{name}: got None, wanted {wanted}")
    return value


def _adaptive_layer_norm(
    x: Any, scale: Any, shift: Any, normalized_shape: Any, eps: Any, gate: Any, residual: Any,
    out: Any, sum_out: Any, dtype: Any, round_sum: Any, return_stats: Any, activation: Any,
    explained: bool = False,
) -> Call:  # fmt: skip
    if residual is None and (gate is not None or sum_out is not None):
        name = "gate" if gate is not None else "sum_out"
        raise TypeError(f"{name}: got an array without a residual, wanted both or neither")
    pair = Pair(_given("scale", scale, "an array"), shift, out, ("scale", "shift", "out"))
    return NormCall(
        x, normalized_shape, None, [pair], eps, offset=1.0, dtype=dtype,
        return_stats=return_stats, activation=activation, sum_out=sum_out, round_sum=round_sum,
        addends=None if residual is None else {"residual": residual, "gate": gate},
        per_sample=True, explained=explained,
    )  # fmt: skip


def _parallel_layer_norm(
    x: Any, normalized_shape: Any, weights: Any, biases: Any, eps: Any, out: Any, dtype: Any,
    return_stats: Any, activation: Any, explained: bool = False,
) -> Call:  # fmt: skip
    lists = {"weights": weights, "biases": biases, "out": out}
    count = len(_sequence("weights", weights))
    if not count:
        raise ValueError("weights: got an empty sequence, wanted at least one weight (or None)")
    filled = {k: [None] * count if v is None else _sequence(k, v) for k, v in lists.items()}
    for name, items in filled.items():
        if len(items) != count:
            raise ValueError(f"{name}: got {len(items)} of them, wanted {count}, one a weight")
    pairs = [
        Pair(weight, bias, result, (f"weights[{i}]", f"biases[{i}]", f"out[{i}]"))
        for i, (weight, bias, result) in enumerate(zip(*filled.values(), strict=True))
    ]
    return NormCall(
        x, normalized_shape, None, pairs, eps, dtype=dtype, return_stats=return_stats,
        activation=activation, several=True, explained=explained,
    )  # fmt: skip


def _sequence(name: str, value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    raise TypeError(f"{name}: got {type(value).__name__}, wanted a list or tuple")


def _layer_norm_backward(
    dy: Any, x: Any, normalized_shape: Any, mean: Any, rstd: Any, weight: Any, bias: Any,
    axis: Any, output_mask: Any, from_output: Any, lengths: Any, mask: Any,
    explained: bool = False,
) -> Call:  # fmt: skip
    return NormBackwardCall(
        dy, x, normalized_shape, axis, mean, rstd, weight, bias, output_mask,
        from_output=from_output, lengths=lengths, mask=mask, explained=explained,
    )  # fmt: skip


def _rms_norm_backward(
    dy: Any, x: Any, normalized_shape: Any, rstd: Any, weight: Any, axis: Any, offset: Any,
    output_mask: Any, from_output: Any, lengths: Any, mask: Any, explained: bool = False,
) -> Call:  # fmt: skip
    return NormBackwardCall(
        dy, x, normalized_shape, axis, None, rstd, weight, None, output_mask, rms=True,
        offset=offset, from_output=from_output, lengths=lengths, mask=mask, explained=explained,
    )  # fmt: skip


def _adaptive_layer_norm_backward(
    dy: Any, x: Any, scale: Any, normalized_shape: Any, mean: Any, rstd: Any, output_mask: Any,
    explained: bool = False,
) -> Call:  # fmt: skip
    scale = _given("scale", scale, "an array")
    call = NormBackwardCall(
        dy, x, normalized_shape, None, mean, rstd, scale, None, output_mask, offset=1.0,
        names=("x", "scale"), per_sample=True, explained=explained,
    )  # fmt: skip
    shape = np.shape(scale)
    dx, dscale, dshift = call.result
    call.result = (dx, *(None if d is None else d.reshape(shape) for d in (dscale, dshift)))
    return call


def _segment_layer_norm(
    x: Any, offsets: Any, weight: Any, bias: Any, eps: Any, out: Any, dtype: Any,
    return_stats: Any, activation: Any, explained: bool = False,
) -> Call:  # fmt: skip
    return SegmentNormCall(
        x, offsets, weight, bias, eps, out, dtype, return_stats, activation, explained=explained
    )


def _segment_rms_norm(
    x: Any, offsets: Any, weight: Any, eps: Any, offset: Any, out: Any, dtype: Any,
    return_stats: Any, activation: Any, explained: bool = False,
) -> Call:  # fmt: skip
    return SegmentNormCall(
        x, offsets, weight, None, eps, out, dtype, return_stats, activation, rms=True,
        offset=offset, explained=explained,
    )  # fmt: skip


def _segment_layer_norm_backward(
    dy: Any, x: Any, offsets: Any, mean: Any, rstd: Any, weight: Any, bias: Any, output_mask: Any,
    explained: bool = False,
) -> Call:  # fmt: skip
    return SegmentNormBackwardCall(
        dy, x, offsets, mean, rstd, weight, bias, output_mask, explained=explained
    )


def _segment_rms_norm_backward(
    dy: Any, x: Any, offsets: Any, rstd: Any, weight: Any, offset: Any, output_mask: Any,
    explained: bool = False,
) -> Call:  # fmt: skip
    return SegmentNormBackwardCall(
        dy, x, offsets, None, rstd, weight, None, output_mask, rms=True, offset=offset,
        explained=explained,
    )  # fmt: skip


def _moments(x: Any, axis: Any, explained: bool = False) -> Call:
    return MomentsCall(x, axis, explained)


def _add_backward(made: Call, dsum: Any) -> Call:
    """dx of the sum's parts: the gradient through the norm and the one that came to the sum."""
    if dsum is None:
        return made
    assert isinstance(made, NormBackwardCall)
    made.add_to_dx("dsum", dsum)
    return made


def _add_layer_norm_backward(
    dy: Any, dsum: Any, sum: Any, normalized_shape: Any, mean: Any, rstd: Any, weight: Any,
    bias: Any, axis: Any, output_mask: Any, explained: bool = False,
) -> Call:  # fmt: skip
    made = NormBackwardCall(
        dy, sum, normalized_shape, axis, mean, rstd, weight, bias, output_mask,
        names=("sum", "weight"), explained=explained,
    )  # fmt: skip
    return _add_backward(made, dsum)


def _add_rms_norm_backward(
    dy: Any, dsum: Any, sum: Any, normalized_shape: Any, rstd: Any, weight: Any, axis: Any,
    offset: Any, output_mask: Any, explained: bool = False,
) -> Call:  # fmt: skip
    made = NormBackwardCall(
        dy, sum, normalized_shape, axis, None, rstd, weight, None, output_mask, rms=True,
        offset=offset, names=("sum", "weight"), explained=explained,
    )  # fmt: skip
    return _add_backward(made, dsum)


CALLS: dict[str, Callable[..., Call]] = {
    call.__name__.removeprefix("_"): call
    for call in (
        _layer_norm, _layer_norm_backward, _rms_norm, _rms_norm_backward, _add_layer_norm,
        _add_layer_norm_backward, _add_rms_norm, _add_rms_norm_backward, _adaptive_layer_norm,
        _adaptive_layer_norm_backward, _parallel_layer_norm, _segment_layer_norm,
        _segment_layer_norm_backward, _segment_rms_norm, _segment_rms_norm_backward, _moments,
    )
}  # fmt: skip


@functools.cache
def _on_cuda(name: str) -> Callable[..., Any]:
    """The op on arrays in CUDA memory."""
    return importlib.import_module(".cuda", __package__).op(name)


def public_of(name: str) -> Callable[..., Any]:
    """The op's public function, which has the straight path, its arguments by position."""

    @functools.cache
    def found() -> tuple[Callable[..., Any], int, list[str], list[Any]]:
        function = getattr(importlib.import_module(__package__), name)
        parameters = inspect.signature(function).parameters.values()
        named = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        count = len(parameters) - len(named)
        return function, count, [p.name for p in named], [p.default for p in named]

    def call(*args: Any) -> Any:
        function, count, names, defaults = found()
        given = args[count:]
        if all(map(operator.is_, given, defaults)):  # each that is named takes its time
            return function(*args[:count])
        return function(*args[:count], **dict(zip(names, given, strict=True)))

    return call


def handler_of(call: Callable[..., Any]) -> Callable[..., Any]:
    """The op itself, its arguments by position; they need not be ndarrays."""
    names = tuple(inspect.signature(call).parameters)[:-1]
    name = call.__name__.removeprefix("_")
    main = "x" if "x" in names else "sum"
    at = names.index(main)

    def run(*converted: Any) -> Any:
        return call(*converted).run()

    on_host = interop.runner(run, names, main, public_of(name))

    def handle(*args: Any) -> Any:
        return (_on_cuda(name) if interop.is_on_cuda(args[at]) else on_host)(*args)

    return handle


handlers = {name: handler_of(call) for name, call in CALLS.items()}
for _name in _core.STRAIGHT:
    _core.register(_name, handlers[_name])
_core.register_names(checks.RESULT_TYPES, checks.ACTIVATIONS)
