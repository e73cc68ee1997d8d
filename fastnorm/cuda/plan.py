"""Which kernels a call takes, how its rows are laid over threads, and how many blocks there are.

Pure Python that imports nothing: every width is tested without a device. All that a kernel is
compiled for is a Spec; widths share specs, so that few are ever compiled.

What a row's result depends on is its width, the types and the bytes that are moved at a time
(`Spec.access`), never how many rows there are: the order of its sums is `threads`, `vectors` and
`elements`. The order of sums over rows depends on the numbers of rows and columns alone, not on the
device, so gradients of parameters agree between devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

#: Operands that have an element for each of x's; those that have one for each column; one a row.
ROW_OPERANDS = ("x", "residual", "sum", "y", "dy", "dsum", "dx")
PARAMETERS = ("weight", "bias", "linear_bias", "gate", "dweight", "dbias")
STATISTICS = ("mean", "rstd", "shift")

WARP = 32
MAX_THREADS = 1024
#: Of a block of several rows.
BLOCK = 128
#: Elements of a row that a thread may hold, in as many registers (float64: two each), where it can
#: have 64 registers for everything: 1024 such threads fill a multiprocessor.
MOST_ELEMENTS = 32
#: What a thread gets of a narrow row: enough to make the reductions' share small.
NARROW_ELEMENTS = 16
#: Bytes of the widest access.
ACCESS_BYTES = 16
#: Bytes of a wide row that a thread asks for before it waits: some 64 KB a multiprocessor, which is
#: more than its share of what the memory must have under way.
WIDE_BYTES = 64

#: Numbers that are not integers; those of the kernels in channel_kernels.py, in order.
REALS = ("eps", "offset", "keep", "take", "bessel")
CHANNEL_NUMBERS = {
    "plane_sums": ("rows", "cols", "channels"),
    "column_moments": ("rows", "cols", "parts", "part_rows"),
    "column_sums": ("rows", "cols", "parts", "part_rows", "channels"),
    "merge": ("outer", "groups", "channels", "parts", "count", "last", "eps", "keep", "take",
              "bessel"),
    "prepare": ("channels", "eps"),
    "merge_sums": ("outer", "groups", "channels", "parts", "count"),
    "apply": ("rows", "cols", "outer", "width"),
    "apply_backward": ("rows", "cols", "outer", "width"),
}  # fmt: skip

#: Backward with sums over rows: elements of a thread, which has two sums in registers for each;
#: or two chunks, where these are more. 512 threads with 128 registers fill a multiprocessor and
#: have 32 KB under way at all times, because they ask for the next row before they sum this one.
BACKWARD_ELEMENTS = 8
BACKWARD_BLOCK = 256
BACKWARD_THREADS = 512
#: Threads of all blocks that go from row to row: as many as an H100 or H200 has room for. A
#: constant, because the order of sums over rows follows from it.
MULTIPROCESSORS = 132
RESIDENT_THREADS = MULTIPROCESSORS * BACKWARD_THREADS
#: Fewer rows a block are not worth its partial sums.
LEAST_ROWS = 2

#: Columns of a block that sums columns, in chunks, and its rows at a time.
COLUMN_CHUNKS, COLUMN_ROWS = 32, 8
#: The second stage: columns of a block, and how many partial sums it adds up side by side.
REDUCE_COLUMNS, REDUCE_LANES = 32, 16
FILL_BLOCK = 256


class Device(NamedTuple):
    """A CUDA device."""

    ordinal: int
    name: str
    capability: tuple[int, int]
    multiprocessors: int


class Spec(NamedTuple):
    """All that a kernel is compiled for."""

    kernel: str
    #: (name, type) of each array, in the order of the kernel's arguments.
    types: tuple[tuple[str, str], ...]
    compute: str
    #: Threads of a row, and rows of a block at a time.
    threads: int
    rows: int
    #: Chunks of a thread, elements of a chunk, and the most bytes of it that are moved at a time.
    vectors: int
    elements: int
    access: int
    #: Words such as "rms"; "each:weight" is a parameter of which rows have their own.
    flags: tuple[str, ...] = ()
    activation: str = ""

    def has(self, name: str) -> bool:
        return any(name == operand for operand, _ in self.types)

    def type_of(self, name: str) -> str:
        return dict(self.types)[name]


class Step(NamedTuple):
    """A launch: `arguments` are names, in the kernel's order."""

    spec: Spec
    grid: int
    block: int
    shared: int
    arguments: tuple[str, ...]


