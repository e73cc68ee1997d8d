"""What is timed: the arrays of one op at one shape, and how wrong a result may be."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastnorm
from fastnorm import accuracy, accuracy_channels, reference

Array = NDArray[Any]

# How many arrays of x's size must be read and written at the least, parameters aside.
ARRAYS_MOVED = {
    "layer_norm": 2,
    "layer_norm_backward": 3,
    "rms_norm": 2,
    "rms_norm_backward": 3,
    "add_layer_norm": 4,
    "add_layer_norm_backward": 4,
    "add_rms_norm": 4,
    "add_rms_norm_backward": 4,
    "adaptive_layer_norm": 2,
    "adaptive_layer_norm_backward": 3,
    "parallel_layer_norm": 3,
    "segment_layer_norm": 2,
    "segment_layer_norm_backward": 3,
    "segment_rms_norm": 2,
    "segment_rms_norm_backward": 3,
    "moments": 1,
    "batch_norm": 2,
    "batch_norm_backward": 3,
    "batch_norm_training": 2,
    "batch_norm_training_backward": 3,
    "group_norm": 2,
    "group_norm_backward": 3,
    "instance_norm": 2,
    "instance_norm_backward": 3,
    "adaptive_instance_norm": 3,
}
# Those of arrays with channels, (N, C, ...), and the public function of each.
CHANNELS = {
    "batch_norm": "batch_norm",
    "batch_norm_backward": "batch_norm_backward",
    "batch_norm_training": "batch_norm",
    "batch_norm_training_backward": "batch_norm_backward",
    "group_norm": "group_norm",
    "group_norm_backward": "group_norm_backward",
    "instance_norm": "instance_norm",
    "instance_norm_backward": "instance_norm_backward",
    "adaptive_instance_norm": "adaptive_instance_norm",
}
# Groups of group norm, at most: as many of them as divide the channels.
GROUPS = 32
# Rows of a sample (the tokens of an image in DiT) and of a segment (the nodes of a small graph),
# at most: as many of them as divide the rows.
TOKENS, NODES = 256, 32


class Case:
    """The arrays of one measurement: an op's at a shape, rows x cols or (N, C, ...), and a dtype.

    Every array starts at an address that is `align` modulo 64 (align = 64: at a cache line). All
    are of one dtype, parameters too.
    """

    def __init__(
        self, op: str, shape: tuple[int, ...], dtype: str, align: int = 64, eps: float = 1e-5
    ) -> None:
        self.op, self.shape, self.align, self.eps = op, shape, align, eps
        self.dtype = _storage(dtype)
        self._rng = np.random.default_rng(0)
        rows, cols = shape[0], shape[1] if op in CHANNELS else shape[-1]
        self.x, self.y = self.normal(shape), self.empty(shape)
        self.weight, self.bias = self.normal((cols,)), self.normal((cols,))
        self.weight += 1
        self.dy = self.normal(shape) if op.endswith("_backward") else self.y
        self._more: dict[str, Any] = {}
        if op.startswith("add_"):
            name = "dsum" if op.endswith("_backward") else "residual"
            self._more = {name: self.normal(shape), "total": self.empty(shape)}
        elif op in CHANNELS:
            self._more = self._of_channels(cols)
        elif op.startswith("adaptive_"):
            samples = rows // math.gcd(rows, TOKENS)
            tokens = (samples, -1, cols)
            self._more = {name: getattr(self, name).reshape(tokens) for name in ("x", "dy", "y")}
            self._more |= {name: self.normal((samples, cols)) for name in ("scale", "shift")}
        elif op.startswith("parallel_"):
            self._more = {"weight2": self.normal((cols,)), "bias2": self.normal((cols,))}
            self._more["y2"] = self.empty(shape)
        elif op.startswith("segment_"):
            self._more = {"offsets": np.arange(0, rows + 1, math.gcd(rows, NODES))}

    def _of_channels(self, channels: int) -> dict[str, Any]:
        running_var = self.normal((channels,))
        running_var *= running_var
        running_var += 1
        return {
            "running_mean": self.normal((channels,)),
            "running_var": running_var,
            "groups": math.gcd(channels, GROUPS),
            "style": self.normal(self.shape) if self.op == "adaptive_instance_norm" else None,
        }

    @property
    def running(self) -> tuple[Array, Array] | None:
        """What batch norm normalises by in inference; None in training."""
        if "training" in self.op:
            return None
        return self._more["running_mean"], self._more["running_var"]

    @property
    def arrays(self) -> dict[str, Any]:
        """What the statements that are timed may name."""
        arrays = {name: getattr(self, name) for name in ("x", "dy", "weight", "bias", "y")}
        return arrays | {"cols": self.shape[-1], "eps": self.eps} | self._more

    @property
    def name(self) -> str:
        return str(self.shape)

    @property
    def bytes_moved(self) -> int:
        """What must be read and written at the least."""
        return ARRAYS_MOVED[self.op] * self.x.nbytes

    def empty(self, shape: tuple[int, ...]) -> Array:
        size = int(np.prod(shape)) * self.dtype.itemsize
        offset = self.align % 64
        memory = fastnorm.empty(offset + size, np.uint8)
        return memory[offset:].view(self.dtype).reshape(shape)

    def normal(self, shape: tuple[int, ...]) -> Array:
        """Normally distributed numbers, others at each call."""
        array = self.empty(shape)
        array[...] = self._rng.standard_normal(shape, np.float64 if self.is_double else np.float32)
        return array

    @property
    def is_double(self) -> bool:
        return bool(self.dtype == np.float64)

    def largest_error(self, results: tuple[Array, ...]) -> float:
        """In the units of `fastnorm.accuracy`, the worst of what the op returns."""
        return _ERRORS[self.op](self, *results)


def _storage(dtype: Any) -> np.dtype[Any]:
    """np.dtype(dtype); bfloat16 is ml_dtypes', which need not be imported yet."""
    if str(dtype) == "bfloat16":
        return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    return np.dtype(dtype)


