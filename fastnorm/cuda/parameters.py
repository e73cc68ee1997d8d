"""A module's parameters on devices: copies, made when they are first wanted there."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from .. import _cuda, interop

#: By parameter's name, library and device: the bytes that were copied, and the copy.
Copies = dict[tuple[str, str, int], tuple[bytes, Any]]


def beside(copies: Copies, name: str, parameter: np.ndarray, x: Any) -> Any:
    """`parameter` as an array of x's library on x's device: the kept copy, while it is true.

    The parameter's bytes are compared at each call, so that changes in place are noticed.
    """
    array = _cuda.describe("x", x)
    key, content = (name, array.kind, array.device), parameter.tobytes()
    kept = copies.get(key)
    if kept is None or kept[0] != content:
        kept = copies[key] = content, _copied(parameter, x, array.kind, array.device)
    return kept[1]


def _copied(parameter: np.ndarray, x: Any, kind: str, device: int) -> Any:
    """A copy that every stream may read."""
    if kind == "torch":
        return interop.from_ndarray(parameter).to(x.device)
    if interop.is_bfloat16(parameter.dtype):  # which the others may not know
        parameter = parameter.astype(np.float32)
    if kind == "cupy":
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(device):
            copy = cupy.asarray(parameter)
            cupy.cuda.get_current_stream().synchronize()
        return copy
    if kind == "numba":
        cuda = sys.modules["numba.cuda"]
        with cuda.gpus[device]:
            return cuda.to_device(parameter)
    raise TypeError(
        f"x: got a {type(x).__name__}, wanted an array of torch, CuPy or Numba, with which the "
        "module's parameters can be brought to its device; or call the function with parameters "
        "that are there"
    )
