"""Kernels and their launches."""

from typing import Any, NamedTuple

import numpy as np

from . import convert, transfer, warp  # for the builders that they register
from .alu import BUILDERS
from .approximate import Approximation
from .faults import Fault, Unsupported
from .formats import FORMATS
from .frame import Frame, reader, target, thread_name, writer
from .machine import Machine
from .memory import Memory, Pointer, Spaces, Tracker
from .parse import Code, Module
from .stats import Stats
from .warp import mask_reader

MOST_SHARED = 227 * 1024
LANES = 1 << 14  # threads that run together: enough for NumPy, few enough for the cache


class Step(NamedTuple):
    """An instruction ready to run: `execute` takes a frame and lanes."""

    kind: str
    text: str
    execute: Any
    guard: Any = None
    target: int = -1
    masks: Any = None


class Kernel:
    """An entry of a PTX text, ready to be launched."""

    def __init__(self, text, name=None):
        if isinstance(text, bytes):
            text = text.rstrip(b"\0").decode()
        self.module = Module(text)
        self.code = Code(self.module, name)
        self.name = self.code.name
        self.parameters = self.code.parameters
        self.shared_size = self.module.spaces["shared"].size
        self.steps = [self._step(one) for one in self.code.instructions]
        self.steps.append(Step("exit", "the end", None))

    def _step(self, instruction):
        try:
            return _build(instruction)
        except Fault as fault:
            fault.instruction = instruction.text
            raise
        except (IndexError, KeyError, StopIteration, ValueError) as error:
            fault = Unsupported(f"cannot read this ({error!r})")
            fault.instruction = instruction.text
            raise fault from error


def _build(instruction):
    """The step of an instruction."""
    opcode, text = instruction.opcode, instruction.text
    guard = None
    if instruction.guard:
        word = "!" * instruction.negated + instruction.guard
        guard = reader(instruction, word, FORMATS["pred"])
    if opcode == "bra":
        return Step("branch", text, None, guard, target(instruction, instruction.operands[0]))
    if opcode in ("ret", "exit"):
        return Step("exit", text, None, guard)
    if opcode == "trap":
        return Step("plain", text, _under(guard, _trap))
    if opcode in ("bar", "barrier"):
        return _build_barrier(instruction, guard)
    if opcode not in BUILDERS:
        raise Unsupported(f"opcode {opcode}")
    execute = BUILDERS[opcode](instruction)
    if opcode in ("shfl", "vote", "redux"):
        return Step("warp", text, execute, guard, masks=mask_reader(instruction))
    return Step("plain", text, _under(guard, execute))


def _trap(frame, lanes):
    raise Fault(f"{thread_name(frame.unique[frame.each(lanes)[0]])} traps")


def _under(guard, execute):
    """An instruction under a guard."""
    if guard is None:
        return execute

    def guarded(frame, lanes):
        flags = guard(frame, lanes)
        if flags.all():
            execute(frame, lanes)
        elif flags.any():
            execute(frame, frame.each(lanes)[flags])

    return guarded


def _build_barrier(instruction, guard):
    """Barriers of the warp or of the whole block, these with a reduction or not."""
    modifiers, operands = instruction.modifiers, instruction.operands
    if "warp" in modifiers:
        masks = mask_reader(instruction)
        return Step("warp", instruction.text, _meet_warp, guard, masks=masks)
    if "cluster" in modifiers or "arrive" in modifiers:
        raise Unsupported("a barrier that does not wait, or of a cluster")
    execute = _nothing
    if "red" in modifiers:
        execute, operands = _build_vote(instruction), operands[1:-1]
    if len(operands) > 1:
        raise Unsupported("a barrier of some threads of a block")
    return Step("barrier", instruction.text, execute, guard)


def _meet_warp(frame, lanes):
    frame.meet(lanes, whole_block=False)


def _nothing(frame, lanes):
    pass


