"""Types of _core.pyx."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Array: TypeAlias = NDArray[Any]
# What numpy.asarray takes, and tensors of torch and what offers DLPack or Arrow's interface.
_Input: TypeAlias = Any
# An ndarray, a tensor where the input is one, or a tuple of them as the arguments ask for it.
_Result: TypeAlias = Any
_Shape: TypeAlias = SupportsIndex | Sequence[SupportsIndex] | None
_Axis: TypeAlias = SupportsIndex | Sequence[SupportsIndex] | None
_Activation: TypeAlias = Literal["relu", "silu", "gelu", "gelu_tanh"] | None

OPS: tuple[str, ...]
STRAIGHT: tuple[str, ...]
DTYPES: tuple[str, ...]
COMPUTE_DTYPES: tuple[str, ...]

# ---- the ops -------------------------------------------------------------------------------------

def layer_norm(
    x: _Input,
    normalized_shape: _Shape = None,
    weight: _Input | None = None,
    bias: _Input | None = None,
    eps: float = 1e-5,
    *,
    axis: _Axis = None,
    out: _Input | None = None,
    dtype: Any = None,
    return_stats: bool = False,
    activation: _Activation = None,
    lengths: _Input | None = None,
    mask: _Input | None = None,
) -> _Result: ...
def layer_norm_backward(
    dy: _Input,
    x: _Input,
    normalized_shape: _Shape,
    mean: _Input | None,
    rstd: _Input,
    weight: _Input | None = None,
    bias: _Input | None = None,
    *,
    axis: _Axis = None,
    output_mask: Sequence[bool] = (True, True, True),
    from_output: bool = False,
    lengths: _Input | None = None,
    mask: _Input | None = None,
) -> tuple[_Result, _Result, _Result]: ...
def rms_norm(
    x: _Input,
    normalized_shape: _Shape = None,
    weight: _Input | None = None,
    eps: float | None = None,
    *,
    axis: _Axis = None,
    out: _Input | None = None,
    dtype: Any = None,
    offset: float = 0.0,
    round_before_weight: bool = False,
    return_stats: bool = False,
    activation: _Activation = None,
    lengths: _Input | None = None,
    mask: _Input | None = None,
) -> _Result: ...
def rms_norm_backward(
    dy: _Input,
    x: _Input,
    normalized_shape: _Shape,
    rstd: _Input,
    weight: _Input | None = None,
    *,
    axis: _Axis = None,
    offset: float = 0.0,
    output_mask: Sequence[bool] = (True, True),
    from_output: bool = False,
    lengths: _Input | None = None,
    mask: _Input | None = None,
) -> tuple[_Result, _Result]: ...
def add_layer_norm(
    x: _Input,
    residual: _Input,
    normalized_shape: _Shape = None,
    weight: _Input | None = None,
    bias: _Input | None = None,
    eps: float = 1e-5,
    *,
    axis: _Axis = None,
    out: _Input | None = None,
    sum_out: _Input | None = None,
    dtype: Any = None,
    linear_bias: _Input | None = None,
    round_sum: bool = True,
    return_stats: bool = False,
    activation: _Activation = None,
) -> tuple[_Result, ...]: ...
def add_rms_norm(
    x: _Input,
    residual: _Input,
    normalized_shape: _Shape = None,
    weight: _Input | None = None,
    eps: float | None = None,
    *,
    axis: _Axis = None,
    out: _Input | None = None,
    sum_out: _Input | None = None,
    dtype: Any = None,
    linear_bias: _Input | None = None,
    offset: float = 0.0,
    round_before_weight: bool = False,
    round_sum: bool = True,
    return_stats: bool = False,
    activation: _Activation = None,
) -> tuple[_Result, ...]: ...
def moments(x: _Input, axis: _Axis = None) -> tuple[_Result, _Result]: ...

class BoundNorm:
    @property
    def normalized_shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __init__(
        self,
        normalized_shape: tuple[int, ...],
        eps: float | None,
        dtype: np.dtype[Any],
        *,
        rms: bool = False,
        offset: float = 0.0,
        round_before_weight: bool = False,
    ) -> None: ...
    def __call__(self, x: _Input, out: _Input | None = None) -> _Result: ...
    def _set(self, name: str, value: Any) -> None: ...
    def _get(self, name: str) -> Any: ...

# ---- the kernels on checked arrays ---------------------------------------------------------------
# With plan=True these return what would be done, as a dict; otherwise None. `compute` is the type
# that is computed in, `lead` the number of axes of rows.

def register(name: str, handler: Callable[..., Any]) -> None: ...
def register_names(types: Sequence[np.dtype[Any]], activations: dict[str | None, int]) -> None: ...
def straight_segments(
    x: _Input,
    offsets: _Input,
    weight: _Input | None,
    bias: _Input | None,
    eps: float | None,
    activation: Any,
    rms: bool,
    offset: float,
) -> _Array | None: ...
def straight_adaptive(
    x: _Input,
    scale: _Input,
    shift: _Input | None,
    normalized_shape: _Shape,
    eps: float,
    out: _Input | None,
    dtype: Any,
    return_stats: bool,
    activation: Any,
) -> _Result | None: ...
def set_bfloat16(dtype: np.dtype[Any]) -> None: ...
def norm_rows(
    lead: int,
    compute: np.dtype[Any],
    x: _Array,
    outputs: list[tuple[_Array | None, _Array | None, _Array, _Array | None]],
    eps: float,
    *,
    rms: bool = False,
    gate: _Array | None = None,
    linear_bias: _Array | None = None,
    residual: _Array | None = None,
    total: _Array | None = None,
    round_sum: bool = True,
    offset: float = 0.0,
    round_before_weight: bool = False,
    activation: int = 0,
    lengths: _Array | None = None,
    mask: _Array | None = None,
    mean: _Array | None = None,
    rstd: _Array | None = None,
    warm: bool = False,
    plan: bool = False,
) -> Any: ...
def norm_backward_rows(
    lead: int,
    compute: np.dtype[Any],
    dy: _Array,
    x: _Array,
    dx: _Array | None,
    weight: _Array | None,
    bias: _Array | None,
    mean: _Array | None,
    rstd: _Array,
    dweight: _Array | None,
    dbias: _Array | None,
    *,
    rms: bool = False,
    offset: float = 0.0,
    from_output: bool = False,
    lengths: _Array | None = None,
    mask: _Array | None = None,
    warm: bool = False,
    plan: bool = False,
) -> Any: ...
def norm_segments(
    compute: np.dtype[Any],
    x: _Array,
    starts: _Array,
    longest: int,
    weight: _Array | None,
    bias: _Array | None,
    y: _Array,
    scale: _Array | None,
    eps: float,
    *,
    rms: bool = False,
    offset: float = 0.0,
    activation: int = 0,
    mean: _Array | None = None,
    rstd: _Array | None = None,
    warm: bool = False,
    plan: bool = False,
) -> Any: ...
def norm_segments_backward(
    compute: np.dtype[Any],
    dy: _Array,
    x: _Array,
    dx: _Array | None,
    starts: _Array,
    longest: int,
    weight: _Array | None,
    mean: _Array | None,
    rstd: _Array,
    dweight: _Array | None,
    dbias: _Array | None,
    param_cols: int,
    *,
    rms: bool = False,
    offset: float = 0.0,
    plan: bool = False,
) -> Any: ...
def moments_rows(
    lead: int,
    compute: np.dtype[Any],
    x: _Array,
    mean: _Array | None,
    variance: _Array | None,
    plan: bool = False,
) -> Any: ...

# ---- arrays with channels ------------------------------------------------------------------------

def channel_norm(
    layout: tuple[int, ...],
    compute: np.dtype[Any],
    x: _Array,
    y: _Array,
    weight: _Array | None,
    bias: _Array | None,
    mean: _Array,
    variance: _Array | None,
    rstd: _Array,
    refused: _Array | None,
    eps: float,
    activation: int,
    warm: bool,
    *,
    plan: bool = False,
) -> Any: ...
def channel_norm_backward(
    layout: tuple[int, ...],
    compute: np.dtype[Any],
    dy: _Array,
    x: _Array,
    dx: _Array | None,
    weight: _Array | None,
    mean: _Array,
    rstd: _Array,
    sums: _Array,
    refused: _Array,
    given: bool,
    warm: bool,
    *,
    plan: bool = False,
) -> Any: ...
def channels_last_moments(x: _Array, rows: int, compute: np.dtype[Any]) -> _Array: ...
def plane_moments(x: _Array) -> _Array: ...
def total_over_samples(sums: _Array, compute: np.dtype[Any]) -> tuple[_Array, _Array]: ...
def update_running(running: _Array, batch: _Array, kept: float, taken: float) -> None: ...
def register_careful(function: Callable[..., None]) -> None: ...
def straight_channel_norm(
    x: _Input,
    groups: int,
    weight: _Input | None,
    bias: _Input | None,
    eps: float,
    out: _Input | None,
    activation: Any,
    last: bool,
    return_stats: bool,
) -> _Array | tuple[_Array, _Array, _Array] | None: ...
def straight_batch_inference(
    x: _Input,
    running_mean: _Input,
    running_var: _Input,
    weight: _Input | None,
    bias: _Input | None,
    eps: float,
    out: _Input | None,
    activation: Any,
    last: bool,
) -> _Array | None: ...
def straight_batch_training(
    x: _Input,
    running_mean: _Input | None,
    running_var: _Input | None,
    weight: _Input | None,
    bias: _Input | None,
    momentum: float,
    eps: float,
    out: _Input | None,
    activation: Any,
    last: bool,
    rules: Any,
    return_stats: bool,
) -> _Array | tuple[_Array, _Array, _Array] | None: ...
def straight_channel_backward(
    dy: _Input,
    x: _Input,
    groups: int,
    mean: _Input,
    rstd: _Input,
    weight: _Input | None,
    bias: _Input | None,
    output_mask: Sequence[bool],
    last: bool,
    batch: bool,
    running_var: _Input | None = None,
    eps: float = 0.0,
) -> tuple[_Array | None, _Array | None, _Array | None] | None: ...

# ---- norms of weights ----------------------------------------------------------------------------

def weight_norm(
    layout: tuple[int, ...],
    compute: np.dtype[Any],
    v: _Array,
    w: _Array | None,
    g: _Array | None,
    eps: float,
    norm: _Array,
    refused: _Array,
    dw: _Array | None = None,
    along: _Array | None = None,
    *,
    given: bool = False,
    warm: bool = False,
    plan: bool = False,
) -> Any: ...
def register_careful_vectors(function: Callable[..., None]) -> None: ...
def straight_weight_norm(
    v: _Input, g: _Input, dim: int | None, out: _Input | None, return_stats: bool
) -> Any: ...
def straight_unit_norm(
    x: _Input, axis: _Axis, eps: float, out: _Input | None, return_stats: bool
) -> Any: ...
def straight_weight_norm_backward(
    dw: _Input,
    v: _Input,
    g: _Input,
    dim: int | None,
    norm: _Input | None,
    output_mask: Sequence[bool],
) -> tuple[_Array | None, _Array | None] | None: ...
def straight_unit_norm_backward(
    dy: _Input, x: _Input, axis: _Axis, eps: float, norm: _Input | None
) -> _Array | None: ...

# ---- the machine ---------------------------------------------------------------------------------

def isa_names() -> tuple[str, ...]: ...
def isa_supported(name: str) -> bool: ...
def isa_active() -> str: ...
def select_isa(name: str | None = None) -> None: ...
def threads() -> dict[str, int | None]: ...
def set_requested_threads(count: int) -> None: ...
def set_cpu_quota(cpus: int) -> None: ...
def openmp() -> bool: ...
def force_partition(parts: int) -> None: ...
def use_bf16_instructions(use: bool) -> bool: ...
def new_result(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[_Array, bool]: ...
def would_be_warm(size: int) -> bool: ...
def pool() -> dict[str, int]: ...
def set_pool_limit(limit: int) -> None: ...
