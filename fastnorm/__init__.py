"""fastnorm: normalization layers on NumPy arrays, fast and right for every finite input."""

import importlib

from . import _core, dispatch, threads
from ._core import layer_norm, layer_norm_backward, moments
from ._version import __version__
from .config import show_config
from .dispatch import Explanation, explain
from .memory import empty, set_pool_limit
from .modules import LayerNorm
from .threads import get_num_threads, num_threads, set_num_threads

threads.configure()

__all__ = [
    "Explanation",
    "LayerNorm",
    "__version__",
    "empty",
    "explain",
    "get_num_threads",
    "layer_norm",
    "layer_norm_backward",
    "moments",
    "num_threads",
    "reference",
    "set_num_threads",
    "set_pool_limit",
    "show_config",
]


def __getattr__(name: str) -> object:
    # The reference is for tests and readers: not every import pays for it.
    if name == "reference":
        return importlib.import_module(".reference", __name__)
    raise AttributeError(f"module 'fastnorm' has no attribute {name!r}")
