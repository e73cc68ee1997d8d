"""How a kernel moves chunks of one of its arrays."""

from __future__ import annotations

from . import ptx
from .plan import Spec


class Operand:
    """Functions for chunks of one array; of x's type where there is none, so that Numba can type
    the code that it then drops."""

    def __init__(self, spec: Spec, name: str, how: str = "once") -> None:
        types = dict(spec.types)
        self.there = name in types
        self.kind = types.get(name, spec.types[0][1])
        count = spec.elements
        self.words = ptx.words_of(self.kind, count)
        self.word = ptx.word_type(self.kind)
        self.fetch = ptx.fetch(self.kind, count, spec.access, how)
        self.widen = ptx.widen(self.kind, count, spec.compute)
        self.narrow = ptx.narrow(self.kind, count)
        self.store = ptx.store(self.kind, count, spec.access)
        self.rounded = ptx.rounded(self.kind, spec.compute)
        #: Whether rows differ in it.
        self.own = f"each:{name}" in spec.flags
        #: 32-bit registers of a chunk.
        self.registers = self.words * (2 if self.kind == "float64" else 1)
