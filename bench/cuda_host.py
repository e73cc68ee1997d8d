"""What a call on device arrays costs the host: all but the driver's own work and the GPU's.

    python bench/cuda_host.py [--json FILE]

On a fake driver whose functions return at once, with arrays that stand for torch's, CuPy's and
those that have DLPack alone. Their attributes and methods are as cheap as C's, and new arrays are
not really made: what the libraries take for that is theirs. No GPU is needed; numba, gcc and
libnvvm (CUDA_HOME) are. fastnorm allows itself 5 µs.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

import fastnorm
from fastnorm import _cuda

DRIVER = Path(__file__).parents[1] / "tests" / "cuda" / "fake_driver.c"
ROWS, COLS = 32, 768
ADDRESS = 1 << 20


def always(value: Any) -> Callable[[], Any]:
    """A method in C that returns `value`."""
    return itertools.repeat(value).__next__


class Tensor:
    """torch's words for an array at an address."""

    is_cuda, requires_grad, is_nested, layout = True, False, False, "strided"

    def __init__(self, *shape: int) -> None:
        self.shape, self.dtype = shape, "torch.float32"
        self.is_neg, self.is_inference = always(False), always(False)
        self.stride = always(strides(shape))
        self.data_ptr, self.get_device = always(ADDRESS * math.prod(shape)), always(0)

    def new_empty(self, shape: Any, dtype: Any = None) -> Tensor:
        return RESULTS[len(shape)]


class ndarray:
    """CuPy's."""

    __cuda_array_interface__: Any = property(lambda self: {})

    def __new__(cls, *shape: Any) -> Any:
        if isinstance(shape[0], tuple):
            return NDARRAYS[len(shape[0])]
        self = object.__new__(cls)
        self.shape, self.dtype = shape, np.dtype("f4")
        self.strides = tuple(4 * s for s in strides(shape))
        self.data = SimpleNamespace(ptr=ADDRESS * math.prod(shape), device_id=0)
        return self


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p),
        ("offset", ctypes.c_uint64), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    )  # fmt: skip


_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


class Exporter:
    """DLPack's."""

    def __init__(self, *shape: int) -> None:
        self.lengths = (ctypes.c_int64 * len(shape))(*shape)
        self.tensor = _DLTensor(
            data=ADDRESS * math.prod(shape), device_type=2, ndim=len(shape), code=2, bits=32,
            lanes=1, shape=ctypes.addressof(self.lengths),
        )  # fmt: skip
        self.address = ctypes.addressof(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, stream: Any = None, max_version: Any = None) -> Any:
        return _capsule(self.address, b"dltensor", None)


def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def install() -> None:
    """The libraries, as if the caller had imported them."""
    torch: Any = ModuleType("torch")
    torch.Tensor, torch.strided, torch.float32 = Tensor, "strided", "torch.float32"
    torch.nn = SimpleNamespace(Parameter=type("Parameter", (Tensor,), {}))
    torch._C = SimpleNamespace(_cuda_getCurrentRawStream=lambda device: 0)
    torch.empty_like = lambda tensor: RESULTS[len(tensor.shape)]
    torch.autograd, torch.uint8, torch.dtype = (
        SimpleNamespace(),
        "torch.uint8",
        type("dtype", (), {}),
    )
    cupy: Any = ModuleType("cupy")
    stream = SimpleNamespace(ptr=0)
    cupy.ndarray = ndarray
    cupy.cuda = SimpleNamespace(get_current_stream=lambda device=0: stream)
    sys.modules |= {"torch": torch, "cupy": cupy}


RESULTS = {1: Tensor(COLS), 2: Tensor(ROWS, COLS)}
NDARRAYS = {1: ndarray(COLS), 2: ndarray(ROWS, COLS)}


def load_driver(folder: str) -> None:
    """A driver that records nothing."""
    path = Path(folder, "libcuda.so")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", DRIVER, "-o", path, "-lpthread"], check=True)
    _cuda.load(str(path))
    ctypes.CDLL(str(path)).fake_trace(0)


def calls(kind: Any) -> dict[str, Callable[[], Any]]:
    """Calls by name, on arrays of this kind."""
    x, w, b, mean, rstd = kind(ROWS, COLS), kind(COLS), kind(COLS), kind(ROWS), kind(ROWS)
    shape = (COLS,)
    found = {"layer_norm, out": lambda: fastnorm.layer_norm(x, shape, w, b, out=x)}
    if kind is not Exporter:
        found |= {
            "layer_norm": lambda: fastnorm.layer_norm(x, shape, w, b),
            "rms_norm": lambda: fastnorm.rms_norm(x, shape, w),
            "add_rms_norm": lambda: fastnorm.add_rms_norm(x, x, shape, w),
            "layer_norm_backward": lambda: fastnorm.layer_norm_backward(
                x, x, shape, mean, rstd, w, b
            ),
        }
    return found


def microseconds(call: Callable[[], Any], rounds: int = 15, count: int = 2000) -> float:
    """CPU time, which leaves out what other processes took; the least of all rounds."""
    call()
    timer = timeit.Timer(call, timer=time.process_time)
    return min(timer.repeat(rounds, count)) / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("FASTNORM_CACHE_DIR", folder)
        load_driver(folder)
        install()
        results = {
            f"{name}: {what}": microseconds(call)
            for name, kind in (("torch", Tensor), ("CuPy", ndarray), ("DLPack", Exporter))
            for what, call in calls(kind).items()
        }
        results["a DLPack capsule, made and dropped"] = microseconds(Exporter(COLS).__dlpack__)
    for name, value in results.items():
        print(f"{name:40} {value:6.2f} µs")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