class Plan(NamedTuple):
    """The launches of a call, in order, and (name, elements, type) of each temporary."""

    steps: tuple[Step, ...]
    workspace: tuple[tuple[str, int, str], ...]
    kernel: str
    vector_bytes: int
    reason: str
    #: Numbers of single steps, by the names that these have for them.
    numbers: tuple[tuple[str, int], ...] = ()


class Tile(NamedTuple):
    """How a row is laid over threads."""

    threads: int
    vectors: int


# ---- a kernel's arguments ------------------------------------------------------------------------


def arguments(spec: Spec) -> tuple[str, ...]:
    """The names of a kernel's arguments, in order."""
    names: list[str] = []
    for name, _ in spec.types:
        names.append(name)
        if name in ROW_OPERANDS:
            names.append(f"{name}_stride")
        if f"each:{name}" in spec.flags:
            names += [f"{name}_div", f"{name}_mod"]
    names += _NUMBERS[spec.kernel]
    names += ["offset"] * ("offset" in spec.flags) + ["div", "mod"] * ("grouped" in spec.flags)
    if "runs" in spec.flags:
        names += [*["channels"] * ("channels" not in names), "factor", "places"]
    return tuple(names)


#: The numbers that a kernel takes after its arrays.
_NUMBERS = {
    "forward": ("rows", "cols", "eps"),
    "forward_wide": ("rows", "cols", "eps"),
    "backward": ("rows", "cols"),
    "backward_wide": ("rows", "cols"),
    "backward_columns": ("rows", "cols"),
    "reduce": ("cols",),
    "fill": (),
    **CHANNEL_NUMBERS,
}


def layout(spec: Spec) -> tuple[str, ...]:
    """Of each argument: "a" an array (0, 0, size, itemsize, address, shape, stride), "q" int64,
    "f" float32, "d" float64."""
    arrays = {name for name, _ in spec.types}
    real = "d" if spec.compute == "float64" else "f"
    return tuple(
        "a" if name in arrays else real if name in REALS else "q" for name in arguments(spec)
    )


# ---- rows over threads ---------------------------------------------------------------------------


