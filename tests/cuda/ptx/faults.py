"""What a kernel can do wrong. Each fault says which instruction, and which threads."""


class Fault(Exception):
    """Something that a correct kernel does not do."""

    instruction = ""

    def __str__(self):
        said = super().__str__()
        return f"{said}, at `{self.instruction}`" if self.instruction else said


class Unsupported(Fault):
    """PTX that the interpreter does not know."""


class OutOfBounds(Fault):
    """An access outside of every array, or across the end of one."""


class Misaligned(Fault):
    """An address that the width of its access does not divide."""


class Uninitialised(Fault):
    """A register or memory that is read before it has been written."""


class DivergentBarrier(Fault):
    """A barrier that some threads of the block never reach, or reach elsewhere."""


class BadShuffle(Fault):
    """A warp-wide instruction whose mask or source lanes are not there."""


class Race(Fault):
    """Accesses of two threads of a block to the same place with no barrier between them."""


class SharedWrite(Fault):
    """Two threads write the same element of global memory in one launch."""


class ReadOnlyWrite(Fault):
    """What `ld.global.nc` reads must not change while the kernel runs, by any thread."""


class BlockDependence(Fault):
    """A block reads what another one writes in the same launch."""
