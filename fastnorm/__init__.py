"""fastnorm: normalization layers on NumPy arrays, fast and right for every finite input.

- norms of rows: layer_norm, rms_norm, add_layer_norm, add_rms_norm, adaptive_layer_norm,
  parallel_layer_norm, segment_layer_norm, segment_rms_norm; moments
- of channels: batch_norm, group_norm, instance_norm, adaptive_instance_norm
- of weights: weight_norm, spectral_norm, unit_norm
- gradients: the same names with _backward
- modules: LayerNorm, LayerNorm2d, RMSNorm, BatchNorm, GroupNorm, InstanceNorm, WeightNorm,
  SpectralNorm; load_norm makes one of what torch, Keras, Flax or ONNX have saved
- around batch norm: BatchStatistics, fold_batch_norm, fold_into_conv, fold_into_linear,
  convert_momentum, convert_running_var
- what runs, and on what: explain, show_config, num_threads, set_pool_limit, empty
- reference: the same functions in float64 NumPy
"""

import importlib
from typing import TYPE_CHECKING, Any

try:
    from . import _core, dispatch, threads
except ImportError as error:
    from importlib.util import find_spec

    if find_spec("._core", __name__) is None:
        raise ImportError(
            f"fastnorm: got its sources ({__path__[0]}), in which nothing is compiled, wanted what "
            "was installed: run Python from another folder (and `pip install .` in this one first)"
        ) from error
    raise
from ._core import (
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    layer_norm_backward,
    moments,
    rms_norm,
    rms_norm_backward,
)
from ._version import __version__
from .config import show_config
from .explanation import Explanation, explain
from .fused import (
    adaptive_layer_norm,
    adaptive_layer_norm_backward,
    add_layer_norm_backward,
    add_rms_norm_backward,
    parallel_layer_norm,
    segment_layer_norm,
    segment_layer_norm_backward,
    segment_rms_norm,
    segment_rms_norm_backward,
)
from .memory import empty, set_pool_limit
from .modules import LayerNorm, LayerNorm2d, RMSNorm
from .threads import get_num_threads, num_threads, set_num_threads

if TYPE_CHECKING:
    from . import reference
    from .batch_statistics import (
        BatchStatistics,
    )
    from .channels import (
        adaptive_instance_norm,
        batch_norm,
        batch_norm_backward,
        group_norm,
        group_norm_backward,
        instance_norm,
        instance_norm_backward,
    )
    from .dialects import (
        convert_momentum,
        convert_running_var,
        fold_batch_norm,
        fold_into_conv,
        fold_into_linear,
    )
    from .loading import (
        load_norm,
    )
    from .modules_channels import (
        BatchNorm,
        GroupNorm,
        InstanceNorm,
    )
    from .modules_weights import (
        SpectralNorm,
        WeightNorm,
    )
    from .weights import (
        spectral_norm,
        spectral_norm_backward,
        unit_norm,
        unit_norm_backward,
        weight_norm,
        weight_norm_backward,
    )

threads.configure()

# What not every process uses, and not every import pays for: loaded when it is first asked for.
_LATER = {
    name: module
    for module, names in {
        ".batch_statistics": "BatchStatistics",
        ".channels": (
            "adaptive_instance_norm batch_norm batch_norm_backward group_norm group_norm_backward "
            "instance_norm instance_norm_backward"
        ),
        ".dialects": (
            "convert_momentum convert_running_var fold_batch_norm fold_into_conv fold_into_linear"
        ),
        ".loading": "load_norm",
        ".modules_channels": "BatchNorm GroupNorm InstanceNorm",
        ".modules_weights": "SpectralNorm WeightNorm",
        ".weights": (
            "spectral_norm spectral_norm_backward unit_norm unit_norm_backward weight_norm "
            "weight_norm_backward"
        ),
    }.items()
    for name in names.split()
}

__all__ = [
    "BatchNorm",
    "BatchStatistics",
    "Explanation",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "LayerNorm2d",
    "RMSNorm",
    "SpectralNorm",
    "WeightNorm",
    "__version__",
    "adaptive_instance_norm",
    "adaptive_layer_norm",
    "adaptive_layer_norm_backward",
    "add_layer_norm",
    "add_layer_norm_backward",
    "add_rms_norm",
    "add_rms_norm_backward",
    "batch_norm",
    "batch_norm_backward",
    "convert_momentum",
    "convert_running_var",
    "empty",
    "explain",
    "fold_batch_norm",
    "fold_into_conv",
    "fold_into_linear",
    "get_num_threads",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "load_norm",
    "moments",
    "num_threads",
    "parallel_layer_norm",
    "reference",
    "rms_norm",
    "rms_norm_backward",
    "segment_layer_norm",
    "segment_layer_norm_backward",
    "segment_rms_norm",
    "segment_rms_norm_backward",
    "set_num_threads",
    "set_pool_limit",
    "show_config",
    "spectral_norm",
    "spectral_norm_backward",
    "unit_norm",
    "unit_norm_backward",
    "weight_norm",
    "weight_norm_backward",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name == "reference":
        return importlib.import_module(".reference", __name__)
    if name in _LATER:
        value = getattr(importlib.import_module(_LATER[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastnorm' has no attribute {name!r}")