def chunk(cols: int, types: Mapping[str, str], alignment: int) -> int:
    """Elements of a chunk: as many as fill `alignment` bytes of the smallest type, and divide a
    row, so that a chunk lies in its row or past it."""
    smallest = min(SIZES[kind] for name, kind in types.items() if name in ROW_OPERANDS)
    return math.gcd(max(1, alignment // smallest), cols)


def access(elements: int, types: Mapping[str, str], alignment: int) -> int:
    """The most bytes of a chunk that can be moved at a time."""
    return min(alignment, elements * max(SIZES[kind] for kind in types.values()))


def power_of_two(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(number - 1, 0).bit_length()


def bucket(vectors: int) -> int:
    """So many or a few more: 1, 2, 3, 4, 6, 8, 12 ... Fewer kernels are compiled, and what is past
    the end of a row costs no traffic."""
    whole = power_of_two(vectors)
    return whole * 3 // 4 if vectors <= whole * 3 // 4 and whole > 2 else whole


def row_tile(chunks: int, elements: int, most: int, wanted: int) -> Tile | None:
    """A row held in registers, at most so many elements a thread; None where it is too wide.

    Some lanes of a warp, or a warp, for narrow rows: several rows a warp, no barrier. Then as many
    threads as have the elements that are wanted.
    """
    narrow = power_of_two(up(chunks, max(1, min(most, NARROW_ELEMENTS) // elements)))
    if narrow <= WARP:
        return Tile(narrow, bucket(up(chunks, narrow)))
    if up(chunks, WARP) * elements <= most:
        return Tile(WARP, bucket(up(chunks, WARP)))
    wide = power_of_two(up(chunks, max(1, min(most, wanted) // elements)))
    threads = min(max(wide, 2 * WARP), MAX_THREADS)
    vectors = bucket(up(chunks, threads))
    return Tile(threads, vectors) if vectors * elements <= most else None


def up(a: int, b: int) -> int:
    """a/b, rounded up."""
    return -(-a // b)


# ---- forward -------------------------------------------------------------------------------------


def compute_type(*kinds: str) -> str:
    return "float64" if "float64" in kinds else "float32"


def forward(
    rows: int,
    cols: int,
    types: Mapping[str, str],
    *,
    alignment: int,
    rms: bool,
    activation: str | None = None,
    return_stats: bool = False,
    per_row: Mapping[str, bool] | None = None,
    offset: bool = False,
    round_before_weight: bool = False,
    round_sum: bool = False,
    aliased: bool = False,
    run: int = 1,
    alike: bool = False,
) -> Plan:
    """The plan of a norm of `rows` rows of `cols` elements.

    Parameters
    ----------
    types
        The type of each operand that there is: x, weight, bias, residual, linear_bias, gate, y,
        sum, mean, rstd; moments, of each row, in the place of y or beside it.
    alignment
        The largest power of two up to 16 that divides each row operand's address and distance of
        rows, in bytes.
    per_row
        Which parameters differ between rows.
    aliased
        Whether y or sum is the memory of x or residual.
    run
        Columns that have a parameter's element in common, one after the other.
    alike
        Whether a row has the same row of bias as of weight.
    """
    if not rows or not cols:
        values = {"mean": "zero", "rstd": "nan"}
        return fills({name: (rows, types[name], values[name]) for name in values if name in types})
    compute = compute_type(types["x"], types.get("residual", types["x"]))
    elements = chunk(cols, types, alignment)
    most = MOST_ELEMENTS if compute == "float32" else MOST_ELEMENTS // 2
    tile = row_tile(cols // elements, elements, most, WIDE_BYTES // SIZES[types["x"]])
    found = {
        "rms": rms, "offset": offset, "round_before_weight": round_before_weight,
        "round_sum": round_sum and "residual" in types, "aliased": aliased,
        **runs_of(types, run, elements),
        "alike": alike and bool(per_row and per_row.get("weight") and per_row.get("bias")),
    }  # fmt: skip
    kernel = "forward" if tile else "forward_wide"
    tile = tile or Tile(MAX_THREADS, 1)
    spec = Spec(
        kernel, in_order(types, _FORWARD_ORDER), compute, tile.threads,
        max(1, BLOCK // tile.threads), tile.vectors, elements,
        access(elements, types, alignment), _flags(found, parameters_of(per_row)),
        activation or "",
    )  # fmt: skip
    step = make_step(spec, up(rows, spec.rows))
    return Plan((step,), (), _in_words(spec), alignment, _why(spec))


def runs_of(types: Mapping[str, str], run: int, elements: int) -> dict[str, bool]:
    """Whether parameters are read by runs of columns, and whether a chunk may be in several."""
    runs = run > 1 and any(name in types for name in ("weight", "bias", "coefficients"))
    return {"runs": runs, "mixed": runs and run % elements != 0}


def run_numbers(run: int) -> dict[str, int]:
    """``column * factor >> places`` is ``column // run`` for columns below 2^31."""
    places = 31 + (run - 1).bit_length()
    return {"factor": -(-(1 << places) // run), "places": places}


def parameters_of(per_row: Mapping[str, bool] | None) -> dict[str, bool]:
    return {name: own for name, own in (per_row or {}).items() if name in PARAMETERS}


_FORWARD_ORDER = ("x", "residual", "gate", "linear_bias", "weight", "bias", "y", "sum", "mean",
                  "rstd", "moments")  # fmt: skip


# ---- backward ------------------------------------------------------------------------------------


def backward(
    rows: int,
    cols: int,
    types: Mapping[str, str],
    *,
    alignment: int,
    rms: bool,
    per_row: Mapping[str, bool] | None = None,
    offset: bool = False,
    groups: tuple[int, int] = (1, 1),
    run: int = 1,
) -> Plan:
    """The plan of a norm's gradients.

    Parameters
    ----------
    types
        The type of each operand that there is: dy, x, dsum, weight, mean, rstd, dx, dweight, dbias.
    groups
        How rows share a row of dweight and dbias: ``row // div % mod``.
    alignment, rms, per_row, run
        As for `forward`; with runs of columns, there are no sums over rows.
    """
    sums = tuple([name for name in ("dweight", "dbias") if name in types])
    if not rows or not cols:
        return fills({name: (groups[1] * cols, types[name], "zero") for name in sums})
    call = _Backward(
        rows, cols, dict(types), chunk(cols, types, alignment), alignment, rms, offset,
        bool(per_row and per_row.get("weight")), groups, sums, run,
    )  # fmt: skip
    if not sums:
        return (
            call.without_sums()
            if "dx" in types or "shift" in types
            else Plan((), (), "none", 0, "nothing is asked for")
        )
    tile = call.fused_tile()
    return call.in_two_passes() if tile is None else call.fused(*tile)


_BACKWARD_ORDER = ("dy", "x", "dsum", "weight", "mean", "rstd", "dx", "shift", "dweight", "dbias")


class _Backward(NamedTuple):
    """A backward call that has elements."""

    rows: int
    cols: int
    types: dict[str, str]
    elements: int
    alignment: int
    rms: bool
    offset: bool
    own_weights: bool
    groups: tuple[int, int]
    sums: tuple[str, ...]
    run: int = 1

    @property
    def compute(self) -> str:
        return compute_type(self.types["x"])

    @property
    def chunks(self) -> int:
        return self.cols // self.elements

    @property
    def group_rows(self) -> int:
        return self.rows // self.groups[1]

    def fused_tile(self) -> tuple[Tile, bool] | None:
        """Threads that own columns and go from row to row, with all sums in registers; and whether
        they have registers to ask for the next row ahead."""
        narrower = 1 if self.compute == "float32" else 2
        elements = max(2 * self.elements, BACKWARD_ELEMENTS // narrower)
        threads = power_of_two(up(self.chunks, elements // self.elements))
        if threads <= BACKWARD_THREADS:
            return Tile(threads, bucket(up(self.chunks, threads))), True
        # Twice as many threads of 64 registers; or as many with twice the doubles, or with twice
        # the elements that are moved a few at a time, whose places take registers too.
        few = self.elements * SIZES[self.types["x"]] < ACCESS_BYTES
        threads = BACKWARD_THREADS if few else 2 * BACKWARD_THREADS // narrower
        vectors = bucket(up(self.chunks, threads))
        most = 2 * BACKWARD_ELEMENTS // narrower if few else BACKWARD_ELEMENTS
        if vectors * self.elements <= most:
            return Tile(threads, vectors), False
        return None

    def spec(self, kernel: str, tile: Tile, at_once: int, names: set[str], *flags: str) -> Spec:
        """A kernel that works with the operands `names`."""
        types = {name: kind for name, kind in self.types.items() if name in names}
        every = {"rms": self.rms, "offset": self.offset and "weight" in types}
        every |= runs_of(types, self.run, self.elements)
        own = {"weight": self.own_weights and "weight" in types}
        return Spec(
            kernel, in_order(types, _BACKWARD_ORDER), self.compute, tile.threads, at_once,
            tile.vectors, self.elements,
            access(self.elements, types, self.alignment),
            _flags(every | dict.fromkeys(flags, True), own),
        )  # fmt: skip

    def fused(self, tile: Tile, ahead: bool) -> Plan:
        """x and dy are read once; what blocks have summed is added up by a second launch."""
        at_once = max(1, BACKWARD_BLOCK // tile.threads)
        blocks = max(MULTIPROCESSORS, RESIDENT_THREADS // (at_once * tile.threads))
        slices = self.slices(at_once, blocks)
        flags = ["sums", *["ahead"] * ahead, *self.grouped()]
        spec = self.spec("backward", tile, at_once, set(self.types), *flags)
        steps, workspace = self.in_slices(spec, slices, slices)
        return Plan(steps, workspace, _in_words(spec), self.alignment, _why(spec))

    def grouped(self) -> list[str]:
        """Whether there are groups of rows, and whether the rows of each lie together."""
        if self.groups[1] == 1:
            return []
        return ["grouped", *["adjoining"] * (self.group_rows == self.groups[0])]

    def slices(self, at_once: int, blocks: int) -> int:
        """How many of about so many blocks share a group's rows."""
        most = blocks // self.groups[1]
        return max(1, min(most, self.group_rows // (LEAST_ROWS * at_once)))

    def rowwise(self, more: dict[str, str]) -> tuple[Spec, Step]:
        """dx, and more of each row: rows held in registers, or read twice."""
        call = self._replace(types=self.types | more)
        most = MOST_ELEMENTS // (2 if self.compute == "float32" else 4)
        tile = row_tile(self.chunks, self.elements, most, most)
        names = set(call.types) - {"dweight", "dbias"}
        if tile is None:
            spec = call.spec("backward_wide", Tile(MAX_THREADS, 1), 1, names)
        else:
            spec = call.spec("backward", tile, max(1, BLOCK // tile.threads), names)
        return spec, make_step(spec, up(self.rows, spec.rows))

    def without_sums(self) -> Plan:
        spec, step = self.rowwise({})
        return Plan((step,), (), _in_words(spec), self.alignment, _why(spec))

    def in_two_passes(self) -> Plan:
        """dx, and of each row what sums over rows need, which read x and dy again."""
        shift = {} if self.rms or "dweight" not in self.sums else {"shift": self.compute}
        steps: list[Step] = []
        if "dx" in self.types or shift:
            steps.append(self.rowwise(shift)[1])
        call = self._replace(types=self.types | shift, own_weights=False, offset=False)
        names = {"dy", *self.sums}
        if "dweight" in self.sums:
            names |= {"x", "mean", "rstd", *shift}
        spec = call.spec("backward_columns", Tile(COLUMN_CHUNKS, 1), COLUMN_ROWS, names,
                         *self.grouped())  # fmt: skip
        strips = up(self.chunks, COLUMN_CHUNKS)
        threads = COLUMN_CHUNKS * COLUMN_ROWS
        slices = self.slices(COLUMN_ROWS, up(2 * RESIDENT_THREADS // threads, strips))
        more, workspace = self.in_slices(spec, slices, slices * strips)
        workspace = (*[(name, self.rows, kind) for name, kind in shift.items()], *workspace)
        return Plan(
            (*steps, *more), workspace, "row pass, column pass", self.alignment,
            f"a block's registers do not hold the sums of {self.cols} columns: x and dy are read "
            "by two passes",
        )  # fmt: skip

    def in_slices(
        self, spec: Spec, slices: int, blocks: int
    ) -> tuple[tuple[Step, ...], tuple[tuple[str, int, str], ...]]:
        """`spec` sums the rows of each group in slices, `blocks` blocks a group; slices are added
        up in their order. One slice is the result."""
        div, mod = f"{self.sums[0]}_div", f"{self.sums[0]}_mod"
        places = {"div": div, "mod": mod}
        if slices == 1:
            return (make_step(spec, blocks * self.groups[1], places),), ()
        partials = {name: f"{name}_partials" for name in self.sums}
        count = slices * self.groups[1] * self.cols
        first = make_step(spec, blocks * self.groups[1], places | partials)
        workspace = tuple([(name, count, self.compute) for name in partials.values()])
        second = reduction(partials, self.cols, self.compute, self.groups[1])
        return (first, second), workspace


def reduction(
    partials: Mapping[str, str], cols: int, compute: str, groups: int = 1, known_as: str = "cols"
) -> Step:
    """Slices added up: the names of each result and of its partial sums; `known_as` is the call's
    name of the number of columns."""
    places: dict[str, str] = {}
    for i, (result, parts) in enumerate(partials.items()):
        places |= {f"partials{i}": parts, f"result{i}": result}
    spec = Spec(
        "reduce", tuple([(name, compute) for name in places]), compute, REDUCE_COLUMNS,
        REDUCE_LANES, 1, 1, SIZES[compute],
    )  # fmt: skip
    grid = len(partials) * groups * up(cols, REDUCE_COLUMNS)
    return make_step(spec, grid, places | {"cols": known_as})


# ---- what all plans share ------------------------------------------------------------------------


def in_order(types: Mapping[str, str], order: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple([(name, types[name]) for name in order if name in types])


def _flags(found: Mapping[str, bool], each: Mapping[str, bool]) -> tuple[str, ...]:
    names = [name for name, is_so in found.items() if is_so]
    return tuple(sorted(names + [f"each:{name}" for name, own in each.items() if own]))


def resident_blocks(spec: Spec) -> int:
    """Blocks that a multiprocessor shall have room for, which caps the registers of a thread."""
    threads = MAX_THREADS
    many = spec.kernel == "backward_columns" or spec.kernel in CHANNEL_NUMBERS
    many = many or "mixed" in spec.flags  # whose parameters are read one at a time
    if spec.kernel == "column_moments":  # which holds many rows, and sums doubles
        threads = BACKWARD_THREADS // 2
    elif spec.compute == "float64" or "sums" in spec.flags or many:
        threads = BACKWARD_THREADS
    elif spec.kernel == "backward":
        threads = 4 * 128 if _one_a_register(spec) else 6 * 128
    elif spec.kernel == "forward" and spec.has("residual"):
        threads = _adding_threads(spec)
    return max(1, threads // (spec.threads * spec.rows))


def _adding_threads(spec: Spec) -> int:
    """Of 16 bits, as many as spill nothing."""
    if _one_a_register(spec):
        return 4 * 128
    numbers = SIZES[spec.type_of("x")] == 2 and "round_sum" not in spec.flags
    return 7 * 128 if numbers and spec.activation not in ("", "relu") else MAX_THREADS


def _one_a_register(spec: Spec) -> bool:
    """Whether a thread's share of a row of 16 bits, not aligned, takes twice the registers."""
    share = spec.vectors > BACKWARD_ELEMENTS
    return spec.elements == 1 and SIZES[spec.type_of("x")] == 2 and share


def make_step(spec: Spec, grid: int, places: Mapping[str, str] | None = None) -> Step:
    """A launch; `places` are the names that some of the kernel's arguments have in the call."""
    names = tuple([(places or {}).get(name, name) for name in arguments(spec)])
    return Step(spec, grid, spec.threads * spec.rows, 0, names)


def fills(arrays: Mapping[str, tuple[int, str, str]]) -> Plan:
    """No rows, or rows of no elements: (elements, type, value) of each array that has some."""
    steps = []
    for name, (count, kind, value) in arrays.items():
        if count:
            spec = Spec(
                "fill", (("array", kind),), kind, FILL_BLOCK, 1, 1, 1, SIZES[kind], (value,)
            )
            steps.append(make_step(spec, up(count, FILL_BLOCK), {"array": name}))
    return Plan(tuple(steps), (), "fill", 0, "there are no elements to sum")


def _in_words(spec: Spec) -> str:
    if spec.kernel.endswith("wide"):
        return "wide rows"
    if spec.threads < WARP:
        return "rows side by side in a warp"
    return "a row a warp" if spec.threads == WARP else "a row a block"


def _why(spec: Spec) -> str:
    if spec.kernel.endswith("wide"):
        return "rows do not fit a block's registers and are read twice"
    chunks = "chunk" if spec.vectors == 1 else "chunks"
    return (
        f"rows stay in registers, {spec.threads} threads of {spec.vectors} {chunks} of "
        f"{spec.elements} elements each, {spec.rows} at a time a block"
    )
