"""Numba's own launcher, for machines where Numba finds a driver that we do not.

The kernels are the same; a launch takes Numba some 30 to 100 us of the host's time. Streams are
ordered as elsewhere, by events: nothing here waits for the device either.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import compiler, plan


def find() -> Launcher | None:
    """The launcher, if Numba is installed and has a driver with a device."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        cuda = importlib.import_module("numba.cuda")
        return Launcher(cuda) if cuda.is_available() else None
    except Exception:  # of a Numba that is broken or set up wrongly, as its driver's path may be
        return None


class Launcher:
    """What _cuda.set_substitute and launch.py ask for."""

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda

    def devices(self) -> list[tuple[int, str, tuple[int, int], int]]:
        """As _cuda.devices."""
        return [
            (i, _text(gpu.name), tuple(gpu.compute_capability), gpu.MULTIPROCESSOR_COUNT)
            for i, gpu in enumerate(self.cuda.gpus)
        ]

    def stream(self, handle: int) -> Any:
        """Numba's object for a stream that somebody else made."""
        return self.cuda.external_stream(handle) if handle else self.cuda.default_stream()

    def order(self, waiting: int, awaited: int) -> None:
        """Let a stream go on after what another one has been given so far."""
        event = self.cuda.event(timing=False)
        event.record(self.stream(awaited))
        event.wait(self.stream(waiting))

    def room(self, nbytes: int, device: int, stream: int) -> tuple[Any, int]:
        """Memory for the kernels of a call: what keeps it, and its address."""
        with self.cuda.gpus[device]:
            made = self.cuda.device_array(nbytes, np.uint8, stream=self.stream(stream))
        return made, made.device_ctypes_pointer.value

    def kernel(self, spec: plan.Spec, device: int) -> Kernel:
        """The spec, compiled by Numba for its own launcher."""
        function, signature, registers = source_of(spec)
        with self.cuda.gpus[device], warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = self.cuda.jit(signature, max_registers=registers)(function)
        return Kernel(self, device, compiled, signature)


def source_of(spec: plan.Spec) -> tuple[Any, tuple[Any, ...], int]:
    """The kernel for Numba to compile, its arguments' types, and a thread's most registers."""
    kernels = importlib.import_module(".kernels", __package__)
    threads = spec.threads * spec.rows * plan.resident_blocks(spec)
    registers = min(compiler.REGISTERS // threads, 255)
    name = compiler.entry_name(spec)
    return kernels.kernel(spec, name), kernels.signature(spec), registers


class Kernel:
    """A kernel whose `launch` takes what that of _cuda.Kernel does."""

    def __init__(self, launcher: Launcher, device: int, compiled: Any, signature: Any) -> None:
        self.launcher, self.device, self.compiled = launcher, device, compiled
        as_dtype = importlib.import_module("numba.np.numpy_support").as_dtype
        #: Of each argument: its elements' type, or None for a number.
        self.dtypes = [
            as_dtype(kind.dtype) if hasattr(kind, "dtype") else None for kind in signature
        ]

    def launch(self, grid: int, block: int, shared: int, stream: int, args: Sequence[Any]) -> None:
        with self.launcher.cuda.gpus[self.device]:
            placed = [
                arg if dtype is None else self.array(arg, dtype)
                for arg, dtype in zip(args, self.dtypes, strict=True)
            ]
            self.configured(grid, block, self.launcher.stream(stream), shared)(*placed)

    def configured(self, *how: Any) -> Any:
        # Numba warns of small grids, which the caller cannot help.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.compiled[how]

    def array(self, arg: tuple[int, int, int] | None, dtype: Any) -> Any:
        address, size, _ = arg or (0, 0, 0)
        return self.launcher.cuda.as_cuda_array(_Memory(address, size, dtype), sync=False)


class _Memory:
    """Memory by its address, as Numba takes it."""

    def __init__(self, address: int, size: int, dtype: Any) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (size,),
            "typestr": dtype.str,
            "data": (address, False),
            "strides": None,
            "stream": None,
        }


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