def allowed_error(op: str, dtype: Any) -> float:
    """What `Case.largest_error` may be where the results are fastnorm's.

    To the bound of what is computed comes the one rounding of what a half type stores; of dx, which
    may be a few times the scale of its error, a few.
    """
    stored = _storage(dtype)
    computed = accuracy.bound(stored)
    if stored.itemsize > 2:
        return computed
    ulp = float(accuracy.ulp(np.ones(1), stored)[0])
    return computed + ulp * (2 if op.endswith("_backward") else 0.5)


# ---- the errors of each op: the worst of its results, in the units of fastnorm.accuracy ----------


def _layer_norm(case: Case, y: Array) -> float:
    return accuracy.layer_norm_error(y, case.x, case.weight, case.bias, case.eps)


def _layer_norm_backward(case: Case, dx: Array, dweight: Array, dbias: Array) -> float:
    return max(
        accuracy.layer_norm_backward_errors(
            (dx, dweight, dbias), case.dy, case.x, case.weight, case.eps
        )
    )


def _rms_norm(case: Case, y: Array) -> float:
    return accuracy.rms_norm_error(y, case.x, case.weight, case.eps)


def _rms_norm_backward(case: Case, dx: Array, dweight: Array) -> float:
    return max(
        accuracy.rms_norm_backward_errors((dx, dweight), case.dy, case.x, case.weight, case.eps)
    )


def _add_layer_norm(case: Case, y: Array, total: Array) -> float:
    error = accuracy.layer_norm_error(y, total, case.weight, case.bias, case.eps)
    return max(error, _wrong_sum(case, total))


def _add_rms_norm(case: Case, y: Array, total: Array) -> float:
    error = accuracy.rms_norm_error(y, total, case.weight, case.eps)
    return max(error, _wrong_sum(case, total))


def _wrong_sum(case: Case, total: Array) -> float:
    """A sum is the right one to the bit, or it is wrong altogether."""
    compute = np.float64 if case.is_double else np.float32
    right = case.x.astype(compute) + case.arrays["residual"].astype(compute)
    return 0.0 if np.array_equal(total, right.astype(case.dtype)) else math.inf


