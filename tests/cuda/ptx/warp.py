"""What the lanes of a warp do together: shuffles, votes, reductions.

The machine has seen to it that all lanes which a mask names, and which have not returned, execute
the instruction at once: `lanes` holds them.
"""

import numpy as np

from .alu import builds
from .faults import BadShuffle, Unsupported
from .formats import FORMATS, formats_in
from .frame import WARP, reader, writer

FULL = np.uint32(0xFFFF_FFFF)


class Gathering:
    """The lanes at a warp-wide instruction, as a table of 32 places for each warp."""

    def __init__(self, frame, lanes):
        self.frame, self.lanes = frame, lanes
        self.slots = frame.slots if lanes is None else frame.slots[lanes]
        self.all = lanes is None and frame.whole_warps

    def table(self, values):
        """Values by place; 0 where no lane is."""
        values = self.frame.spread(values, self.lanes)
        if self.all:
            return values
        table = np.zeros(self.frame.blocks * self.frame.warps_per_block * WARP, values.dtype)
        table[self.slots] = values
        return table

    def bits(self, flags):
        """Each lane's flag as one bit of its warp's word, given to every lane."""
        packed = np.packbits(self.table(flags), bitorder="little").view(np.uint32)
        return packed[self.slots // WARP]

    def present(self):
        """The lanes that are here, as a word for each of them."""
        return self.bits(np.ones(self.frame.count(self.lanes), bool))


def check_masks(frame, lanes, masks):
    """Which lanes may go on: those with whom all that their mask names have come."""
    gathering = Gathering(frame, lanes)
    own = np.uint32(1) << (gathering.slots % WARP).astype(np.uint32)
    if not np.all(masks & own):
        raise BadShuffle("a lane's own bit is not set in its mask")
    present = FULL if gathering.all else gathering.present()
    missing = masks & frame.alive_in_warp(lanes) & ~present
    _check_agreement(gathering, masks, present)
    return missing == 0


def _check_agreement(gathering, masks, present):
    """Lanes that name each other must give the same mask."""
    if not masks.ndim:
        return
    table = gathering.table(masks).reshape(-1, WARP)
    warps, own = gathering.slots // WARP, np.broadcast_to(masks, gathering.slots.shape)
    for lane in range(WARP):
        named = (own & present) >> np.uint32(lane) & 1 == 1
        if (table[warps[named], lane] != own[named]).any():
            raise BadShuffle("lanes of one warp give different masks")


def mask_reader(instruction):
    """The member mask, which is the last operand, or None where there is none."""
    if instruction.opcode == "bar":
        word = instruction.operands[0]
    elif "sync" in instruction.modifiers:
        word = instruction.operands[-1]
    else:
        return None
    return reader(instruction, word, FORMATS["u32"])


def source_lanes(mode, lane, b, c):
    """The lane that a shuffle reads from, and whether that is in range (PTX ISA, shfl.sync)."""
    b, clamp, segment = b & 31, c & 31, c >> 8 & 31
    least, most = lane & segment, (lane & segment) | (clamp & ~segment)
    if mode == "up":
        source = lane - b
        return source, source >= most
    source = {"down": lane + b, "bfly": lane ^ b, "idx": least | (b & ~segment)}[mode]
    return source, source <= most


@builds("shfl")
def build_shuffle(instruction):
    mode = instruction.modifiers[1]
    target, _, flag = instruction.operands[0].partition("|")
    write = writer(instruction, target.strip())
    write_flag = writer(instruction, flag.strip()) if flag else None
    read, read_b, read_c = (
        reader(instruction, word, FORMATS[name])
        for word, name in zip(instruction.operands[1:4], ("b32", "s32", "s32"), strict=True)
    )
    masks = mask_reader(instruction)

    def execute(frame, lanes):
        gathering = Gathering(frame, lanes)
        lane = gathering.slots % WARP
        source, inside = _sources(mode, lane, read_b(frame, lanes), read_c(frame, lanes))
        _check_sources(gathering, source, masks(frame, lanes))
        table = gathering.table(read(frame, lanes))
        write(frame, lanes, table[gathering.slots - lane + source])
        if write_flag:
            write_flag(frame, lanes, inside)
        frame.hear(lanes)

    return execute


def _sources(mode, lane, b, c):
    """Each lane's source, which is the lane itself where that is out of range, and if it is not."""
    if b.ndim or c.ndim:
        source, inside = source_lanes(mode, lane, b, c)
        return np.where(inside, source, lane), inside
    every = np.arange(WARP)
    source, inside = source_lanes(mode, every, b, c)
    return np.where(inside, source, every)[lane], inside[lane]


def _check_sources(gathering, source, masks):
    """A lane may only be read if it is here and named by the reader's mask."""
    if gathering.all and not masks.ndim and masks == FULL:
        return
    there = (masks & gathering.present()) >> source.astype(np.uint32) & 1
    if not there.all():
        lane = int(source[np.flatnonzero(there == 0)[0]])
        raise BadShuffle(f"reads lane {lane}, which is not there or not in the mask")


@builds("vote")
def build_vote(instruction):
    mode = instruction.modifiers[1]
    read = reader(instruction, instruction.operands[1], FORMATS["pred"])
    write, masks = writer(instruction, instruction.operands[0]), mask_reader(instruction)

    def execute(frame, lanes):
        gathering = Gathering(frame, lanes)
        members = masks(frame, lanes) & gathering.present()
        votes = gathering.bits(read(frame, lanes)) & members
        result = {
            "all": votes == members,
            "any": votes != 0,
            "uni": (votes == members) | (votes == 0),
            "ballot": votes,
        }[mode]
        write(frame, lanes, result)
        frame.hear(lanes)

    return execute


@builds("activemask")
def build_active(instruction):
    write = writer(instruction, instruction.operands[0])
    return lambda frame, lanes: write(frame, lanes, Gathering(frame, lanes).present())


REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@builds("redux")
def build_reduction(instruction):
    """A reduction of integers over the lanes of a mask."""
    known = formats_in(instruction.modifiers)[-1]
    if known.is_float:
        raise Unsupported("redux of floats")
    reduce = next(REDUCTIONS[word] for word in instruction.modifiers if word in REDUCTIONS)
    read = reader(instruction, instruction.operands[1], known)
    write, masks = writer(instruction, instruction.operands[0]), mask_reader(instruction)

    def execute(frame, lanes):
        gathering = Gathering(frame, lanes)
        values = frame.spread(read(frame, lanes), lanes)
        members = np.broadcast_to(masks(frame, lanes) & gathering.present(), values.shape)
        result = np.empty_like(values)
        groups = np.stack([gathering.slots // WARP, members], 1)
        for group in np.unique(groups, axis=0):
            inside = (groups == group).all(1)
            result[inside] = reduce.reduce(values[inside])
        write(frame, lanes, result)
        frame.hear(lanes)

    return execute