def _build_vote(instruction):
    """`bar.red`: count, all or any of a predicate over the block."""
    write = writer(instruction, instruction.operands[0])
    read = reader(instruction, instruction.operands[-1], FORMATS["pred"])
    mode = next(word for word in instruction.modifiers if word in ("popc", "and", "or"))

    def execute(frame, lanes):
        flags = frame.spread(read(frame, lanes), lanes)
        block = frame.block_of[lanes]
        count = np.bincount(block, weights=flags, minlength=frame.blocks).astype(np.uint32)
        members = np.bincount(block, minlength=frame.blocks)
        result = {"popc": count, "and": count == members, "or": count > 0}[mode]
        write(frame, lanes, result[block])

    return execute


def numba_args(values, memory=None):
    """A kernel's parameters, arrays as the seven words that Numba gives for them.

    Arrays are what `Memory` gives for a name; with `memory`, names themselves do as well.
    """
    words = []
    for value in values:
        if memory is not None and isinstance(value, str):
            value = memory[value]
        words.extend(value.words() if isinstance(value, Pointer) else [value])
    return words


def launch(
    kernel,
    grid,
    block,
    args,
    memory,
    *,
    shared=0,
    races=True,
    ulps=0,
    seed=None,
    lanes=LANES,
    stats=None,
):
    """Run a kernel on the arrays of `memory`; returns what it did (Stats).

    `args` holds a value for every parameter, an array being what `memory[name]` gives (flattened to
    Numba's seven words) or its address. `shared` is the dynamic shared memory in bytes. `ulps` and
    `seed` move the results of approximate functions, `races=False` does without the search for
    conflicting accesses, and `lanes` is how many threads at most run together.
    """
    grid, block = _three(grid), _three(block)
    _check_size(kernel, grid, block, shared)
    parameters = _pack(kernel.parameters, numba_args(args, memory))
    stats = Stats(memory.starts) if stats is None else stats
    tracker = Tracker(memory, stats, kernel.module, races)
    approximation = Approximation(ulps, seed)
    sizes = (kernel.shared_size, shared)
    blocks, batch = int(np.prod(grid)), max(1, lanes // int(np.prod(block)))
    with np.errstate(all="ignore"):
        for first in range(0, blocks, batch):
            count = min(batch, blocks - first)
            frame = Frame(len(kernel.code.registers), first, count, block, grid, sizes)
            frame.parameters, frame.approximation = parameters, approximation
            frame.spaces = Spaces(frame, memory, kernel.module, sum(sizes), tracker)
            Machine(kernel.steps, frame, stats).run()
    tracker.finish()
    return stats


def _check_size(kernel, grid, block, shared):
    """What a device would refuse to launch."""
    most = min(kernel.code.most_threads, 1024)
    if not 0 < int(np.prod(block)) <= most or min(grid) < 1:
        raise Fault(f"grid {grid}, block {block}: at most {most} threads a block")
    if kernel.shared_size + shared > MOST_SHARED:
        raise Fault(f"{kernel.shared_size + shared} bytes of shared memory: at most {MOST_SHARED}")


def _three(size):
    size = tuple(size) if np.iterable(size) else (size,)
    return (*map(int, size), *(1,) * (3 - len(size)))


def _pack(parameters, values):
    """The bytes of a kernel's parameters."""
    if len(values) != len(parameters):
        raise TypeError(f"{len(values)} values for {len(parameters)} parameters")
    end = max((p.offset + p.size for p in parameters), default=0)
    packed = np.zeros(end, np.uint8)
    for place, value in zip(parameters, values, strict=True):
        known = place.format
        if known.kind in "sub" and isinstance(value, int):
            value = value % (1 << 8 * known.size)
            data = np.array([value], np.dtype(f"u{known.size}"))
        else:
            data = np.array([value], known.dtype)
        packed[place.offset : place.offset + data.nbytes] = data.view(np.uint8)
    return packed


__all__ = ["Kernel", "Memory", "convert", "launch", "numba_args", "transfer", "warp"]
