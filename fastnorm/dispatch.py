"""Where a call goes, by device and layout, and what explain says of it.

_core takes plain ndarrays straight down to the kernels. What is left arrives here: arguments are
checked, layouts the kernels cannot walk are copied, and the call goes down through _core's
``*_rows`` functions. Each op is one class, whose constructor decides and whose ``run`` computes, so
that ``explain`` shows the very decisions a call would make.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from . import _core, checks


class Rows:
    """An array seen as (leading..., n): its normalized axes last, merged, and contiguous.

    `array` is a view where the layout allows it, else memory of its own, which `notes` records: a
    copy, or, where not to `fill`, room for what will be written back.
    """

    def __init__(
        self,
        name: str,
        source: np.ndarray,
        axes: tuple[int, ...],
        notes: list[str],
        fill: bool = True,
    ) -> None:
        lead = [d for d in range(source.ndim) if d not in axes]
        self.source = source
        self.order = (*lead, *axes)
        moved = source.transpose(self.order)
        why = _why_copied(moved, len(lead))
        self.copied = bool(why)
        if why:
            notes.append(f"{name} is copied: {why}")
            room = np.empty(moved.shape, moved.dtype.newbyteorder("="))
            if fill:
                np.copyto(room, moved)
            moved = room
        self.lead = moved.shape[: len(lead)]
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
    if not moved.size:
        return ""
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


class Call:
    """One call of an op, checked and laid out.

    An op's own constructor sets `kernel`, the function of _core with its arguments, `result`, what
    the caller gets, and `outputs`, the rows to be written back. A call that is only `explained`
    copies nothing and takes no kept memory.
    """

    kernel: Callable[..., Any]
    result: Any
    outputs: tuple[Rows, ...] = ()

    def __init__(self, x: Any, normalized_shape: Any, axis: Any, explained: bool) -> None:
        self.explained = explained
        self.copies: list[str] = []
        self.source = checks.as_floating("x", x)
        self.axes = checks.normalized_axes(self.source, normalized_shape, axis)
        self.dtype = self.source.dtype.newbyteorder("=")
        self.normalized = tuple(self.source.shape[d] for d in self.axes)

    def parameter(self, name: str, value: Any) -> np.ndarray | None:
        return checks.as_parameter(name, value, self.normalized, self.dtype)

    def rows(self, name: str, source: np.ndarray, is_output: bool = False) -> Rows:
        fill = not is_output and not self.explained
        return Rows(name, source, self.axes, self.copies, fill)

    def new_result(self) -> tuple[np.ndarray, bool]:
        """An array for the result, and whether its pages are known to exist."""
        if self.explained:
            return np.empty(self.source.shape, self.dtype), _core.would_be_warm(self.source.nbytes)
        return _core.new_result(self.source)

    def statistics(self, lead: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Room for a mean and an rstd or variance, which hold what rows of length 0 have."""
        return np.zeros(lead, self.dtype), np.full(lead, np.nan, self.dtype)

    def plan(self) -> dict[str, Any]:
        """What `run` would do, as _core describes it."""
        return self.kernel(plan=True)

    def run(self) -> Any:
        if self.source.size:
            self.kernel()
            for rows in self.outputs:
                rows.write_back()
        return self.result


