"""Types of _cuda.pyx: the CUDA driver, device arrays as callers have them, kept calls."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

_Kind: TypeAlias = Literal["torch", "cupy", "numba", "cai", "dlpack"]
#: The four types of kernels; "uint16" may be bfloat16 as bits, where the call says so.
_Type: TypeAlias = Literal["float32", "float64", "float16", "bfloat16", "uint16"]
#: Where an array argument of a kernel comes from: ("arg", i) is the call's argument i, ("new", i)
#: the entry's new result i, ("work", i) its temporary i; then the length of the 1-D array that the
#: kernel sees, and the bytes of one of its elements. None is an array of no elements.
_Operand: TypeAlias = tuple[Literal["arg", "new", "work"], int, int, int] | None
#: What a call returns: each item a new result, or the very object that came as argument i.
_Item: TypeAlias = tuple[Literal["arg", "new"], int] | None

# ---- the driver ----------------------------------------------------------------------------------

class DriverError(RuntimeError):
    """A driver call that failed; `code` is the driver's number, 0 where there is no driver."""

    code: int

def load(path: str | None = None) -> None:
    """Load and initialise the driver, once; later calls do nothing.

    `path` or FASTNORM_CUDA_DRIVER or libcuda.so.1. DriverError with one sentence that says why not.
    """

def is_loaded() -> bool: ...
def forget_failure() -> None:
    """Let the next load try again; without it a failure is remembered and raised again."""

def set_substitute(launcher: Any) -> None:
    """What does the driver's work for an Op where we have no driver; None: nothing does.

    It has order(waiting, awaited), of streams, and room(nbytes, device, stream), which gives an
    object that keeps the memory and its address. Kernels of such entries have a launch of theirs.
    """

def driver_path() -> str: ...
def driver_version() -> int:
    """As the driver counts: 13000 is 13.0."""

def devices() -> list[tuple[int, str, tuple[int, int], int]]:
    """Of each device: ordinal, name, compute capability, multiprocessors."""

def handles() -> dict[str, int]:
    """What is held of the driver: contexts, modules, pools."""

# ---- arrays --------------------------------------------------------------------------------------

class Array:
    """A device array as its owner describes it; nothing is copied, nothing waits."""

    @property
    def name(self) -> str: ...
    @property
    def address(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def strides(self) -> tuple[int, ...] | None:
        """In elements; None where the array is C-contiguous."""

    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def itemsize(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """Of the elements: size * itemsize."""

    @property
    def dtype(self) -> _Type: ...
    @property
    def alignment(self) -> int:
        """The largest power of two up to 16 that divides the address."""

    @property
    def device(self) -> int:
        """The ordinal."""

    @property
    def stream(self) -> int | None:
        """The stream that its contents are ready on; None where they are ready on any."""

    @property
    def readonly(self) -> bool: ...
    @property
    def owner(self) -> Any:
        """The object that was described."""

    @property
    def kind(self) -> _Kind: ...
    @property
    def can_make(self) -> bool:
        """Whether the owner's library is known, so that results can be made in its kind."""

def is_device_array(value: Any) -> bool:
    """Whether this is an array in CUDA memory; imports nothing, asks no driver."""

def describe(name: str, value: Any) -> Array:
    """An array's description; TypeError or ValueError, which name it, where it can not be used."""

def overlap(a: Array, b: Array) -> Literal["apart", "same", "overlap"]:
    """Of the memory between first and last element: "same" is the very same elements."""

# ---- kernels -------------------------------------------------------------------------------------

class Kernel:
    """A loaded function and how its parameters lie: `layout` has a letter for each argument.

    "a" is a 1-D array (7 words), "q" int64, "f" float32, "d" float64.
    """

    @property
    def entry(self) -> str: ...
    @property
    def device(self) -> int: ...
    @property
    def layout(self) -> str: ...
    @property
    def attributes(self) -> dict[str, int]:
        """registers, local bytes, shared bytes, threads: the most a block may have."""

    def __init__(
        self, device: int, image: bytes, entry: str, layout: str | bytes | Sequence[str]
    ) -> None: ...
    def launch(self, grid: int, block: int, shared: int, stream: int, args: Sequence[Any]) -> None:
        """`args`: an Array, (address, size, itemsize) or None for "a"; numbers for the others."""

# ---- kept calls ----------------------------------------------------------------------------------

class Entry:
    """All that a call does, once its arguments are known but for their addresses.

    Parameters
    ----------
    steps
        (kernel, grid, block, shared, arguments): `arguments` in the kernel's order, an _Operand for
        each "a", numbers for the others. A kernel that is no Kernel is called as its `launch` is.
    new
        (shape, type) of each new result, made by the library of the call's main array.
    workspace
        Bytes of each temporary; aligned to 256.
    result
        One _Item, or a list of them, which makes the result a tuple.
    """

    def __init__(
        self,
        steps: Sequence[tuple[Any, int, int, int, Sequence[Any]]],
        new: Sequence[tuple[tuple[int, ...], _Type]],
        workspace: Sequence[int],
        result: _Item | list[_Item],
    ) -> None: ...

class Op:
    """An op's kept calls.

    A call's arguments, by position, are device arrays and options. Two calls that differ in
    nothing but the arrays' addresses (of the same alignment) share an entry: types, shapes,
    strides, devices, kinds, whether read-only, all options, and how each of `written` overlaps the
    other arrays are what an entry is found by. `build` makes it: it gets the arguments with an
    Array in the place of each device array, checks them, and raises, or returns the Entry, which
    must not depend on an address.

    Parameters
    ----------
    names
        Of the arguments.
    main
        Which argument decides the kind of new results, the device and the stream.
    written
        Which arguments are written to.
    """

    name: str
    def __init__(
        self,
        name: str,
        names: Sequence[str],
        build: Callable[..., Entry],
        *,
        main: int = 0,
        written: Sequence[int] = (),
    ) -> None: ...
    def __call__(self, *args: Any) -> Any: ...
    def __len__(self) -> int:
        """How many entries are kept."""

    def clear(self) -> None: ...
