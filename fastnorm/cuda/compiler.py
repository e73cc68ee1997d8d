"""A spec compiled to what a driver loads, by whichever Numba there is.

Numba's CUDA target comes in two packages: `numba-cuda`, which takes the place of the one inside
Numba, and that one, which is used where the first is not installed. No driver is asked for
anything: kernels can be compiled where there is none.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from . import plan

_SOURCES = ("plan", "ptx", "rows", "operands", "activation", "forward", "backward",
            "channel_kernels", "kernels", "compiler")  # fmt: skip
#: bfloat16 is converted by instructions that came with it.
LEAST_CAPABILITY = (8, 0)
#: Of a multiprocessor.
REGISTERS = 65536
_LOST = "row_stack"
_lock = threading.RLock()


class Image(NamedTuple):
    """What a driver loads: a cubin, or PTX with a 0 at its end."""

    code: bytes
    entry: str
    kind: str
    info: dict[str, Any]


# ---- which Numba ---------------------------------------------------------------------------------


@functools.cache
def source_hash() -> str:
    """Of the sources that kernels follow from."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    names = ("numba", "numba-cuda", "llvmlite", "numpy", "nvidia-nvvm", "nvidia-cuda-nvcc-cu12",
             "nvidia-nvjitlink")  # fmt: skip
    found = []
    for name in names:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append((name, ""))
    return tuple(found)


def versions() -> dict[str, str]:
    """Of all packages that have a hand in compiling; "" is not installed. Imports none of them."""
    return dict(_versions())


def available() -> str:
    """Why no kernel can be compiled, in a sentence; empty where one can."""
    with _lock:
        return _available()


def missing() -> str:
    """Which package is missing, in a sentence; empty where none is. Imports nothing."""
    if importlib.util.find_spec("numba") is None:
        return (
            "numba, which compiles the kernels, is not installed: "
            "pip install 'fastnorm-kernels[cuda13]', or [cuda12] for drivers older than 13"
        )
    return ""


@functools.cache
def _available() -> str:
    if why := missing():
        return why
    try:
        _numba()
        spec = plan.Spec("fill", (("array", "float32"),), "float32", 256, 1, 1, 1, 4, ("zero",))
        compile(spec, (9, 0))
    except Exception as error:
        reason = str(error).strip().splitlines()
        return (
            "numba cannot compile for CUDA here "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}): "
            "the packages of fastnorm-kernels[cuda13], or [cuda12], are wanted"
        )
    return ""


@functools.cache
def _numba() -> Any:
    """numba.cuda, made fit for the NumPy there is."""
    import numpy as np

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from numba import cuda

        # numba-cuda registers np.row_stack, which NumPy 2.5 no longer has. Numba's own target has
        # no such module and needs nothing.
        if not hasattr(np, _LOST):
            setattr(np, _LOST, np.vstack)
            try:
                with suppress(ModuleNotFoundError):
                    importlib.import_module("numba.cuda.np.arrayobj")
            finally:
                delattr(np, _LOST)
    return cuda


@contextmanager
def _no_device(capability: tuple[int, int]) -> Iterator[None]:
    """Numba's own target asks the current device what to compile inlined functions for."""
    try:
        dispatcher: Any = importlib.import_module("numba.cuda.dispatcher")
        asked = dispatcher.get_current_device
    except (ImportError, AttributeError):
        yield
        return
    here = threading.get_ident()

    def device() -> Any:
        """What this thread compiles for; others may have devices, and compile for those."""
        if threading.get_ident() != here:
            return asked()
        return SimpleNamespace(compute_capability=capability)

    dispatcher.get_current_device = device
    try:
        yield
    finally:
        dispatcher.get_current_device = asked


# ---- compiling -----------------------------------------------------------------------------------


def compile(spec: plan.Spec, capability: tuple[int, int]) -> Image:
    """The spec's kernel for devices of this compute capability.

    Raises
    ------
    RuntimeError
        If it cannot be compiled: Numba's reason, in a sentence.
    """
    capability = (int(capability[0]), int(capability[1]))
    if capability < LEAST_CAPABILITY:
        raise RuntimeError(
            "device: got compute capability {}.{}, wanted {}.{} or newer".format(
                *capability, *LEAST_CAPABILITY
            )
        )
    with _lock:
        text = ptx_of(spec, capability)
    entry = entry_name(spec)
    linked = _linked(text, capability)
    if linked is not None:
        return Image(linked[0], entry, "cubin", {"spec": repr(spec), "log": linked[1]})
    return Image(text.encode() + b"\0", entry, "ptx", {"spec": repr(spec)})


def entry_name(spec: plan.Spec) -> str:
    """Of the kernel: it tells specs apart."""
    return f"fastnorm_{spec.kernel}_{hashlib.sha256(repr(spec).encode()).hexdigest()[:16]}"


def ptx_of(spec: plan.Spec, capability: tuple[int, int]) -> str:
    """The kernel as PTX."""
    cuda = _numba()
    from numba import types

    from . import kernels

    function = kernels.kernel(spec, entry_name(spec))
    with warnings.catch_warnings(), _no_device(capability):
        warnings.simplefilter("ignore")
        text, _ = cuda.compile(
            function, types.void(*kernels.signature(spec)), device=False, abi="numba",
            cc=capability, fastmath=False, output="ptx",
        )  # fmt: skip
    return _finished(text, spec)


def _finished(text: str, spec: plan.Spec) -> str:
    """The entry under our name, with what ptxas is to know of its launch: from how many threads
    there are, and how many blocks a multiprocessor shall hold, it knows its registers."""
    found = re.search(r"\.visible\s+\.entry\s+([\w$]+)\s*\([^)]*\)", text)
    if found is None:
        raise RuntimeError(f"kernel {spec.kernel}: Numba's PTX has no entry")
    block = spec.threads * spec.rows
    text = (
        text[: found.end()]
        + f"\n.maxntid {block}, 1, 1\n.minnctapersm {plan.resident_blocks(spec)}\n"
        + text[found.end() :]
    )
    return text.replace(found.group(1), entry_name(spec))


def _linked(text: str, capability: tuple[int, int]) -> tuple[bytes, str] | None:
    """A cubin, which any driver of the same generation loads; None where there is no linker."""
    try:
        nvjitlink = importlib.import_module("cuda.bindings.nvjitlink")
    except ImportError:
        return None
    options = ["-arch=sm_{}{}".format(*capability), "-verbose"]
    try:
        handle = nvjitlink.create(len(options), options)
        try:
            code = text.encode()
            nvjitlink.add_data(handle, nvjitlink.InputType.PTX, code, len(code), "kernel")
            nvjitlink.complete(handle)
            cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
            nvjitlink.get_linked_cubin(handle, cubin)
            log = bytearray(nvjitlink.get_info_log_size(handle))
            nvjitlink.get_info_log(handle, log)
        finally:
            nvjitlink.destroy(handle)
    except Exception:  # an older linker than the compiler, say; the driver has one of its own
        return None
    return bytes(cubin), bytes(log).rstrip(b"\0").decode(errors="replace")
