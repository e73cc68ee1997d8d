"""Ways to call an op that `fastnorm.contenders` does not have: 8-bit results, channels first and
ragged rows, each with its peers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastnorm
from fastnorm import accuracy, cases, contenders
from fastnorm.contenders import Contender

Array = NDArray[Any]
Shape = tuple[int, ...]

SHORTEST = 64  # of rows whose lengths are drawn evenly from here to the number of columns
TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Timed:
    """Contenders by name, and how wrong one's results are: at most 1 where it is the function."""

    found: dict[str, Contender]
    error: Callable[[tuple[Array, ...]], float]


def of_op(op: str, shape: Shape, dtype: str, align: int) -> Timed:
    """The contenders for one of OPS."""
    return OPS[op](shape, dtype, align)


def _all(*found: Contender) -> dict[str, Contender]:
    return {contender.name: contender for contender in found}


def _torch(statements: dict[str, str], names: dict[str, Any], **more: Any) -> list[Contender]:
    """A contender for each name and statement; none without torch."""
    if not contenders.PROVIDERS["torch"].installed:
        return []
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    tensors = {
        name: contenders.tensor(value) if isinstance(value, np.ndarray) else value
        for name, value in names.items()
    }
    tensors |= more | {"layer_norm": torch.nn.functional.layer_norm}
    return [Contender(name, "new", statement, tensors) for name, statement in statements.items()]


# ---- 8-bit results ------------------------------------------------------------------------------


def int8(shape: Shape, dtype: str, align: int) -> Timed:
    """Layer norm whose result is int8 and a scale for each row; the pass it is fused into."""
    rows, cols = shape
    case = cases.Case("layer_norm", (rows, cols), dtype, align)
    names = case.arrays | {"layer_norm": fastnorm.layer_norm, "int8": np.int8}
    call = "layer_norm(x, cols, weight, bias, eps"
    composite = {"torch": "quantized(x, shape, weight, bias, eps)"}
    found = _all(
        Contender("fastnorm", "new", f"{call}, dtype=int8)", names),
        Contender("float32", "new", f"{call})", names),
        *_torch(composite, case.arrays, quantized=_torch_int8, shape=(cols,)),
    )
    exact = fastnorm.reference.layer_norm(case.x, cols, case.weight, case.bias, case.eps)

    def error(results: tuple[Array, ...]) -> float:
        if len(results) == 1:  # the plain pass
            return case.largest_error(results) / cases.allowed_error("layer_norm", dtype)
        q, scale = results
        allowed = np.broadcast_to(0.501 * scale[:, None], exact.shape)
        return accuracy.sum_error(q * scale[:, None].astype(np.float64), exact, allowed)

    return Timed(found, error)


def _torch_int8(x: Any, shape: Shape, weight: Any, bias: Any, eps: float) -> Any:
    import torch

    y = torch.nn.functional.layer_norm(x, shape, weight, bias, eps)
    scale = (y.abs().amax(-1, keepdim=True) / 127).clamp_min(TINY)
    return (y / scale).round().clamp(-127, 127).to(torch.int8), scale[:, 0]


# ---- channels first -----------------------------------------------------------------------------


def channels_first(shape: Shape, dtype: str, align: int) -> Timed:
    """LayerNorm2d of ConvNeXt: over the channels of each pixel of (N, C, H, W)."""
    case = cases.Case("layer_norm", (1, shape[1]), dtype, align, eps=1e-6)
    x = case.normal(shape)
    names = {"x": x, "weight": case.weight, "bias": case.bias, "eps": case.eps}
    call = "layer_norm(x, weight=weight, bias=bias, eps=eps, axis=1)"
    composites = {
        "torch permuted": (
            "layer_norm(x.permute(0, 2, 3, 1), shape, weight, bias, eps)"
            ".permute(0, 3, 1, 2).contiguous()"
        ),
        "torch ConvNeXt": "convnext(x, weight, bias, eps)",
    }
    found = _all(
        Contender("fastnorm", "new", call, names | {"layer_norm": fastnorm.layer_norm}),
        *_torch(composites, names, convnext=_convnext, shape=shape[1:2]),
        Contender("copy", "new", "x.copy()", names),
    )

    def error(results: tuple[Array, ...]) -> float:
        y, last = np.moveaxis(results[0], 1, -1), np.moveaxis(x, 1, -1)
        found = accuracy.layer_norm_error(y, last, case.weight, case.bias, case.eps)
        return found / (10 * cases.allowed_error("layer_norm", dtype))

    return Timed(found, error)


