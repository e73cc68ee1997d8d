"""Where a call goes, by device and layout, and what explain says of it.

_core takes plain ndarrays straight down to the kernels. What is left arrives here: arguments are
checked, layouts the kernels cannot walk are copied, and the call goes down through _core's
``*_rows`` functions. Each op is one class, whose constructor decides and whose ``run`` computes, so
that ``explain`` shows the very decisions a call would make.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from . import _core, checks


class Rows:
    """An array seen as (leading..., n): its normalized axes last, merged, and contiguous.

    `array` is a view where the layout allows it, else a copy (of an output: memory to be written
    back), which `notes` records.
    """

    def __init__(self, name: str, source: np.ndarray, axes: tuple[int, ...], notes: list[str]):
        lead = [d for d in range(source.ndim) if d not in axes]
        moved = source.transpose(*lead, *axes)
        native = moved.dtype.newbyteorder("=")
        why = _why_copied(moved, len(lead))
        if why:
            notes.append(f"{name} is copied: {why}")
            room = np.empty(moved.shape, native)
            if name not in ("out", "dx"):
                np.copyto(room, moved)
            moved = room
        self.copied = bool(why)
        self.lead = moved.shape[: len(lead)]
        self.normalized = moved.shape[len(lead) :]
        self.source = source
        self.order = (*lead, *axes)
        self.array = _merge_last(moved, len(lead))

    def write_back(self) -> None:
        """Bring the result from the copy to where the caller wants it."""
        if self.copied:
            moved = self.source.transpose(self.order)
            np.copyto(moved, self.array.reshape(moved.shape))


def _why_copied(moved: np.ndarray, lead: int) -> str:
    """Why the kernels cannot read this array where it lies; empty where they can."""
    if not moved.dtype.isnative:
        return "its bytes are swapped"
    if not moved.flags.aligned:
        return "its elements are not aligned"
    expected = moved.itemsize
    for d in reversed(range(lead, moved.ndim)):
        if moved.shape[d] > 1 and moved.strides[d] != expected:
            return "its normalized axes are not contiguous and last"
        expected *= moved.shape[d]
    return ""


def _merge_last(array: np.ndarray, lead: int) -> np.ndarray:
    """Trailing axes from `lead` on, which are contiguous, as one; no copy."""
    n = math.prod(array.shape[lead:])
    strides = (*array.strides[:lead], array.itemsize)
    return np.lib.stride_tricks.as_strided(array, (*array.shape[:lead], n), strides)


class LayerNormCall:
    """One call of layer_norm, checked."""

    def __init__(self, x, normalized_shape, weight, bias, eps, axis, out, return_stats):
        self.copies: list[str] = []
        source = checks.as_floating("x", x)
        axes = checks.normalized_axes(source, normalized_shape, axis)
        self.eps = checks.as_eps(eps)
        self.dtype = source.dtype.newbyteorder("=")
        normalized = tuple(source.shape[d] for d in axes)
        self.weight = checks.as_parameter("weight", weight, normalized, self.dtype)
        self.bias = checks.as_parameter("bias", bias, normalized, self.dtype)
        self.warm = out is not None
        if out is None:
            out = np.empty(source.shape, self.dtype)
        else:
            checks.check_out(out, source)
            checks.check_apart(out, x, {"weight": weight, "bias": bias})
        self.out = out
        self.x = Rows("x", source, axes, self.copies)
        self.y = Rows("out", out, axes, self.copies)
        self.return_stats = bool(return_stats)
        self.mean = np.zeros(self.x.lead, self.dtype)
        self.rstd = np.full(self.x.lead, np.nan, self.dtype)

    def _rows(self, plan: bool) -> Any:
        mean, rstd = (self.mean, self.rstd) if self.return_stats else (None, None)
        return _core.layer_norm_rows(
            self.x.array, self.y.array, self.weight, self.bias, self.eps, mean, rstd,
            self.warm and not self.y.copied, plan,
        )  # fmt: skip

    def plan(self) -> dict[str, Any]:
        return self._rows(plan=True)

    def run(self) -> Any:
        if self.x.array.size:
            self._rows(plan=False)
            self.y.write_back()
        return (self.out, self.mean, self.rstd) if self.return_stats else self.out


class LayerNormBackwardCall:
    """One call of layer_norm_backward, checked."""

    def __init__(self, dy, x, normalized_shape, mean, rstd, weight, bias, axis, output_mask):
        self.copies: list[str] = []
        source = checks.as_floating("x", x)
        axes = checks.normalized_axes(source, normalized_shape, axis)
        self.dtype = source.dtype.newbyteorder("=")
        grad = checks.as_floating("dy", dy)
        if grad.shape != source.shape:
            raise ValueError(f"dy: got shape {grad.shape}, wanted {source.shape}, the shape of x")
        if grad.dtype.newbyteorder("=") != self.dtype:
            self.copies.append(f"dy is copied: it is {grad.dtype}, x is {self.dtype}")
            grad = grad.astype(self.dtype)
        normalized = tuple(source.shape[d] for d in axes)
        self.weight = checks.as_parameter("weight", weight, normalized, self.dtype)
        checks.as_parameter("bias", bias, normalized, self.dtype)
        self.mean = checks.as_statistic("mean", mean, source, axes)
        self.rstd = checks.as_statistic("rstd", rstd, source, axes)
        want_dx, want_dweight, want_dbias = checks.as_mask(output_mask)
        self.result = np.empty(source.shape, self.dtype) if want_dx else None
        self.dweight = np.zeros(normalized, self.dtype) if want_dweight else None
        self.dbias = np.zeros(normalized, self.dtype) if want_dbias else None
        self.x = Rows("x", source, axes, self.copies)
        self.dy = Rows("dy", grad, axes, self.copies)
        self.dx = Rows("dx", self.result, axes, self.copies) if want_dx else None

    def _rows(self, plan: bool) -> Any:
        return _core.layer_norm_backward_rows(
            self.dy.array, self.x.array, self.dx and self.dx.array, self.mean, self.rstd,
            self.weight, self.dweight, self.dbias, plan,
        )  # fmt: skip

    def plan(self) -> dict[str, Any]:
        return self._rows(plan=True)

    def run(self) -> Any:
        if self.x.array.size:
            self._rows(plan=False)
            if self.dx is not None:
                self.dx.write_back()
        return self.result, self.dweight, self.dbias


class MomentsCall:
    """One call of moments, checked."""

    def __init__(self, x, axis=None):
        self.copies: list[str] = []
        source = checks.as_floating("x", x)
        axes = checks.normalized_axes(source, None, axis)
        self.dtype = source.dtype.newbyteorder("=")
        self.x = Rows("x", source, axes, self.copies)
        self.mean = np.zeros(self.x.lead, self.dtype)
        self.variance = np.full(self.x.lead, np.nan, self.dtype)

    def plan(self) -> dict[str, Any]:
        return _core.moments_rows(self.x.array, self.mean, self.variance, True)

    def run(self) -> Any:
        if self.x.array.size:
            _core.moments_rows(self.x.array, self.mean, self.variance)
        return self.mean, self.variance


def _handler(call: Callable[..., Any]) -> Callable[..., Any]:
    def handle(*args: Any) -> Any:
        return call(*args).run()

    return handle


for _op, _call in {
    "layer_norm": LayerNormCall,
    "layer_norm_backward": LayerNormBackwardCall,
    "moments": MomentsCall,
}.items():
    _core.register(_op, _handler(_call))


# ---- explain --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a call would do, and why; ``str()`` of it is meant to be read."""

    op: str
    backend: str
    isa: str
    threads: int
    regime: str
    stream: bool
    dtype: str
    rows: int
    cols: int
    copies: tuple[str, ...]
    reasons: tuple[str, ...]

    def asdict(self) -> dict[str, Any]:
        """The fields as a dict."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        head = (
            f"{self.op}: {self.rows} rows of {self.cols} {self.dtype} on {self.backend}, "
            f"{self.isa}, {threads}, regime {self.regime}"
        )
        return "\n".join([head, *(f"  - {line}" for line in (*self.copies, *self.reasons))])


def _layer_norm_arguments(x, normalized_shape=None, weight=None, bias=None, eps=1e-5, *, axis=None,
                          out=None, return_stats=False):  # fmt: skip
    return LayerNormCall(x, normalized_shape, weight, bias, eps, axis, out, return_stats)


def _backward_arguments(dy, x, normalized_shape, mean, rstd, weight=None, bias=None, *, axis=None,
                        output_mask=(True, True, True)):  # fmt: skip
    return LayerNormBackwardCall(
        dy, x, normalized_shape, mean, rstd, weight, bias, axis, output_mask
    )


_explained = {
    "layer_norm": _layer_norm_arguments,
    "layer_norm_backward": _backward_arguments,
    "moments": MomentsCall,
}

_REGIMES = {
    "narrow": "narrow: rows of a few vectors go eight at a time, in registers",
    "group": "group: rows of at most 1024 elements go several at a time",
    "row": "row: one row at a time",
    "stream": "stream: the output is large and its pages exist, so it is written past the cache",
}


def explain(op: Any, *args: Any, **kwargs: Any) -> Explanation:
    """What ``op(*args, **kwargs)`` would do on this machine; nothing is computed.

    Parameters
    ----------
    op : function or str
        One of fastnorm's ops, or its name: ``fastnorm.explain("layer_norm", x)``.
    *args, **kwargs
        The arguments of the call.

    Returns
    -------
    Explanation
        Backend, instruction set, threads, regime, copies that would be made, and the reasons.

    Raises
    ------
    ValueError
        If `op` is none of fastnorm's ops. Else what the call itself would raise.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _explained:
        raise ValueError(f"op: got {name!r}, wanted one of: {', '.join(_explained)}")
    call = _explained[name](*args, **kwargs)
    plan = call.plan()
    return Explanation(
        op=name,
        backend="cpu",
        isa=_core.isa_active(),
        threads=plan["threads"],
        regime=plan["regime"],
        stream=plan["stream"],
        dtype=call.dtype.name,
        rows=plan["rows"],
        cols=plan["cols"],
        copies=tuple(call.copies),
        reasons=(_REGIMES[plan["regime"]], _why_threads(plan)),
    )


def _why_threads(plan: dict[str, Any]) -> str:
    limits = _core.threads()
    if plan["threads"] > 1:
        return f"{plan['threads']} threads: the call moves {plan['bytes']:,} bytes"
    if limits["max"] == 1:
        return "1 thread: no more are allowed here (see fastnorm.show_config())"
    return f"1 thread: {plan['bytes']:,} bytes or {plan['rows']} rows do not pay for a second"
