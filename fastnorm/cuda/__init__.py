"""fastnorm's ops on arrays in CUDA memory. Imported when the first such array arrives.

Nothing here loads the driver or a compiler before a call needs it.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping
from typing import Any

from .. import _cuda
from . import compiler, launch, ops

__all__ = ["is_available", "why_not"]


def why_not() -> str:
    """Why calls on CUDA arrays cannot run here, in a sentence; empty where they can."""
    try:
        launch.start()
    except RuntimeError as error:
        return str(error)
    return compiler.available()


def is_available() -> bool:
    """Whether there are a CUDA driver, a device, and a compiler for its kernels."""
    return not why_not()


@functools.cache
def op(name: str) -> Any:
    """What takes the calls of op `name` whose main array lies on a device.

    Raises
    ------
    TypeError
        For an op that there is in host memory alone.
    RuntimeError
        If there is no driver, or it does not work.
    """
    names = ops.NAMES.get(name)
    if names is None:
        raise TypeError(
            f"{name}: got an array on a CUDA device, wanted arrays in host memory; the ops on CUDA "
            f"devices are {', '.join(ops.NAMES)}"
        )
    launch.start()
    made = functools.partial(
        _cuda.Op, name, names, functools.partial(ops.build, name),
        main=names.index("x" if "x" in names else "sum"),
    )  # fmt: skip
    results = [i for i, argument in enumerate(names) if argument in ("out", "sum_out")]
    running = [i for i, argument in enumerate(names) if argument.startswith("running_")]
    mode = {"batch_norm": "training", "instance_norm": "use_input_stats"}.get(name)
    if mode is None:
        return made(written=results)
    return _Modes(names.index(mode), made(written=results + running), made(written=results))


class _Modes:
    """An op that writes to more of its arguments in one mode than in the other."""

    def __init__(self, at: int, training: Any, inference: Any) -> None:
        self.at, self.ops = at, (inference, training)

    def __call__(self, *args: Any) -> Any:
        return self.ops[bool(args[self.at])](*args)

    def __len__(self) -> int:
        return sum(map(len, self.ops))

    def clear(self) -> None:
        for each in self.ops:
            each.clear()


def explain(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of fastnorm.Explanation for a call on CUDA arrays; nothing is compiled."""
    op(name)  # which says where this cannot be
    described = [
        _cuda.describe(key, arguments[key])
        if _cuda.is_device_array(arguments[key])
        else arguments[key]
        for key in ops.NAMES[name]
    ]
    call = ops.checked(name, described)
    device = launch.devices()[call.device]
    return {
        "op": name,
        "backend": f"cuda:{call.device}",
        "isa": "sm_{}{}".format(*device.capability),
        "threads": max([step.block for step in call.plan.steps], default=0),
        "regime": call.plan.kernel,
        "stream": False,
        "dtype": call.type,
        "rows": call.rows,
        "cols": call.cols,
        "copies": (),
        "reasons": tuple(ops.reasons(call)),
    }


def config() -> dict[str, Any]:
    """What fastnorm.show_config says of CUDA; nothing is compiled for it."""
    try:
        launch.start()
        why = compiler.missing()
    except RuntimeError as error:
        why = str(error)
    try:
        version = _cuda.driver_version()
        driver = f"{version // 1000}.{version % 1000 // 10}"
    except _cuda.DriverError:
        driver = None
    try:
        found = launch.devices()
    except RuntimeError:
        found = []
    devices = [
        "{}: {}, sm_{}{}, {} multiprocessors".format(
            each.ordinal, each.name, *each.capability, each.multiprocessors
        )
        for each in found
    ]
    compilers = {name: _version(name) for name in ("numba", "numba-cuda")}
    return {
        "available": not why, "why_not": why or None, "driver": driver, "devices": devices,
        **compilers,
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