def _add_layer_norm_backward(case: Case, dx: Array, dweight: Array, dbias: Array) -> float:
    of = case.arrays
    _, mean, rstd = reference.layer_norm(case.x, eps=case.eps, return_stats=True)
    exact, _, _ = reference.add_layer_norm_backward(
        case.dy, of["dsum"], case.x, case.shape[1], mean, rstd, case.weight, case.bias
    )
    sums = accuracy.layer_norm_backward_errors(
        (dx, dweight, dbias), case.dy, case.x, case.weight, case.eps
    )[1:]
    return max(_dx_and_dsum_error(case, dx, exact, rstd), *sums)


def _add_rms_norm_backward(case: Case, dx: Array, dweight: Array) -> float:
    of = case.arrays
    _, rstd = reference.rms_norm(case.x, eps=case.eps, return_stats=True)
    exact, _ = reference.add_rms_norm_backward(
        case.dy, of["dsum"], case.x, case.shape[1], rstd, case.weight
    )
    dweight_error = accuracy.rms_norm_backward_errors(
        (dx, dweight), case.dy, case.x, case.weight, case.eps
    )[1]
    return max(_dx_and_dsum_error(case, dx, exact, rstd), dweight_error)


def _dx_and_dsum_error(case: Case, dx: Array, exact: Array, rstd: Array) -> float:
    g = case.dy.astype(np.float64) * case.weight.astype(np.float64)
    scale = rstd[:, None] * np.abs(g).max(-1, keepdims=True)
    return accuracy.sum_error(dx, exact, scale + np.abs(case.arrays["dsum"].astype(np.float64)))


def _adaptive_layer_norm(case: Case, y: Array) -> float:
    of = case.arrays
    weights = 1 + of["scale"].astype(np.float64)
    return max(
        accuracy.layer_norm_error(y[k], x, weights[k], of["shift"][k], case.eps)
        for k, x in enumerate(of["x"])
    )


def _adaptive_layer_norm_backward(case: Case, dx: Array, dscale: Array, dshift: Array) -> float:
    of = case.arrays
    weights = 1 + of["scale"].astype(np.float64)
    return max(
        error
        for k, x in enumerate(of["x"])
        for error in accuracy.layer_norm_backward_errors(
            (dx[k], dscale[k], dshift[k]), of["dy"][k], x, weights[k], case.eps
        )
    )


def _parallel_layer_norm(case: Case, y: Array, y2: Array) -> float:
    of = case.arrays
    second = accuracy.layer_norm_error(y2, case.x, of["weight2"], of["bias2"], case.eps)
    return max(_layer_norm(case, y), second)


def _segment_layer_norm(case: Case, y: Array) -> float:
    x, weight, bias = _segments(case)
    return accuracy.layer_norm_error(y.reshape(x.shape), x, weight, bias, case.eps)


def _segment_rms_norm(case: Case, y: Array) -> float:
    x, weight, _ = _segments(case)
    return accuracy.rms_norm_error(y.reshape(x.shape), x, weight, case.eps)


def _segment_layer_norm_backward(case: Case, dx: Array, dweight: Array, dbias: Array) -> float:
    x, weight, _ = _segments(case)
    dy, none = case.dy.reshape(x.shape), np.zeros_like(weight)
    dx_error = accuracy.layer_norm_backward_errors(
        (dx.reshape(x.shape), none, none), dy, x, weight, case.eps
    )[0]
    return max(dx_error, *_segment_sum_errors(case, reference.layer_norm, dweight, dbias))


def _segment_rms_norm_backward(case: Case, dx: Array, dweight: Array) -> float:
    x, weight, _ = _segments(case)
    dy, none = case.dy.reshape(x.shape), np.zeros_like(weight)
    dx_error = accuracy.rms_norm_backward_errors(
        (dx.reshape(x.shape), none), dy, x, weight, case.eps
    )[0]
    return max(dx_error, *_segment_sum_errors(case, reference.rms_norm, dweight))


def _segments(case: Case) -> tuple[Array, Array, Array]:
    """x with a segment in each row, weight and bias repeated along it."""
    count = len(case.arrays["offsets"]) - 1
    repeats = case.shape[0] // count
    return case.x.reshape(count, -1), np.tile(case.weight, repeats), np.tile(case.bias, repeats)