def _convnext(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """As the model's authors wrote it (facebookresearch/ConvNeXt, LayerNorm, channels_first)."""
    import torch

    u = x.mean(1, keepdim=True)
    s = (x - u).pow(2).mean(1, keepdim=True)
    x = (x - u) / torch.sqrt(s + eps)
    return weight[:, None, None] * x + bias[:, None, None]


# ---- ragged rows: next to fastnorm itself on dense rows -----------------------------------------


def lengths(shape: Shape, dtype: str, align: int) -> Timed:
    """Rows that are valid up to lengths; dense: as many valid elements, in rows of the mean one."""
    rows, cols = shape
    case = cases.Case("layer_norm", (rows, cols), dtype, align)
    drawn = _drawn_lengths(shape)
    names = case.arrays | {"layer_norm": fastnorm.layer_norm, "lengths": drawn}
    call = "layer_norm(x, cols, weight, bias, eps, lengths=lengths)"
    dense = _dense(drawn, dtype, align)
    found = _all(
        Contender("fastnorm", "new", call, names),
        Contender("dense", "new", "layer_norm(x, cols, weight, bias, eps)", dense),
    )
    return Timed(found, functools.partial(_ragged_error, case, {"lengths": drawn}))


def packed(shape: Shape, dtype: str, align: int) -> Timed:
    """The same rows without what is not valid, one after the other in one dimension."""
    drawn = _drawn_lengths(shape)
    total = int(drawn.sum())
    x = cases.Case("layer_norm", (1, SHORTEST), dtype, align).normal((total,))
    offsets = np.concatenate([[0], np.cumsum(drawn)])
    names = {"x": x, "offsets": offsets, "segment_layer_norm": fastnorm.segment_layer_norm}
    found = _all(
        Contender("fastnorm", "new", "segment_layer_norm(x, offsets)", names),
        Contender("dense", "new", "layer_norm(x, cols)", _dense(drawn, dtype, align)),
    )

    def error(results: tuple[Array, ...]) -> float:
        edges = itertools.pairwise(offsets)
        y = results[0]
        worst = max(accuracy.layer_norm_error(y[a:b], x[a:b]) for a, b in edges)
        return worst / cases.allowed_error("layer_norm", dtype)

    return Timed(found, error)


def masked(percent: int, shape: Shape, dtype: str, align: int) -> Timed:
    """Rows of which so many percent of the elements are valid; dense: all of them."""
    rows, cols = shape
    case = cases.Case("layer_norm", (rows, cols), dtype, align)
    mask = np.random.default_rng(1).random(shape) < percent / 100
    names = case.arrays | {"layer_norm": fastnorm.layer_norm, "mask": mask}
    found = _all(
        Contender("fastnorm", "new", "layer_norm(x, cols, weight, bias, eps, mask=mask)", names),
        Contender("dense", "new", "layer_norm(x, cols, weight, bias, eps)", names),
    )
    return Timed(found, functools.partial(_ragged_error, case, {"mask": mask}))


def _drawn_lengths(shape: Shape) -> Array:
    return np.random.default_rng(1).integers(SHORTEST, shape[1] + 1, shape[0])


def _dense(drawn: Array, dtype: str, align: int) -> dict[str, Any]:
    cols = round(float(drawn.mean()))
    case = cases.Case("layer_norm", (int(drawn.sum()) // cols, cols), dtype, align)
    return case.arrays | {"layer_norm": fastnorm.layer_norm}


def _ragged_error(case: cases.Case, valid: dict[str, Any], results: tuple[Array, ...]) -> float:
    cols, eps = case.shape[1], case.eps
    exact = fastnorm.reference.layer_norm(case.x, cols, case.weight, case.bias, eps, **valid)
    xh = fastnorm.reference.layer_norm(case.x, cols, eps=eps, **valid)
    scale = np.abs(case.weight) * np.maximum(1, np.abs(xh).max(-1, keepdims=True))
    error = accuracy.sum_error(results[0], exact, scale + np.abs(case.bias))
    return error / cases.allowed_error("layer_norm", case.dtype)


OPS: dict[str, Callable[[Shape, str, int], Timed]] = {
    "layer_norm int8": int8,
    "layer_norm 2d": channels_first,
    "layer_norm lengths": lengths,
    "segment_layer_norm lengths": packed,
    **{
        f"layer_norm mask {percent}%": functools.partial(masked, percent)
        for percent in (50, 70, 90)
    },
}
