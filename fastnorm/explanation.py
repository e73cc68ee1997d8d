"""What a call would do, and why: explain."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

from . import _core, interop, module_state
from .dispatch import CALLS


class Explanation(NamedTuple):
    """What a call would do, and why; ``str()`` of it is meant to be read.

    Attributes
    ----------
    op, backend : str
        The op's name; "cpu", or the CUDA device.
    isa : str
        The instruction set, or the device's architecture.
    threads : int
        How many share the call; on a device, those of a block.
    regime : str
        How the kernel goes through the rows, or which kernel it is; `reasons` says more.
    stream : bool
        Whether the output is written past the cache.
    dtype : str
        x's type.
    rows, cols : int
        How many rows (units, vectors) there are, and how many elements each has.
    copies, reasons : tuple of str
        Each copy that would be made of an array of x's size, and why; why all else is so.
    """

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


# As parallel.c names them and op_layer_norm.h and op_layer_norm_backward.h have them.
_REGIMES = {
    "narrow": "narrow: rows of at most four vectors go eight at a time, in registers",
    "group": "group: rows go two or four at a time and share what is loaded of the parameters",
    "row": "row: rows go one at a time",
    "columns": "columns: rows lie side by side, and go as many at a time as a vector holds",
    "planes": "planes: a unit at a time, statistics first; its planes lie as the kernels want them",
    "channels last": "channels last: a sample at a time; sums run down blocks of its rows",
    "stream": "stream: the output is large and its pages exist, so it is written past the cache",
}


def explain(op: Any, *args: Any, **kwargs: Any) -> Explanation:
    """What ``op(*args, **kwargs)`` would do on this machine; nothing is computed.

    Parameters
    ----------
    op : function, str or module
        One of fastnorm's norms, or its name: ``fastnorm.explain("layer_norm", x)``; or a module of
        one, whose call ``norm(x, out=None)`` it then is. (Not a weight's.)
    *args, **kwargs
        The arguments of the call.

    Returns
    -------
    Explanation
        Backend, instruction set, threads, regime, each copy of an array of x's size that would be
        made, and the reasons. What is small is converted without a word. For arrays in CUDA memory:
        the device, its architecture, threads of a block, and the kernel.

    Raises
    ------
    ValueError
        If `op` is none of fastnorm's ops or modules. Else what the call itself would raise.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> plan = fastnorm.explain(fastnorm.LayerNorm2d(3), np.ones((2, 3, 8, 8), np.float32))
    >>> plan.op, plan.rows, plan.cols, plan.regime, plan.copies
    ('layer_norm', 128, 3, 'columns', ())
    """
    if isinstance(op, module_state.State) and hasattr(op, "_as_op"):
        given = inspect.signature(op._as_op).bind(*args, **kwargs)  # whose errors name no method
        name, kwargs = op._as_op(*given.args, **given.kwargs)
        args = ()
    else:
        name = _name_of(op)
    bound = inspect.signature(_public(name)).bind(*args, **kwargs)
    bound.apply_defaults()
    main = next(key for key in ("x", "sum", "v") if key in bound.arguments)
    if interop.is_on_cuda(bound.arguments[main]) and name not in _of("weights"):
        cuda = importlib.import_module(".cuda", __package__)
        return Explanation(**cuda.explain(name, bound.arguments))
    call = _checked(name, bound.arguments)
    plan = call.plan()
    return Explanation(
        op=name,
        backend="cpu",
        isa=_core.isa_active(),
        threads=plan["threads"],
        regime=plan["regime"],
        stream=plan["stream"],
        dtype="bfloat16" if interop.is_bfloat16(call.dtype) else call.dtype.name,
        rows=plan["rows"] * plan.get("parts", 1),
        cols=plan["cols"],
        copies=tuple(call.copies),
        reasons=tuple(_reasons(plan)),
    )


def _name_of(op: Any) -> str:
    name = op if isinstance(op, str) else getattr(op, "__name__", None)
    known = {**CALLS, **_of("channels"), **_of("weights")}
    if isinstance(name, str) and name in known and (op == name or op is _public(name)):
        return name
    raise ValueError(f"op: got {op!r}, wanted one of: {', '.join(known)}")


def _of(family: str) -> dict[str, Any]:
    """The calls of ops that not every process loads, by name."""
    calls: dict[str, Any] = importlib.import_module(f".{family}", __package__).CALLS
    return calls


def _public(name: str) -> Any:
    """The function that users call."""
    return getattr(importlib.import_module(__package__), name)


def _checked(name: str, arguments: dict[str, Any]) -> Any:
    """The call that the op would make of these arguments, explained."""
    converted = {key: interop.convert(key, value) for key, value in arguments.items()}
    make = {**CALLS, **_of("channels"), **_of("weights")}[name]
    call = make(**converted, explained=True)
    if interop.is_packed("mask", arguments.get("mask")):
        call.copies.append("mask is copied: Arrow packs booleans into bits")
    return call


def _reasons(plan: dict[str, Any]) -> Iterator[str]:
    parts = plan.get("parts", 1)
    if parts > 1:
        yield f"{parts} parts of {plan['rows']} rows: one after another, as their parameters differ"
    yield _REGIMES[plan["regime"]]
    yield _why_threads(plan)


def _why_threads(plan: dict[str, Any]) -> str:
    if plan["threads"] > 1:
        return f"{plan['threads']} threads: the call moves {plan['bytes']:,} bytes"
    if _core.threads()["max"] == 1:
        return "1 thread: no more are allowed here (see fastnorm.show_config())"
    return f"1 thread: {plan['bytes']:,} bytes or {plan['rows']} rows do not pay for a second"