def _segment_sum_errors(case: Case, norm: Callable[..., Any], *sums: Array) -> list[float]:
    """The errors of dweight, and of dbias where there is one."""
    x, _, _ = _segments(case)
    dy = case.dy.astype(np.float64)
    xh = norm(x, eps=case.eps).reshape(case.shape)
    terms = (dy * xh, np.abs(dy) * np.maximum(1, np.abs(xh))), (dy, np.abs(dy))
    return [
        accuracy.sum_error(total, exact.sum(0), magnitudes.sum(0))
        for total, (exact, magnitudes) in zip(sums, terms, strict=False)
    ]


def _moments(case: Case, mean: Array, variance: Array) -> float:
    return max(accuracy.moments_errors((mean, variance), case.x))


# ---- arrays with channels -----------------------------------------------------------------------


def _batch_norm(case: Case, y: Array, *running: Array) -> float:
    """`running`: where they have been updated by one call, from those of the case."""
    error = accuracy_channels.batch_norm_error(
        y, case.x, case.running, case.weight, case.bias, case.eps
    )
    if not running:
        return error
    before = case.arrays["running_mean"], case.arrays["running_var"]
    mean, variance = running
    return max(error, accuracy_channels.running_error((mean, variance), before, case.x))


def _batch_norm_backward(case: Case, *gradients: Array) -> float:
    dx, dweight, dbias = gradients
    errors = accuracy_channels.batch_norm_backward_errors(
        (dx, dweight, dbias), case.dy, case.x, case.running, case.weight, case.eps
    )
    return max(errors)


def _group_norm(case: Case, y: Array) -> float:
    return accuracy_channels.group_norm_error(
        y, case.x, _groups(case), case.weight, case.bias, case.eps
    )


def _group_norm_backward(case: Case, *gradients: Array) -> float:
    dx, dweight, dbias = gradients
    errors = accuracy_channels.group_norm_backward_errors(
        (dx, dweight, dbias), case.dy, case.x, _groups(case), case.weight, case.eps
    )
    return max(errors)


def _groups(case: Case) -> int:
    """Instance norm has a group for each channel."""
    return case.shape[1] if "instance" in case.op else case.arrays["groups"]


def _adaptive_instance_norm(case: Case, y: Array) -> float:
    """As an affine map of each plane, by the style's std and mean."""
    planes = (*case.shape[:2], -1)
    style = case.arrays["style"].reshape(planes)
    worst = 0.0
    for k, x in enumerate(case.x.reshape(planes)):
        mean, variance = reference.moments(style[k])
        std = np.sqrt(variance + case.eps)[:, None]
        xh = reference.layer_norm(x, eps=case.eps)
        error = accuracy.affine_error(y.reshape(planes)[k], xh, std, mean[:, None])
        worst = max(worst, error)
    return worst


_ERRORS: dict[str, Callable[..., float]] = {
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "add_layer_norm": _add_layer_norm,
    "add_layer_norm_backward": _add_layer_norm_backward,
    "add_rms_norm": _add_rms_norm,
    "add_rms_norm_backward": _add_rms_norm_backward,
    "adaptive_layer_norm": _adaptive_layer_norm,
    "adaptive_layer_norm_backward": _adaptive_layer_norm_backward,
    "parallel_layer_norm": _parallel_layer_norm,
    "segment_layer_norm": _segment_layer_norm,
    "segment_layer_norm_backward": _segment_layer_norm_backward,
    "segment_rms_norm": _segment_rms_norm,
    "segment_rms_norm_backward": _segment_rms_norm_backward,
    "moments": _moments,
    "batch_norm": _batch_norm,
    "batch_norm_backward": _batch_norm_backward,
    "batch_norm_training": _batch_norm,
    "batch_norm_training_backward": _batch_norm_backward,
    "group_norm": _group_norm,
    "group_norm_backward": _group_norm_backward,
    "instance_norm": _group_norm,
    "instance_norm_backward": _group_norm_backward,
    "adaptive_instance_norm": _adaptive_instance_norm,
}
