"""Loads, stores, addresses and fences."""

import re

import numpy as np

from .alu import builds
from .faults import Unsupported
from .formats import FORMATS, UNSIGNED, formats_in
from .frame import WINDOWS, reader, writer
from .memory import Access
from .parse import Register, Variable, split

SPACES = ("global", "shared", "local", "param", "const")
ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", re.S)
VECTORS = {"v2": 2, "v4": 4, "v8": 8}


def space_of(instruction):
    """The space that the modifiers name; generic if none."""
    for word in instruction.modifiers:
        if word.startswith("shared::cluster"):
            raise Unsupported("shared memory of other blocks")
        if word.split("::")[0] in SPACES:
            return word.split("::")[0]
    return "generic"


def address_reader(instruction, word):
    """The function that computes `[register + offset]`, and the variable if it is one."""
    found = ADDRESS.fullmatch(word)
    if not found:
        raise Unsupported(f"address {word}")
    base, offset = found.group(1), int(found.group(2) or "0", 0)
    meaning = instruction.lookup(base)
    known = FORMATS["u64"]
    if isinstance(meaning, Register):
        known = FORMATS[f"u{8 * meaning.format.size}"]
    read = reader(instruction, base, known)

    def address(frame, lanes):
        return read(frame, lanes).astype(np.int64) + offset

    return address, meaning


def _elements(word):
    return split(word[1:-1]) if word.startswith("{") else [word]


def _count(instruction):
    return next((VECTORS[w] for w in instruction.modifiers if w in VECTORS), 1)


@builds("ld", "ldu")
def build_load(instruction):
    known, space = formats_in(instruction.modifiers)[-1], space_of(instruction)
    address, variable = address_reader(instruction, instruction.operands[1])
    writes = [writer(instruction, word) for word in _elements(instruction.operands[0])]
    if len(writes) != _count(instruction):
        raise Unsupported("a vector of another length")
    if isinstance(variable, Variable) and variable.space == "entry":
        return _load_parameter(address, writes, known)

    access = Access(space, known.size, len(writes), False, "nc" in instruction.modifiers)

    def execute(frame, lanes):
        values = frame.spaces.load(access, address(frame, lanes), lanes)
        for write, value in zip(writes, values, strict=True):
            write(frame, lanes, value.view(known.dtype))

    return execute


def _load_parameter(address, writes, known):
    """A kernel's parameter: the same for all threads."""

    def execute(frame, lanes):
        start = int(address(frame, lanes))
        for place, write in enumerate(writes):
            first = start + place * known.size
            held = frame.parameters[first : first + known.size]
            write(frame, lanes, held.view(known.dtype)[0])

    return execute


@builds("st")
def build_store(instruction):
    known, space = formats_in(instruction.modifiers)[-1], space_of(instruction)
    address, _ = address_reader(instruction, instruction.operands[0])
    reads = [reader(instruction, word, known) for word in _elements(instruction.operands[1])]
    if len(reads) != _count(instruction):
        raise Unsupported("a vector of another length")
    storage, access = UNSIGNED[known.size], Access(space, known.size, len(reads), True)

    def execute(frame, lanes):
        values = [frame.spread(read(frame, lanes), lanes).view(storage) for read in reads]
        frame.spaces.store(access, address(frame, lanes), lanes, values)

    return execute


@builds("cvta")
def build_generic(instruction):
    """To a generic address or back."""
    space = space_of(instruction)
    start = np.uint64(WINDOWS.get(space, 0))
    known = formats_in(instruction.modifiers)[-1]
    read = reader(instruction, instruction.operands[1], known)
    write = writer(instruction, instruction.operands[0])
    if "to" in instruction.modifiers:
        return lambda frame, lanes: write(frame, lanes, read(frame, lanes) - start)
    return lambda frame, lanes: write(frame, lanes, read(frame, lanes) + start)


@builds("membar", "fence", "prefetch", "prefetchu", "nanosleep", "griddepcontrol", "discard")
def build_nothing(instruction):
    """Nothing that can be seen from the threads of one launch."""
    return lambda frame, lanes: None
