"""The types of PTX, and the NumPy types that hold them."""

from typing import NamedTuple

import numpy as np

from .faults import Unsupported

UNSIGNED = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}
BOOL = np.dtype(bool)


class Format(NamedTuple):
    """A PTX type: `kind` is one of s, u, b, f (a NumPy float), B (bfloat16), x (packed), p."""

    name: str
    kind: str
    size: int
    dtype: np.dtype

    @property
    def is_float(self):
        return self.kind in "fB"

    @property
    def is_integer(self):
        return self.kind in "sub"

    @property
    def storage(self):
        """The type of the registers that hold it."""
        return BOOL if self.kind == "p" else UNSIGNED[self.size]


def _formats():
    for size in (1, 2, 4, 8):
        bits = 8 * size
        yield Format(f"s{bits}", "s", size, np.dtype(f"i{size}"))
        yield Format(f"u{bits}", "u", size, UNSIGNED[size])
        yield Format(f"b{bits}", "b", size, UNSIGNED[size])
    for size in (2, 4, 8):
        yield Format(f"f{8 * size}", "f", size, np.dtype(f"f{size}"))
    yield Format("bf16", "B", 2, UNSIGNED[2])
    for packed in ("f16x2", "bf16x2"):
        yield Format(packed, "x", 4, UNSIGNED[4])
    yield Format("pred", "p", 1, BOOL)


FORMATS = {known.name: known for known in _formats()}


def format_of(name):
    """The type of this name."""
    try:
        return FORMATS[name]
    except KeyError:
        raise Unsupported(f"type {name}") from None


def wider(known):
    """The integer type of twice the width."""
    return FORMATS[f"{known.kind}{16 * known.size}"]


def formats_in(modifiers):
    """The types among an instruction's modifiers, in order."""
    return [FORMATS[word] for word in modifiers if word in FORMATS]
