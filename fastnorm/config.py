"""What was built, and what was found on this machine."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from typing import Any

import numpy as np

from . import _core
from ._version import __version__


def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Say what was built and what was found: instruction sets, OpenMP, threads, CUDA devices.

    Where there is a CUDA driver, it is started to be asked: processes that are forked from this one
    afterwards cannot use CUDA.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print it, or return it.

    Returns
    -------
    dict or None
        With "dicts", nested dicts of plain values; what does not apply is None.

    Raises
    ------
    ValueError
        For another mode.
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode: got {mode!r}, wanted 'stdout' or 'dicts'")
    config = {
        "version": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": f"{sys.platform} {platform.machine()}",
        "isa": _isa(),
        "openmp": _core.openmp(),
        "threads": _core.threads(),
        "pool_bytes": _core.pool(),
        "ops": [*_core.OPS, *_later_ops()],
        "dtypes": list(_core.DTYPES),
        "cuda": importlib.import_module(".cuda", __package__).config(),
    }
    if mode == "dicts":
        return config
    _print(config, 0)
    return None


def _later_ops() -> list[str]:
    """The ops that are loaded when they are first asked for."""
    later = importlib.import_module(__package__)._LATER
    return [name for name, module in later.items() if module in (".channels", ".weights")]


def _isa() -> dict[str, Any]:
    names = _core.isa_names()
    supported = [name for name in names if _core.isa_supported(name)]
    active, asked = _core.isa_active(), os.environ.get("FASTNORM_ISA")
    if asked == active:
        why = f"FASTNORM_ISA={asked}"
    elif active == supported[0]:
        why = "the best that this CPU and its operating system support"
    else:
        why = "selected by the program"
    return {"compiled": list(names), "supported": supported, "active": active, "why": why}


def _print(values: dict[str, Any], indent: int) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            print(f"{'':{indent}}{name}:")
            _print(value, indent + 2)
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            print(f"{'':{indent}}{name}: {text}")
