"""From a spec to a kernel that is loaded on a device: kept, else from disk, else compiled."""

from __future__ import annotations

import importlib
import threading
from typing import TYPE_CHECKING, Any

from .. import _cuda
from . import cache, compiler, plan

if TYPE_CHECKING:
    from .by_numba import Launcher

_lock = threading.Lock()
#: What is loaded, by spec and device; and what is being loaded just now.
_kernels: dict[tuple[plan.Spec, int], Any] = {}
_loading: dict[tuple[plan.Spec, int], threading.Lock] = {}
#: Numba's launcher, where it has taken the driver's place.
_numba: Launcher | None = None


def start() -> None:
    """Have a driver; where none can be loaded here but Numba has one, have Numba launch.

    Raises
    ------
    RuntimeError
        If there is neither, or it does not work; one sentence.
    """
    global _numba
    if _numba is not None:
        return
    try:
        _cuda.load()
    except _cuda.DriverError as error:
        # 0: there is no library of that name. A driver that fails would fail Numba too.
        launcher = None if error.code else importlib.import_module(".by_numba", __package__).find()
        if launcher is None:
            raise
        _cuda.set_substitute(launcher)
        _numba = launcher


def devices() -> list[plan.Device]:
    """The devices there are."""
    start()
    found = _cuda.devices() if _numba is None else _numba.devices()
    return [plan.Device(*each) for each in found]


def kernel(spec: plan.Spec, device: int) -> Any:
    """The spec's kernel, loaded on the device with this ordinal; made once, whoever asks.

    Raises
    ------
    RuntimeError
        If it cannot be compiled or loaded.
    """
    key = (spec, device)
    if key in _kernels:
        return _kernels[key]
    with _lock:
        loading = _loading.setdefault(key, threading.Lock())
    with loading:
        if key not in _kernels:
            start()
            _kernels[key] = _loaded(spec, device) if _numba is None else _numba.kernel(spec, device)
    with _lock:
        _loading.pop(key, None)
    return _kernels[key]


def clear() -> None:
    """Unload all kernels that no kept call holds."""
    _kernels.clear()


def _loaded(spec: plan.Spec, device: int) -> _cuda.Kernel:
    capability = _cuda.devices()[device][2]
    layout = plan.layout(spec)
    what = cache.describe(spec, capability, compiler.source_hash(), compiler.versions())
    kept = cache.read(what)
    if kept is not None:
        try:
            return _cuda.Kernel(device, kept.code, kept.entry, layout)
        except _cuda.DriverError:
            # An older driver, say, than the one it was compiled for. If a new one fails too, that
            # is the error to show.
            cache.forget(what)
    image = compiler.compile(spec, capability)
    loaded = _cuda.Kernel(device, image.code, image.entry, layout)
    cache.write(what, image)
    return loaded
