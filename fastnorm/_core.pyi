"""Types of _core.pyx."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Array: TypeAlias = NDArray[Any]
_Shape: TypeAlias = int | Sequence[int] | None
_Axis: TypeAlias = int | Sequence[int] | None

OPS: tuple[str, ...]
DTYPES: tuple[str, ...]

@overload
def layer_norm(
    x: ArrayLike,
    normalized_shape: _Shape = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: _Axis = None,
    out: _Array | None = None,
    return_stats: Literal[False] = False,
) -> _Array: ...
@overload
def layer_norm(
    x: ArrayLike,
    normalized_shape: _Shape = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: _Axis = None,
    out: _Array | None = None,
    return_stats: Literal[True],
) -> tuple[_Array, _Array, _Array]: ...
@overload
def layer_norm(
    x: ArrayLike,
    normalized_shape: _Shape = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: _Axis = None,
    out: _Array | None = None,
    return_stats: bool,
) -> _Array | tuple[_Array, _Array, _Array]: ...
def layer_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    normalized_shape: _Shape,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: _Axis = None,
    output_mask: Sequence[bool] = (True, True, True),
) -> tuple[_Array | None, _Array | None, _Array | None]: ...
def moments(x: ArrayLike, axis: _Axis = None) -> tuple[_Array, _Array]: ...

class BoundLayerNorm:
    normalized_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    def __init__(
        self,
        normalized_shape: tuple[int, ...],
        eps: float,
        dtype: np.dtype[Any],
    ) -> None: ...
    def __call__(self, x: ArrayLike, out: _Array | None = None) -> _Array: ...
    def _set(self, name: str, value: Any) -> None: ...
    def _get(self, name: str) -> Any: ...

def register(name: str, handler: Callable[..., Any]) -> None: ...

# With plan=True these return what would be done, as a dict; otherwise None.
def layer_norm_rows(
    x: _Array,
    y: _Array,
    weight: _Array | None,
    bias: _Array | None,
    eps: float,
    mean: _Array | None,
    rstd: _Array | None,
    warm: bool,
    plan: bool = False,
) -> Any: ...
def layer_norm_backward_rows(
    dy: _Array,
    x: _Array,
    dx: _Array | None,
    mean: _Array,
    rstd: _Array,
    weight: _Array | None,
    dweight: _Array | None,
    dbias: _Array | None,
    plan: bool = False,
    warm: bool = False,
) -> Any: ...
def moments_rows(
    x: _Array, mean: _Array | None, variance: _Array | None, plan: bool = False
) -> Any: ...
def isa_names() -> tuple[str, ...]: ...
def isa_supported(name: str) -> bool: ...
def isa_active() -> str: ...
def select_isa(name: str | None = None) -> None: ...
def threads() -> dict[str, int | None]: ...
def set_requested_threads(count: int) -> None: ...
def set_cpu_quota(cpus: int) -> None: ...
def openmp() -> bool: ...
def force_partition(parts: int) -> None: ...
def new_result(like: _Array) -> tuple[_Array, bool]: ...
def would_be_warm(size: int) -> bool: ...
def pool() -> dict[str, int]: ...
def set_pool_limit(limit: int) -> None: ...