class LayerNormCall(Call):
    """One call of layer_norm."""

    def __init__(
        self, x: Any, normalized_shape: Any, weight: Any, bias: Any, eps: Any, axis: Any, out: Any,
        return_stats: Any, explained: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(x, normalized_shape, axis, explained)
        w, b = self.parameter("weight", weight), self.parameter("bias", bias)
        checked_eps = checks.as_eps(eps)
        warm = True
        if out is None:
            out, warm = self.new_result()
        else:
            checks.check_out(out, self.source)
            checks.check_apart(out, {"x": x, "weight": weight, "bias": bias})
        x_rows, y_rows = self.rows("x", self.source), self.rows("out", out, is_output=True)
        mean, rstd = self.statistics(x_rows.lead) if return_stats else (None, None)
        self.kernel = partial(
            _core.layer_norm_rows, x_rows.array, y_rows.array, w, b, checked_eps, mean, rstd,
            warm and not y_rows.copied,
        )  # fmt: skip
        self.outputs = (y_rows,)
        self.result = (out, mean, rstd) if return_stats else out


class LayerNormBackwardCall(Call):
    """One call of layer_norm_backward."""

    def __init__(
        self, dy: Any, x: Any, normalized_shape: Any, mean: Any, rstd: Any, weight: Any, bias: Any,
        axis: Any, output_mask: Any, explained: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(x, normalized_shape, axis, explained)
        grad = self.gradient(dy)
        w = self.parameter("weight", weight)
        self.parameter("bias", bias)
        m = checks.as_statistic("mean", mean, self.source, self.axes)
        r = checks.as_statistic("rstd", rstd, self.source, self.axes)
        want_dx, want_dweight, want_dbias = checks.as_mask(output_mask)
        dx, warm = self.new_result() if want_dx else (None, False)
        dweight = np.zeros(self.normalized, self.dtype) if want_dweight else None
        dbias = np.zeros(self.normalized, self.dtype) if want_dbias else None
        x_rows, dy_rows = self.rows("x", self.source), self.rows("dy", grad)
        dx_rows = None if dx is None else self.rows("dx", dx, is_output=True)
        self.kernel = partial(
            _core.layer_norm_backward_rows, dy_rows.array, x_rows.array,
            None if dx_rows is None else dx_rows.array, m, r, w, dweight, dbias,
            warm=warm and dx_rows is not None and not dx_rows.copied,
        )  # fmt: skip
        self.outputs = () if dx_rows is None else (dx_rows,)
        self.result = (dx, dweight, dbias)

    def gradient(self, dy: Any) -> np.ndarray:
        """dy in x's type."""
        grad = checks.as_floating("dy", dy)
        if grad.shape != self.source.shape:
            raise ValueError(
                f"dy: got shape {grad.shape}, wanted {self.source.shape}, the shape of x"
            )
        if grad.dtype.newbyteorder("=") == self.dtype:
            return grad
        self.copies.append(f"dy is copied: it is {grad.dtype}, x is {self.dtype}")
        return grad.astype(self.dtype)


class MomentsCall(Call):
    """One call of moments."""

    def __init__(self, x: Any, axis: Any = None, explained: bool = False) -> None:
        super().__init__(x, None, axis, explained)
        rows = self.rows("x", self.source)
        self.result = self.statistics(rows.lead)
        self.kernel = partial(_core.moments_rows, rows.array, *self.result)


def _handler(call: Callable[..., Call]) -> Callable[..., Any]:
    def handle(*args: Any) -> Any:
        return call(*args).run()

    return handle


for _op, _call in {
    "layer_norm": LayerNormCall,
    "layer_norm_backward": LayerNormBackwardCall,
    "moments": MomentsCall,
}.items():
    _core.register(_op, _handler(_call))


# ---- explain ------------------------------------------------------------------------------------


class Explanation(NamedTuple):
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
        return self._asdict()

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        head = (
            f"{self.op}: {self.rows} rows of {self.cols} {self.dtype} on {self.backend}, "
            f"{self.isa}, {threads}, regime {self.regime}"
        )
        return "\n".join([head, *(f"  - {line}" for line in (*self.copies, *self.reasons))])


# explain's arguments are the op's own, checked by Python as the op's are.


def _layer_norm(
    x: Any, normalized_shape: Any = None, weight: Any = None, bias: Any = None, eps: Any = 1e-5, *,
    axis: Any = None, out: Any = None, return_stats: Any = False,
) -> Call:  # fmt: skip
    return LayerNormCall(x, normalized_shape, weight, bias, eps, axis, out, return_stats, True)


def _layer_norm_backward(
    dy: Any, x: Any, normalized_shape: Any, mean: Any, rstd: Any, weight: Any = None,
    bias: Any = None, *, axis: Any = None, output_mask: Any = (True, True, True),
) -> Call:  # fmt: skip
    return LayerNormBackwardCall(
        dy, x, normalized_shape, mean, rstd, weight, bias, axis, output_mask, True
    )


def _moments(x: Any, axis: Any = None) -> Call:
    return MomentsCall(x, axis, True)


_EXPLAINED: dict[str, Callable[..., Call]] = {
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "moments": _moments,
}

for _name, _arguments in _EXPLAINED.items():
    _arguments.__qualname__ = _name  # what Python calls it where the arguments do not fit

# As parallel.c names them and op_layer_norm.h and op_layer_norm_backward.h have them.
_REGIMES = {
    "narrow": "narrow: rows of at most four vectors go eight at a time, in registers",
    "group": "group: rows go two or four at a time and share what is loaded of the parameters",
    "row": "row: rows go one at a time",
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
    name = _name_of(op)
    call = _EXPLAINED[name](*args, **kwargs)
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


def _name_of(op: Any) -> str:
    for name in _EXPLAINED:
        if op is getattr(_core, name) or (isinstance(op, str) and op == name):
            return name
    raise ValueError(f"op: got {op!r}, wanted one of: {', '.join(_EXPLAINED)}")


def _why_threads(plan: dict[str, Any]) -> str:
    if plan["threads"] > 1:
        return f"{plan['threads']} threads: the call moves {plan['bytes']:,} bytes"
    if _core.threads()["max"] == 1:
        return "1 thread: no more are allowed here (see fastnorm.show_config())"
    return f"1 thread: {plan['bytes']:,} bytes or {plan['rows']} rows do not pay for a second"
