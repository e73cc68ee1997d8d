"""What the lines of `fastnorm.contenders` for ops on channels need besides the case's arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastnorm
from fastnorm.cases import Case

Array = NDArray[Any]


def own_running(case: Case) -> tuple[dict[str, Array], tuple[tuple[Array, Array], ...]]:
    """Copies of running statistics that a library may change, and as what it `changed` them."""
    if case.op != "batch_norm_training":
        return {}, ()
    before = {name: case.arrays[name] for name in ("running_mean", "running_var")}
    own = {name: array.copy() for name, array in before.items()}
    return own, tuple(zip(own.values(), before.values(), strict=True))


def statistics(case: Case) -> dict[str, Any]:
    """mean and rstd as the forward call saves them, where backward takes them."""
    names, eps = case.arrays, case.eps
    if case.op == "group_norm_backward":
        _, *found = fastnorm.group_norm(names["x"], names["groups"], eps=eps, return_stats=True)
    elif case.op == "instance_norm_backward":
        _, *found = fastnorm.instance_norm(names["x"], eps=eps, return_stats=True)
    elif case.op == "batch_norm_training_backward":
        _, *found = fastnorm.batch_norm(
            names["x"], None, None, training=True, eps=eps, return_stats=True
        )
    else:
        return {}
    return dict(zip(("mean", "rstd"), found, strict=True))


# ---- NumPy --------------------------------------------------------------------------------------


def numpy_names(case: Case) -> dict[str, Any]:
    """Arrays as (N, G, C/G, S), so that statistics and parameters broadcast."""
    arrays = case.arrays
    groups = arrays["groups"] if case.op.startswith("group_norm") else case.shape[1]
    split = case.shape[0], groups, case.shape[1] // groups, math.prod(case.shape[2:])
    axes = (0, 3) if case.op.startswith("batch_norm") else (2, 3)
    names: dict[str, Any] = {"np": np, "eps": case.eps, "axes": axes, "shape": case.shape}
    names |= {name: arrays[name].reshape(split) for name in ("x", "dy")}
    names |= {name: arrays[name].reshape(*split[1:3], 1) for name in ("weight", "bias")}
    if case.op == "adaptive_instance_norm":
        names["style"] = arrays["style"].reshape(split)
    if case.op in ("batch_norm", "batch_norm_backward"):
        mean, var = (arrays[name].reshape(-1, 1, 1) for name in ("running_mean", "running_var"))
    else:
        mean, var = (f(names["x"], axes, keepdims=True) for f in (np.mean, np.var))
    names |= {"mean": mean, "var": var, "rstd": 1 / np.sqrt(var + case.dtype.type(case.eps))}
    return names | {
        "batch_norm_training": _batch_norm_training,
        "batch_norm_backward": _batch_norm_backward,
        "units_backward": _units_backward,
    }


def _batch_norm_training(
    x: Array,
    running_mean: Array,
    running_var: Array,
    weight: Array,
    bias: Array,
    momentum: float,
    eps: float,
) -> Any:
    mean, var = x.mean((0, 3), keepdims=True), x.var((0, 3), keepdims=True)
    n = x.size // mean.size
    running_mean += momentum * (mean.reshape(-1) - running_mean)
    running_var += momentum * (var.reshape(-1) * (n / max(1, n - 1)) - running_var)
    return (x - mean) / np.sqrt(var + eps) * weight + bias


def _batch_norm_backward(dy: Array, x: Array, mean: Array, rstd: Array, weight: Array) -> Any:
    xh = (x - mean) * rstd
    return dy * (rstd * weight), (dy * xh).sum((0, 3)).reshape(-1), dy.sum((0, 3)).reshape(-1)


def _units_backward(
    dy: Array, x: Array, mean: Array, rstd: Array, weight: Array, axes: tuple[int, int]
) -> Any:
    xh = (x - mean) * rstd
    g = dy * weight
    towards = g - g.mean(axes, keepdims=True) - xh * (g * xh).mean(axes, keepdims=True)
    return rstd * towards, (dy * xh).sum((0, 3)).reshape(-1), dy.sum((0, 3)).reshape(-1)


# ---- torch --------------------------------------------------------------------------------------


def is_refused(case: Case) -> bool:
    """Whether torch has no call for the case: units of one element, in training."""
    size = math.prod(case.shape[2:])
    if case.op.startswith("batch_norm_training"):
        return case.shape[0] * size == 1
    if case.op.startswith("group_norm"):
        return case.shape[0] * case.shape[1] * size == case.arrays["groups"]
    return "instance" in case.op and size == 1


def torch_names(case: Case, x: Any) -> dict[str, Any]:
    """The calls, what saved statistics they want, and the counts of elements; x is a tensor."""
    import torch

    eps = case.eps
    counts = case.shape[0], case.shape[1], math.prod(case.shape[2:])
    names = {
        "counts": counts,
        "batch_norm": torch.nn.functional.batch_norm,
        "group_norm": torch.nn.functional.group_norm,
        "instance_norm": torch.nn.functional.instance_norm,
        "adaptive_instance_norm": _adaptive_instance_norm,
    }
    if case.op == "group_norm_backward":
        names["backward"] = torch.ops.aten.native_group_norm_backward.default
        _, mean, rstd = torch.native_group_norm(x, None, None, *counts, case.arrays["groups"], eps)
        names |= {"mean": mean, "rstd": rstd}
    elif case.op.startswith("batch_norm"):
        names["backward"] = torch.ops.aten.native_batch_norm_backward.default
        _, mean, rstd = torch.native_batch_norm(x, None, None, None, None, True, 0.1, eps)
        names |= {"mean": mean, "rstd": rstd}
    return names


def _adaptive_instance_norm(x: Any, style: Any, eps: float) -> Any:
    import torch

    axes = tuple(range(2, style.ndim))
    var, mean = torch.var_mean(style, axes, correction=0, keepdim=True)
    return torch.nn.functional.instance_norm(x, eps=eps) * (var + eps).sqrt() + mean
