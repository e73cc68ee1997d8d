"""How a kernel moves chunks of one of its arrays."""

from __future__ import annotations

import functools
from typing import Any

from . import ptx
from .plan import SIZES, Spec
from .ptx import cuda
from .rows import REAL, inlined


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

    @property
    def registers(self) -> int:
        """32-bit registers of a chunk."""
        return self.words * (2 if self.kind == "float64" else 1)


class Parameter(Operand):
    """An operand with an element for each column; or, where channels run along a row, for each run
    of columns.

    ``fetch(words, at, array, first, column, there, factor, places)``: the chunk at `column` of what
    begins at `first`. ``column * factor >> places`` is the number of the run that a column is in.
    """

    def __init__(self, spec: Spec, name: str, how: str = "kept") -> None:
        super().__init__(spec, name, how)
        which = "mixed" if "mixed" in spec.flags else "runs" if "runs" in spec.flags else ""
        make = {"": _whole, "runs": _one, "mixed": _each}[which]
        self.words = {"": self.words, "runs": 1, "mixed": spec.elements}[which]
        self.fetch, self.widen = make(self.kind, spec.elements, spec.access, spec.compute, how)


@functools.cache
def _whole(kind: str, count: int, access: int, compute: str, how: str) -> tuple[Any, Any]:
    fetch = ptx.fetch(kind, count, access, how)

    @inlined
    def whole(
        words: Any, at: int, array: Any, first: int, column: int, there: bool, factor: int,
        places: int,
    ) -> None:  # fmt: skip
        fetch(words, at, array, first + column, there)

    return whole, ptx.widen(kind, count, compute)


@functools.cache
def _one(kind: str, count: int, access: int, compute: str, how: str) -> tuple[Any, Any]:
    """A chunk that lies in one run."""
    fetch, widen_one = ptx.fetch(kind, 1, SIZES[kind], how), ptx.widen(kind, 1, compute)

    @inlined
    def one(
        words: Any, at: int, array: Any, first: int, column: int, there: bool, factor: int,
        places: int,
    ) -> None:  # fmt: skip
        fetch(words, at, array, first + (column * factor >> places), there)

    @inlined
    def widen(values: Any, first: int, words: Any, at: int) -> None:
        widen_one(values, first, words, at)
        for j in range(1, count):
            values[first + j] = values[first]

    return one, widen


@functools.cache
def _each(kind: str, count: int, access: int, compute: str, how: str) -> tuple[Any, Any]:
    """A chunk in which another run may begin."""
    fetch, widen_one = ptx.fetch(kind, 1, SIZES[kind], how), ptx.widen(kind, 1, compute)

    @inlined
    def each(
        words: Any, at: int, array: Any, first: int, column: int, there: bool, factor: int,
        places: int,
    ) -> None:  # fmt: skip
        for j in range(count):
            fetch(words, at + j, array, first + ((column + j) * factor >> places), there)

    @inlined
    def widen(values: Any, first: int, words: Any, at: int) -> None:
        for j in range(count):
            widen_one(values, first + j, words, at + j)

    return each, widen


def number(spec: Spec, name: str, compute: str = "", how: str = "kept") -> Any:
    """``(array, at, there)``: one element of this array, 0 if not `there`: without a branch."""
    kind = dict(spec.types).get(name, spec.types[0][1])
    return _number(kind, compute or spec.compute, how)


@functools.cache
def _number(kind: str, compute: str, how: str) -> Any:
    fetch, widen = ptx.fetch(kind, 1, SIZES[kind], how), ptx.widen(kind, 1, compute)
    word, real = ptx.word_type(kind), REAL[compute]

    @inlined
    def number_of(array: Any, at: int, there: bool) -> Any:
        words, values = cuda.local.array(1, word), cuda.local.array(1, real)
        fetch(words, 0, array, at, there)
        widen(values, 0, words, 0)
        return values[0]

    return number_of
