"""The spaces of memory: arrays of the device, shared and local memory, the module's constants."""

from typing import NamedTuple

import numpy as np

from .faults import Misaligned, OutOfBounds, Uninitialised, Unsupported
from .formats import UNSIGNED
from .frame import GLOBAL_WINDOW, LOCAL_WINDOW, MODULE_WINDOW, SHARED_WINDOW, thread_name
from .hazards import Shadow

GAP = 256


class Buffer:
    """Bytes, seen as numbers of every size."""

    def __init__(self, size):
        self.bytes = np.zeros(-(-size // 16) * 16, np.uint8)
        self.views = {size: self.bytes.view(dtype) for size, dtype in UNSIGNED.items()}

    def load(self, offsets, size, count):
        """`count` neighbours of `size` bytes at each offset, as a list of arrays."""
        view, first = self.views[size], offsets // size
        return [view.take(first + place) for place in range(count)]

    def store(self, offsets, size, values):
        view, first = self.views[size], offsets // size
        for place, value in enumerate(values):
            view[first + place] = value


class Access(NamedTuple):
    """What an instruction does to memory: `count` neighbours of `size` bytes for each thread."""

    space: str
    size: int
    count: int
    writes: bool
    constant: bool = False  # by way of the cache for what no thread writes

    @property
    def width(self):
        """Bytes for each thread."""
        return self.size * self.count


class Pointer(NamedTuple):
    """An array as a kernel is given it."""

    address: int
    size: int
    itemsize: int

    def words(self):
        """The seven parameters of Numba's array of one dimension."""
        return (0, 0, self.size, self.itemsize, self.address, self.size, self.itemsize)


class Memory:
    """Arrays on the device, each between gaps that nothing may touch.

    `arrays` is a dict, or a list whose names are "0", "1" ... An array begins at a multiple of 256
    bytes and `misalign` more; a dict gives each name its own. What `unwritten` names may not be
    read before it is written. `back` copies the results into the arrays.
    """

    def __init__(self, arrays, misalign=0, unwritten=()):
        if not isinstance(arrays, dict):
            arrays = {str(number): array for number, array in enumerate(arrays)}
        self.arrays = {name: np.asarray(array) for name, array in arrays.items()}
        self.starts, self.ends = {}, {}
        end = GAP
        for name, array in self.arrays.items():
            shift = misalign.get(name, 0) if isinstance(misalign, dict) else misalign
            self.starts[name] = end + shift
            self.ends[name] = end + shift + array.nbytes
            end = -(-self.ends[name] // GAP) * GAP + GAP
        self.buffer = Buffer(end)
        self.buffer.bytes[:] = 0xA5
        self.known = {name: np.zeros(self._span(name), bool) for name in unwritten}
        self.refill()

    def _span(self, name):
        """The bytes of the 16-byte pieces that an array touches."""
        return -(-self.ends[name] // 16) * 16 - self.starts[name] // 16 * 16

    def refill(self):
        """Copy the arrays to the device, but for those that kernels have yet to write."""
        for name, array in self.arrays.items():
            if name not in self.known:
                flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                self.buffer.bytes[self.starts[name] : self.ends[name]] = flat

    def __getitem__(self, name):
        """The array of this name, or of this place in the list, as an argument of a launch."""
        return self.pointer(name)

    def pointer(self, name, itemsize=None, offset=0):
        """An array as an argument, its elements `itemsize` bytes wide, from a byte `offset` on."""
        name = str(name)
        itemsize = itemsize or self.arrays[name].itemsize
        size = (self.arrays[name].nbytes - offset) // itemsize
        return Pointer(GLOBAL_WINDOW + self.starts[name] + offset, size, itemsize)

    def read(self, name):
        """A copy of what an array holds on the device."""
        array = self.arrays[name]
        held = self.buffer.bytes[self.starts[name] : self.ends[name]]
        return held.copy().view(array.dtype).reshape(array.shape)

    def back(self):
        """Copy everything from the device into the arrays."""
        for name, array in self.arrays.items():
            array[...] = self.read(name)

    def find(self, offsets, width):
        """The name of the array that holds every access, or None if there are several."""
        low, high = offsets.min(), offsets.max() + width
        for name, start in self.starts.items():
            if start <= low and high <= self.ends[name]:
                return name
        return None

    def names(self, offsets, width):
        """Groups of accesses by array: pairs of a name and flags; None for those in none."""
        left = np.ones(len(offsets), bool)
        for name, start in self.starts.items():
            inside = (offsets >= start) & (offsets + width <= self.ends[name])
            if inside.any():
                left &= ~inside
                yield name, inside
        if left.any():
            yield None, left

    def edges(self, offset):
        """Where an offset lies, in words."""
        name, start = max(
            ((name, start) for name, start in self.starts.items() if start <= offset),
            key=lambda known: known[1],
            default=("no array", 0),
        )
        return f"{offset - start} bytes after the start of {name}"


class Spaces:
    """All memory that a frame's threads see, and the checks of their accesses."""

    def __init__(self, frame, memory, module, shared_size, tracker):
        self.frame, self.memory, self.tracker = frame, memory, tracker
        self.shared_size = shared_size
        self.stride = -(-shared_size // 16) * 16
        self.shared = Buffer(self.stride * frame.blocks)
        size = module.spaces["local"].size
        self.local_size = size
        self.local_stride = -(-size // 16) * 16
        self.local = Buffer(self.local_stride * frame.size)
        self.local_written = np.zeros(len(self.local.bytes), bool)
        self.module = tracker.module
        tracker.start(len(self.shared.bytes))

    def load(self, access, addresses, lanes):
        """What threads find at their addresses: an array for each neighbour."""
        buffer, offsets = self._find(access, addresses, lanes)
        return buffer.load(offsets, access.size, access.count)

    def store(self, access, addresses, lanes, values):
        """Write an array for each neighbour."""
        buffer, offsets = self._find(access, addresses, lanes)
        buffer.store(offsets, access.size, values)

    def _find(self, access, addresses, lanes):
        """Where an access goes, once it has passed every check: a buffer, and places in it."""
        addresses = self.frame.spread(addresses, lanes).astype(np.int64)
        self._check_alignment(addresses, access.width, lanes)
        space = access.space
        if space == "generic":
            space, addresses = self._resolve(addresses)
        return getattr(self, f"_{space}")(addresses, lanes, access)

    def _check_alignment(self, addresses, width, lanes):
        if np.bitwise_or.reduce(addresses) & (width - 1):
            first = np.flatnonzero(addresses & (width - 1))[0]
            raise Misaligned(
                f"{self._thread(first, lanes)}: address {addresses[first]:#x} of {width} bytes"
            )

    def _thread(self, place, lanes):
        """A thread in words, by its place among `lanes`."""
        return thread_name(self.frame.unique[self.frame.each(lanes)[place]])

    def _resolve(self, addresses):
        """The space that generic addresses are in, and the addresses there."""
        low = addresses.min()
        for space, start in (
            ("global", GLOBAL_WINDOW),
            ("module", MODULE_WINDOW),
            ("local", LOCAL_WINDOW),
            ("shared", SHARED_WINDOW),
        ):
            if low >= start:
                if space in ("global", "module"):
                    return space, addresses
                return space, addresses - start
        raise OutOfBounds(f"generic address {low:#x}")

    def _inside(self, addresses, width, size, lanes, space):
        wrong = (addresses < 0) | (addresses + width > size)
        if wrong.any():
            first = np.flatnonzero(wrong)[0]
            raise OutOfBounds(
                f"{self._thread(first, lanes)}: {space} address {addresses[first]:#x} of {width}"
                f" bytes, in {size}"
            )

    def _shared(self, addresses, lanes, access):
        self._inside(addresses, access.width, self.shared_size, lanes, "shared")
        each = self.frame.each(lanes)
        offsets = addresses + self.frame.block_of[each] * self.stride
        self.tracker.shared(self.frame, offsets, each, access)
        return self.shared, offsets

    def _local(self, addresses, lanes, access):
        self._inside(addresses, access.width, self.local_size, lanes, "local")
        offsets = addresses + self.frame.each(lanes) * self.local_stride
        spread = (offsets[:, None] + np.arange(access.width)).ravel()
        if access.writes:
            self.local_written[spread] = True
        elif not self.local_written[spread].all():
            raise Uninitialised("local memory is read before it is written")
        each = self.frame.each(lanes)
        self.tracker.stats["local"].note(access, offsets, self.frame.warp_of[each])
        return self.local, offsets

    def _param(self, addresses, lanes, access):
        """Parameters of functions lie in local memory."""
        return self._local(addresses, lanes, access)

    def _module(self, addresses, lanes, access):
        if access.writes:
            raise Unsupported("a store to a variable of the module")
        offsets = addresses - MODULE_WINDOW
        self._inside(offsets, access.width, len(self.module.bytes), lanes, "constant")
        return self.module, offsets

    _const = _module

    def _global(self, addresses, lanes, access):
        if addresses[0] < GLOBAL_WINDOW and addresses[0] >= MODULE_WINDOW:
            return self._module(addresses, lanes, access)
        offsets = addresses - GLOBAL_WINDOW
        self.tracker.arrays(self.frame, offsets, self.frame.each(lanes), access)
        return self.memory.buffer, offsets


class Tracker:
    """Traffic and hazards of a whole launch."""

    def __init__(self, memory, stats, module, races):
        self.memory, self.stats, self.races = memory, stats, races
        self.shadows = {}
        self.module = _constants(module)

    def start(self, size):
        """New shared memory, for other blocks."""
        nothing = np.zeros(size, bool)
        self.shared_shadow = Shadow(0, size, between_blocks=False, known=nothing)

    def finish(self):
        """Keep what the launch has written, for the next one to read."""
        for name, shadow in self.shadows.items():
            if shadow.known is not None:
                self.memory.known[name] = shadow.known_after()

    def shared(self, frame, offsets, lanes, access):
        self.stats["shared"].note(access, offsets, frame.warp_of[lanes])
        if self.races:
            _note(self.shared_shadow, frame, offsets, lanes, access)

    def arrays(self, frame, offsets, lanes, access):
        """Accesses to arrays; each must lie in one."""
        name = self.memory.find(offsets, access.width)
        if name is not None:
            self._array(name, frame, offsets, lanes, access)
            return
        for name, inside in self.memory.names(offsets, access.width):
            if name is None:
                thread, offset = frame.unique[lanes[inside][0]], offsets[inside][0]
                where = f"{access.width} bytes {self.memory.edges(offset)}"
                raise OutOfBounds(f"{thread_name(thread)} accesses {where}")
            self._array(name, frame, offsets[inside], lanes[inside], access)

    def _array(self, name, frame, offsets, lanes, access):
        self.stats[name].note(access, offsets, frame.warp_of[lanes])
        if self.races:
            _note(self._shadow(name), frame, offsets, lanes, access)

    def _shadow(self, name):
        if name not in self.shadows:
            memory = self.memory
            self.shadows[name] = Shadow(
                memory.starts[name],
                memory.ends[name],
                between_blocks=True,
                known=memory.known.get(name),
            )
        return self.shadows[name]


def _note(shadow, frame, offsets, lanes, access):
    threads, met, heard = frame.unique[lanes], frame.met[lanes], frame.heard[lanes]
    if access.writes:
        shadow.write(offsets, access.width, threads, met, heard)
    else:
        shadow.read(offsets, access.width, threads, met, heard, access.constant)


def _constants(module):
    """The module's variables, with their first values."""
    buffer = Buffer(module.spaces["module"].size)
    for offset, known, values in module.data:
        data = np.array([v % (1 << 8 * known.size) for v in values], UNSIGNED[known.size])
        buffer.bytes[offset : offset + data.nbytes] = data.view(np.uint8)
    return buffer
