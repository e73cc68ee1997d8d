"""A PTX interpreter: runs compiled kernels on the CPU and reports what they do wrong.

    kernel = Kernel(ptx)
    memory = Memory({"x": x, "y": y}, unwritten=["y"])
    stats = launch(kernel, grid, block, [memory["x"], memory["y"], 64, 1e-5], memory)
    memory.back()                       # y now holds the result
    assert stats["x"].loads == {16: x.nbytes // 16}

All threads of several blocks run at once, as NumPy arrays. Without: clusters, asynchronous copies,
atomics, textures, time. Two blocks that depend on each other are a fault, so nothing is said about
the order of blocks; warps of a block run in step unless they diverge.
"""

from .approximate import DOCUMENTED_ULPS
from .faults import (
    BadShuffle,
    BlockDependence,
    DivergentBarrier,
    Fault,
    Misaligned,
    OutOfBounds,
    Race,
    ReadOnlyWrite,
    SharedWrite,
    Uninitialised,
    Unsupported,
)
from .kernel import Kernel, launch, numba_args
from .memory import Memory
from .stats import Stats, Traffic
