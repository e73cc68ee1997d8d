"""The registers of the threads that run together, and how operands are read and written.

A register is an array with a value for each thread or, where all threads are known to have the
same, a NumPy scalar. Arrays are never changed in place, so that they may be shared.

`lanes` says for which threads an instruction is executed: None for all, or their numbers.
"""

import re

import numpy as np

from .faults import Uninitialised, Unsupported
from .formats import FORMATS, UNSIGNED
from .parse import Label, Register, Variable, split

WARP = 32
WARP_SHIFT, BLOCK_SHIFT = 5, 10  # of a thread's number in the launch, which leaves gaps
SHARED_WINDOW, LOCAL_WINDOW, MODULE_WINDOW = 0x20_0000_0000, 0x30_0000_0000, 0x40_0000_0000
GLOBAL_WINDOW = 0x7F00_0000_0000
WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}
INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?")


def thread_name(number):
    """A thread in words, by its number in the launch."""
    number = int(number)
    return f"thread {number % (1 << BLOCK_SHIFT)} of block {number >> BLOCK_SHIFT}"


class Frame:
    """Threads of one or more blocks of the same size, and their registers."""

    def __init__(self, registers, first_block, blocks, block, grid, shared_bytes):
        self.threads = block[0] * block[1] * block[2]
        self.blocks, self.first_block = blocks, first_block
        self.size = blocks * self.threads
        self.values = [None] * registers
        self.undefined = [None] * registers
        self.carry = None
        self.lanes = np.arange(self.size)
        self.block_of = self.lanes // self.threads
        within = self.lanes - self.block_of * self.threads
        self.warps_per_block = -(-self.threads // WARP)
        self.lane_in_warp = within % WARP
        self.warp_of = self.block_of * self.warps_per_block + within // WARP
        self.slots = self.warp_of * WARP + self.lane_in_warp
        self.whole_warps = self.threads % WARP == 0
        self.unique = (self.block_of + first_block << BLOCK_SHIFT) + within
        self.clock = 0
        # When each thread last met others: at a barrier of the block (upper half of the number) or
        # of the warp; `met` is for memory, `heard` counts shuffles too, which order no memory.
        self.met = np.zeros(self.size, np.int64)
        self.heard = np.zeros(self.size, np.int64)
        self.set_alive(self.lanes)
        self.special = self._special(within, block, grid, shared_bytes)

    def _special(self, within, block, grid, shared_bytes):
        """Registers that the machine sets."""
        numbers = self.block_of + self.first_block
        word = np.uint32
        found = {
            "%laneid": self.lane_in_warp.astype(word),
            "%warpid": (within // WARP).astype(word),
            "%nwarpid": word(self.warps_per_block),
            "%dynamic_smem_size": word(shared_bytes[1]),
            "%total_smem_size": word(sum(shared_bytes)),
        }
        for axis, name in enumerate("xyz"):
            found[f"%ntid.{name}"], found[f"%nctaid.{name}"] = word(block[axis]), word(grid[axis])
            found[f"%tid.{name}"] = (within % block[axis]).astype(word)
            found[f"%ctaid.{name}"] = (numbers % grid[axis]).astype(word)
            within, numbers = within // block[axis], numbers // grid[axis]
        return found | self._lane_masks()

    def _lane_masks(self):
        one = np.uint64(1) << self.lane_in_warp.astype(np.uint64)
        masks = {"eq": one, "lt": one - 1, "le": 2 * one - 1}
        masks |= {"gt": ~masks["le"], "ge": ~masks["lt"]}
        return {f"%lanemask_{name}": mask.astype(np.uint32) for name, mask in masks.items()}

    def set_alive(self, lanes):
        """Only these threads have not returned."""
        flags = np.zeros(self.blocks * self.warps_per_block * WARP, bool)
        flags[self.slots[lanes]] = True
        self.alive = np.packbits(flags, bitorder="little").view(np.uint32)

    def alive_in_warp(self, lanes):
        """The lanes of each thread's warp that have not returned, as bits."""
        return self.alive[self.warp_of[self.each(lanes)]]

    def meet(self, lanes, whole_block):
        """These threads have passed a barrier together: what they wrote is seen by all of them."""
        self.clock += 1
        each = self.each(lanes)
        if whole_block:
            self.met[each] = self.clock << 32
        else:
            self.met[each] = (self.met[each] >> 32 << 32) + self.clock
        self.heard[each] = self.met[each]

    def hear(self, lanes):
        """These threads have exchanged values: what they read before has been read."""
        self.clock += 1
        each = self.each(lanes)
        self.heard[each] = (self.heard[each] >> 32 << 32) + self.clock

    def carry_after(self, lanes, flags):
        """Keep the carry of a sum."""
        flags = self.spread(flags, lanes)
        if lanes is None:
            self.carry = flags
            return
        self.carry = np.zeros(self.size, bool) if self.carry is None else self.carry.copy()
        self.carry[lanes] = flags

    def count(self, lanes):
        """How many threads `lanes` are."""
        return self.size if lanes is None else len(lanes)

    def each(self, lanes):
        """The numbers of `lanes`."""
        return self.lanes if lanes is None else lanes

    def spread(self, value, lanes):
        """A value for each of `lanes`, where all may share one."""
        return value if value.ndim else np.full(self.count(lanes), value)

    def get(self, index, lanes):
        """A register's values; it must have been written."""
        unset = self.undefined[index]
        if self.values[index] is None or (unset is not None and self._any(unset, lanes)):
            raise Uninitialised("a register is read before it is written")
        return self.look(index, lanes)

    @staticmethod
    def _any(flags, lanes):
        return flags.any() if lanes is None else flags[lanes].any()

    def look(self, index, lanes):
        """A register's values, written or not."""
        value = self.values[index]
        return value if lanes is None or not value.ndim else value.take(lanes)

    def is_undefined(self, index, lanes):
        """Where a register has not been written: False, or a flag for each thread."""
        unset = self.undefined[index]
        if self.values[index] is None:
            return np.True_
        if unset is None:
            return np.False_
        return unset if lanes is None else unset[lanes]

    def put(self, index, lanes, value, dtype):
        """Write a register for `lanes`."""
        if lanes is None:
            self.values[index], self.undefined[index] = value, None
            return
        before = self.values[index]
        if before is None:
            after, self.undefined[index] = np.zeros(self.size, dtype), np.ones(self.size, bool)
        else:
            after = before.copy() if before.ndim else np.full(self.size, before)
        after[lanes] = value
        self.values[index] = after
        if self.undefined[index] is not None:
            self._define(index, lanes)

    def _define(self, index, lanes):
        unset = self.undefined[index].copy()
        unset[lanes] = False
        self.undefined[index] = unset if unset.any() else None

    def forget(self, index, lanes, flags):
        """Say which of `lanes` hold nothing after a copy of what was not written."""
        if not flags.any():
            return
        unset = self.undefined[index]
        unset = np.zeros(self.size, bool) if unset is None else unset.copy()
        unset[self.each(lanes)] = flags
        self.undefined[index] = unset


def cast(value, known):
    """A register's bits as this type: cut off, or widened with zeros."""
    if known.kind == "p" or value.dtype == bool:
        return value
    if value.dtype.itemsize != known.size:
        value = value.astype(UNSIGNED[known.size])
    return value.view(known.dtype)


def constant(word, known):
    """An immediate operand as a scalar of this type, or None if `word` is no number."""
    if word[:2] in ("0f", "0F") and len(word) == 10:
        value = np.uint32(int(word[2:], 16)).view(np.float32)
    elif word[:2] in ("0d", "0D") and len(word) == 18:
        value = np.uint64(int(word[2:], 16)).view(np.float64)
    elif INTEGER.fullmatch(word):
        return _integer(int(word.rstrip("U"), 0), known)
    else:
        return None
    return value.astype(known.dtype) if known.kind == "f" else value.view(UNSIGNED[value.itemsize])


def _integer(value, known):
    if known.kind == "p":
        return np.bool_(value)
    if known.kind == "f":
        return known.dtype.type(value)
    bits = value & ((1 << 8 * known.size) - 1)
    return UNSIGNED[known.size].type(bits).view(known.dtype)


def reader(instruction, word, known):
    """A function of frame and lanes that gives the values of an operand."""
    if word.startswith("!"):
        inner = reader(instruction, word[1:].strip(), known)
        return lambda frame, lanes: ~inner(frame, lanes)
    if word.startswith("{"):
        return packed_reader(instruction, word, known)
    meaning = instruction.lookup(word)
    if isinstance(meaning, Register):
        return _register_reader(meaning, known)
    if isinstance(meaning, Variable):
        value = known.dtype.type(meaning.offset + MODULE_WINDOW * (meaning.space == "module"))
        return lambda frame, lanes: value
    if (value := constant(word, known)) is not None:
        return lambda frame, lanes: value
    return _special_reader(word, known)


def _register_reader(register, known):
    index, dtype = register.index, known.dtype
    if register.format.size == known.size and (register.format.kind == "p") == (known.kind == "p"):
        return lambda frame, lanes: frame.get(index, lanes).view(dtype)
    return lambda frame, lanes: cast(frame.get(index, lanes), known)


def _special_reader(word, known):
    if not word.startswith("%"):
        raise Unsupported(f"operand {word}")
    if word.startswith(("%clock", "%globaltimer")):
        raise Unsupported(f"the time, {word}")

    def read(frame, lanes):
        if word not in frame.special:
            raise Unsupported(f"register {word}")
        value = frame.special[word]
        return cast(value if lanes is None or not value.ndim else value.take(lanes), known)

    return read


def packed_reader(instruction, word, known):
    """`{a, b}` as one value, the first in the lowest bits."""
    words = split(word[1:-1])
    part = FORMATS[f"b{8 * known.size // len(words)}"]
    parts = [reader(instruction, each, part) for each in words]

    def read(frame, lanes):
        whole = known.storage.type(0)
        for place, each in enumerate(parts):
            value = each(frame, lanes).astype(known.storage)
            whole = whole | (value << known.storage.type(8 * part.size * place))
        return whole.view(known.dtype)

    return read


def writer(instruction, word):
    """A function of frame, lanes and values that writes a destination."""
    if word == "_":
        return lambda frame, lanes, value: None
    if word.startswith("{"):
        return packed_writer(instruction, word)
    register = instruction.lookup(word)
    if not isinstance(register, Register):
        raise Unsupported(f"destination {word}")
    index, storage = register.index, register.format.storage

    def write(frame, lanes, value):
        dtype = value.dtype
        if dtype != storage:
            if dtype.itemsize == storage.itemsize:
                value = value.view(storage)
            elif dtype.kind == "f":
                value = value.view(UNSIGNED[dtype.itemsize]).astype(storage)
            else:
                value = value.astype(storage)  # signed ones with their sign
        frame.put(index, lanes, value, storage)

    return write


def packed_writer(instruction, word):
    """The parts of a value to several registers, the lowest bits to the first."""
    words = split(word[1:-1])
    parts = [writer(instruction, each) for each in words]

    def write(frame, lanes, value):
        bits = UNSIGNED[value.dtype.itemsize]
        size = bits.itemsize // len(parts)
        for place, each in enumerate(parts):
            shifted = value.view(bits) >> bits.type(8 * size * place)
            each(frame, lanes, shifted.astype(UNSIGNED[size]))

    return write


def target(instruction, word):
    """The position that a label names."""
    label = instruction.lookup(word)
    if not isinstance(label, Label):
        raise Unsupported(f"label {word}")
    return label.position
