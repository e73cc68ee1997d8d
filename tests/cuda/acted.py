"""Launches on the fake driver, acted out: the interpreter runs the PTX on the arrays' memory."""

import ctypes

import numpy as np

from .ptx import Kernel, Memory, launch

ARRAY_WORDS = 7


class Stage:
    """What runs what is launched; `stats` has each launch's name and what it did."""

    def __init__(self, driver, layouts):
        self.layouts = layouts  # by entry: (PTX, layout), as compiled
        self.kernels, self.stats, self.failure = {}, [], None
        driver.on_launch(self.act)

    def act(self, entry, grid, block, shared, stream, parameters):
        try:
            self.stats.append((entry, self.run(entry, grid, block, shared, parameters)))
        except Exception as failure:  # which a callback would swallow
            self.failure = self.failure or failure

    def run(self, entry, grid, block, shared, parameters):
        code, layout = self.layouts[entry]
        if entry not in self.kernels:
            self.kernels[entry] = Kernel(code, entry)
        words = np.frombuffer(parameters, np.int64)
        arrays, at = {}, 0
        for letter in layout:
            if letter == "a":
                arrays[at] = tuple(map(int, words[at : at + ARRAY_WORDS]))
            at += ARRAY_WORDS if letter == "a" else 1
        memory, places = placed(arrays.values())
        values, at = [], 0
        for letter in layout:
            if letter == "a":
                values += places.pop(0)
            else:
                kind = {"q": np.int64, "f": np.float32, "d": np.float64}[letter]
                values.append(words[at : at + 1].view(kind)[0].item())
            at += ARRAY_WORDS if letter == "a" else 1
        done = launch(self.kernels[entry], grid, block, values, memory, shared=shared)
        memory.back()
        return done


def placed(arrays):
    """The interpreter's memory, of the host's, and each array's seven words there.

    Arrays that overlap are one piece of memory.
    """
    pieces = []
    for start, end in sorted((a[4], a[4] + a[2] * a[3]) for a in arrays if a[2]):
        if pieces and start < pieces[-1][1]:
            pieces[-1][1] = max(end, pieces[-1][1])
        else:
            pieces.append([start, end])
    held = {start: _bytes(start, end) for start, end in pieces}
    memory = Memory(
        {str(start): array for start, array in held.items()},
        misalign={str(start): start % 256 for start in held},
    )
    places = []
    for _, _, size, itemsize, address, *_ in arrays:
        if not size:
            places.append([0] * ARRAY_WORDS)
            continue
        start = next(s for s, e in pieces if s <= address < e)
        pointer = memory.pointer(start, itemsize, address - start)
        places.append(list(pointer._replace(size=size).words()))
    return memory, places


def _bytes(start, end):
    """Host memory as an ndarray."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))
