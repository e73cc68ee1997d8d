"""The interpreter's integers, bits, comparisons and moves, against Python's integers."""

import numpy as np
import pytest

from .ptx import Unsupported
from .ptx_lines import compute, dtype_of

COUNT = 512
WHOLE = ("s16", "u16", "s32", "u32", "s64", "u64")


def values(known, rng, count=COUNT):
    """Integers of every size, and the ends of the range."""
    limits = np.iinfo(dtype_of(known))
    found = rng.integers(limits.min, limits.max, count, dtype_of(known), endpoint=True)
    found >>= rng.integers(0, limits.bits, count).astype(found.dtype)
    found[:6] = limits.min, limits.max, 0, 1, 2, limits.max - 1
    return rng.permutation(found)


def wrapped(number, known):
    """A Python integer as the type holds it."""
    limits = np.iinfo(dtype_of(known))
    return (number - limits.min) % (1 << limits.bits) + limits.min


def wide(known):
    return f"{known[0]}{2 * int(known[1:])}"


def bits(known):
    return int(known[1:])


def truncated(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def check(text, function, inputs, output, *arrays):
    """A line of integers against a function of Python's integers."""
    found = compute(text, arrays, inputs, output)
    rows = zip(*([int(v) for v in array] for array in arrays), strict=True)
    for row, result in zip(rows, found, strict=True):
        assert int(result) == wrapped(function(*row), output), (text, row)


@pytest.mark.parametrize("known", WHOLE)
def test_arithmetic(known, rng):
    a, b, c = (values(known, rng) for _ in range(3))
    two, three = [known] * 2, [known] * 3
    check(f"add.{known} $z, $a, $b;", lambda a, b: a + b, two, known, a, b)
    check(f"sub.{known} $z, $a, $b;", lambda a, b: a - b, two, known, a, b)
    check(f"mul.lo.{known} $z, $a, $b;", lambda a, b: a * b, two, known, a, b)
    check(f"mul.hi.{known} $z, $a, $b;", lambda a, b: a * b >> bits(known), two, known, a, b)
    check(f"min.{known} $z, $a, $b;", min, two, known, a, b)
    check(f"max.{known} $z, $a, $b;", max, two, known, a, b)
    check(f"mad.lo.{known} $z, $a, $b, $c;", lambda a, b, c: a * b + c, three, known, a, b, c)
    hi = f"mad.hi.{known} $z, $a, $b, $c;"
    check(hi, lambda a, b, c: (a * b >> bits(known)) + c, three, known, a, b, c)


@pytest.mark.parametrize("known", ["s16", "u16", "s32", "u32"])
def test_wide_products(known, rng):
    a, b, c = values(known, rng), values(known, rng), values(wide(known), rng)
    check(f"mul.wide.{known} $z, $a, $b;", lambda a, b: a * b, [known] * 2, wide(known), a, b)
    text = f"mad.wide.{known} $z, $a, $b, $c;"
    types = [known, known, wide(known)]
    check(text, lambda a, b, c: a * b + c, types, wide(known), a, b, c)


@pytest.mark.parametrize("known", WHOLE)
def test_division(known, rng):
    a, b = values(known, rng), values(known, rng)
    b = np.where(b == 0, b.dtype.type(3), b)
    check(f"div.{known} $z, $a, $b;", truncated, [known] * 2, known, a, b)
    rest = f"rem.{known} $z, $a, $b;"
    check(rest, lambda a, b: a - truncated(a, b) * b, [known] * 2, known, a, b)


@pytest.mark.parametrize("known", ["s32", "s64"])
def test_signs(known, rng):
    a = values(known, rng)
    check(f"neg.{known} $z, $a;", lambda a: -a, [known], known, a)
    check(f"abs.{known} $z, $a;", abs, [known], known, a)


def test_saturated_sums(rng):
    a, b = values("s32", rng), values("s32", rng)
    for name, sign in (("add", 1), ("sub", -1)):

        def right(a, b, sign=sign):
            return min(max(a + sign * b, -(2**31)), 2**31 - 1)

        check(f"{name}.sat.s32 $z, $a, $b;", right, ["s32"] * 2, "s32", a, b)


def test_carries(rng):
    """Numbers of 128 bits in four registers."""
    a, b = ([values("u64", rng) for _ in range(2)] for _ in range(2))
    for name, sign in (("add", 1), ("sub", -1)):
        text = f"{name}.cc.u64 $z, $a, $b; {name}c.u64 $y, $c, $d;"
        low, high = compute(text, [a[0], b[0], a[1], b[1]], ["u64"] * 4, "u64", "u64")
        whole = [[int(x) + (int(y) << 64) for x, y in zip(*pair, strict=True)] for pair in (a, b)]
        for one, two, x, y in zip(*whole, low, high, strict=True):
            assert int(x) + (int(y) << 64) == (one + sign * two) % (1 << 128)


def test_carries_of_products(rng):
    a, b, c, d = (values("u32", rng) for _ in range(4))
    text = "mad.lo.cc.u32 $z, $a, $b, $c; madc.hi.u32 $y, $a, $b, $d;"
    low, high = compute(text, [a, b, c, d], ["u32"] * 4, "u32", "u32")
    for row in zip(a, b, c, d, low, high, strict=True):
        one, two, three, four, x, y = map(int, row)
        assert x + (y << 32) == (one * two + three + (four << 32)) % (1 << 64)


@pytest.mark.parametrize("known", ["b16", "b32", "b64"])
def test_logic(known, rng):
    unsigned = "u" + known[1:]
    a, b = values(unsigned, rng), values(unsigned, rng)
    for name, right in (("and", a & b), ("or", a | b), ("xor", a ^ b)):
        assert np.array_equal(
            compute(f"{name}.{known} $z, $a, $b;", [a, b], [known] * 2, known), right
        )
    assert np.array_equal(compute(f"not.{known} $z, $a;", [a], [known], known), ~a)
    assert np.array_equal(compute(f"cnot.{known} $z, $a;", [a], [known], known), a == 0)


@pytest.mark.parametrize("known", WHOLE)
def test_shifts(known, rng):
    """Counts past the width leave nothing, or the sign."""
    a, count = values(known, rng), rng.integers(0, 80, COUNT).astype("u4")
    types, raw = [known, "u32"], f"b{bits(known)}"
    check(f"shl.{raw} $z, $a, $b;", lambda a, n: a << n, types, known, a, count)
    check(f"shr.{known} $z, $a, $b;", lambda a, n: a >> n, types, known, a, count)


def test_funnel_shifts(rng):
    low, high = values("u32", rng), values("u32", rng)
    count = rng.integers(0, 70, COUNT).astype("u4")
    for kind, limit in (("wrap", lambda n: n & 31), ("clamp", lambda n: min(n, 32))):

        def left(a, b, n, limit=limit):
            return ((b << 32 | a) << limit(n)) >> 32

        def right(a, b, n, limit=limit):
            return (b << 32 | a) >> limit(n)

        for side, function in (("l", left), ("r", right)):
            text = f"shf.{side}.{kind}.b32 $z, $a, $b, $c;"
            check(text, function, ["u32"] * 3, "u32", low, high, count)


@pytest.mark.parametrize("known", ["u32", "s32", "u64", "s64"])
def test_bit_fields(known, rng):
    a, into = values(known, rng), values(known, rng)
    start, length = (rng.integers(0, bits(known) + 9, COUNT).astype("u4") for _ in range(2))

    def extract(a, start, length):
        """Bit by bit, as the PTX ISA writes it."""
        last = bits(known) - 1
        top = min(start + length - 1, last)
        sign = a >> top & 1 if known[0] == "s" and length else 0
        found = 0
        for place in range(bits(known)):
            inside = place < length and start + place <= last
            found |= (a >> start + place & 1 if inside else sign) << place
        return found

    def insert(a, into, start, length):
        for place in range(length):
            if start + place < bits(known):
                where = start + place
                into = into & ~(1 << where) | (a >> place & 1) << where
        return into

    text = f"bfe.{known} $z, $a, $b, $c;"
    check(text, extract, [known, "u32", "u32"], known, a, start, length)
    text, types = f"bfi.b{bits(known)} $z, $a, $b, $c, $d;", [known, known, "u32", "u32"]
    check(text, insert, types, known, a, into, start, length)


def test_counts_of_bits(rng):
    for size in (32, 64):
        raw, a = f"b{size}", values(f"u{size}", rng)
        count = f"popc.{raw} $z, $a;"
        check(count, lambda a: bin(a).count("1"), [f"u{size}"], "u32", a)
        check(f"clz.{raw} $z, $a;", lambda a, s=size: s - a.bit_length(), [f"u{size}"], "u32", a)

        def reverse(a, size=size):
            return int(f"{a:0{size}b}"[::-1], 2)

        check(f"brev.{raw} $z, $a;", reverse, [f"u{size}"], f"u{size}", a)


@pytest.mark.parametrize("known", ["u32", "s32", "u64", "s64"])
def test_highest_bit(known, rng):
    a = values(known, rng)

    def place(a):
        return (a if a >= 0 else ~a).bit_length() - 1

    check(f"bfind.{known} $z, $a;", place, [known], "u32", a)
    shift = f"bfind.shiftamt.{known} $z, $a;"
    top = bits(known) - 1
    check(shift, lambda a: top - place(a) if place(a) >= 0 else -1, [known], "u32", a)


def test_tables_of_three_bits(rng):
    a, b, c = (values("u32", rng) for _ in range(3))
    for table, right in (
        (0x96, a ^ b ^ c),
        (0xE8, (a & b) | (a & c) | (b & c)),
        (0x2A, c & ~(a & b)),
    ):
        text = f"lop3.b32 $z, $a, $b, $c, {table:#x};"
        assert np.array_equal(compute(text, [a, b, c], ["u32"] * 3, "u32"), right)


def test_permutations_of_bytes(rng):
    a, b, c = (values("u32", rng) for _ in range(3))

    def chosen(a, b, c):
        eight = a | b << 32
        found = 0
        for place in range(4):
            nibble = c >> 4 * place & 15
            byte = eight >> 8 * (nibble & 7) & 255
            found |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * place
        return found

    check("prmt.b32 $z, $a, $b, $c;", chosen, ["u32"] * 3, "u32", a, b, c)


# What the PTX ISA tabulates: for each mode and selector, the source bytes from the highest down.
BYTES = {
    "f4e": ("3210", "4321", "5432", "6543"),
    "b4e": ("5670", "6701", "7012", "0123"),
    "rc8": ("0000", "1111", "2222", "3333"),
    "ecl": ("3210", "3211", "3222", "3333"),
    "ecr": ("0000", "1110", "2210", "3210"),
    "rc16": ("1010", "3232", "1010", "3232"),
}


@pytest.mark.parametrize("mode", BYTES)
def test_modes_of_permutation(mode):
    a, b = np.full(4, 0x33221100, "u4"), np.full(4, 0x77665544, "u4")
    c = np.arange(4, dtype="u4") + 8
    found = compute(f"prmt.b32.{mode} $z, $a, $b, $c;", [a, b, c], ["u32"] * 3, "u32")
    shown = [f"{int(word):08x}" for word in found]
    assert shown == ["".join(digit * 2 for digit in row) for row in BYTES[mode]]


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("known", [*WHOLE, "b32"])
def test_comparisons(known, rng):
    typed = known.replace("b", "u")
    a, b = values(typed, rng), values(typed, rng)
    b[::3] = a[::3]
    names = {"eq": "eq", "ne": "ne"} if known == "b32" else {name: name for name in COMPARISONS}
    if known[0] == "u":
        names |= {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
    for name, meaning in names.items():
        text = f"setp.{name}.{known} %p1, $a, $b; selp.u32 $z, 1, 0, %p1;"
        right = COMPARISONS[meaning](a, b)
        assert np.array_equal(compute(text, [a, b], [typed] * 2, "u32"), right), name


def test_comparisons_combined(rng):
    """The second destination is the opposite comparison, combined with the same predicate."""
    a, b, c = (rng.integers(0, 3, COUNT).astype("i4") for _ in range(3))
    less, flag = a < b, c == 1
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    for name, function in combine.items():
        for mark, other in (("", flag), ("!", ~flag)):
            text = (
                f"setp.eq.s32 %p1, $c, 1; setp.lt.{name}.s32 %p2|%p3, $a, $b, {mark}%p1;"
                "selp.u32 $z, 1, 0, %p2; selp.u32 $y, 1, 0, %p3;"
            )
            first, second = compute(text, [a, b, c], ["s32"] * 3, "u32", "u32")
            assert np.array_equal(first, function(less, other))
            assert np.array_equal(second, function(~less, other))


def test_predicates_are_values(rng):
    a, b = (rng.integers(0, 2, COUNT).astype("u4") for _ in range(2))
    for name, right in (("and", a & b), ("or", a | b), ("xor", a ^ b)):
        text = (
            f"setp.ne.u32 %p1, $a, 0; setp.ne.u32 %p2, $b, 0; {name}.pred %p3, %p1, %p2;"
            "not.pred %p4, %p3; mov.pred %p5, %p4; selp.u32 $z, 0, 1, %p5;"
        )
        assert np.array_equal(compute(text, [a, b], ["u32"] * 2, "u32"), right)


def test_flags_as_numbers(rng):
    a, b = values("s32", rng), values("s32", rng)
    ones = compute("set.lt.u32.s32 $z, $a, $b;", [a, b], ["s32"] * 2, "u32")
    assert np.array_equal(ones, np.where(a < b, np.uint32(0xFFFF_FFFF), np.uint32(0)))
    floats = compute("set.lt.f32.s32 $z, $a, $b;", [a, b], ["s32"] * 2, "f32")
    assert np.array_equal(floats, (a < b).astype("f4"))


@pytest.mark.parametrize("known", ["b16", "b32", "b64", "f32", "f64"])
def test_selection(known, rng):
    a, b = (rng.integers(0, 99, COUNT).astype(dtype_of(known)) for _ in range(2))
    c = rng.integers(-2, 2, COUNT).astype("i4")
    text = f"setp.lt.s32 %p1, $c, 0; selp.{known} $z, $a, $b, %p1;"
    assert np.array_equal(
        compute(text, [a, b, c], [known, known, "s32"], known), np.where(c < 0, a, b)
    )
    text = f"slct.{known}.s32 $z, $a, $b, $c;"
    assert np.array_equal(
        compute(text, [a, b, c], [known, known, "s32"], known), np.where(c >= 0, a, b)
    )


def test_moves_of_parts(rng):
    a = values("u64", rng)
    text = "mov.b64 {%r1, %r2}, $a; mov.b64 $z, {%r2, %r1};"
    assert np.array_equal(
        compute(text, [a], ["b64"], "b64"), a << np.uint64(32) | a >> np.uint64(32)
    )
    text = "mov.b64 {%h1, %h2, %h3, %h4}, $a; mov.b32 $z, {%h4, %h2};"
    right = (a >> np.uint64(48)) | ((a >> np.uint64(16) & np.uint64(0xFFFF)) << np.uint64(16))
    assert np.array_equal(compute(text, [a], ["b64"], "b32"), right.astype("u4"))
    text = "mov.b64 {_, $z}, $a;"
    assert np.array_equal(compute(text, [a], ["b64"], "b32"), (a >> np.uint64(32)).astype("u4"))


def test_moves_between_kinds_keep_the_bits(rng):
    a = rng.standard_normal(COUNT).astype("f4")
    assert np.array_equal(compute("mov.b32 $z, $a;", [a], ["f32"], "b32"), a.view("u4"))
    assert np.array_equal(compute("mov.b32 $z, $a;", [a.view("u4")], ["b32"], "f32"), a)


@pytest.mark.parametrize(
    ("known", "word", "right"),
    [
        ("f32", "0f3F800000", np.float32(1)),
        ("f32", "0fFF800000", np.float32(-np.inf)),
        ("f64", "0d3FF8000000000000", 1.5),
        ("f64", "0f3FC00000", 1.5),
        ("s32", "-5", -5),
        ("u32", "0xFFU", 255),
        ("u32", "-1", 2**32 - 1),
        ("s64", "-9223372036854775808", -(2**63)),
        ("u64", "0b101", 5),
        ("b16", "0x3C00", 0x3C00),
    ],
)
def test_constants(known, word, right):
    a = np.zeros(64, dtype_of(known))
    assert (compute(f"mov.{known} $z, {word};", [a], [known], known) == right).all()


def test_unknown_opcodes_are_named():
    with pytest.raises(Unsupported, match=r"opcode nonsense.*at `nonsense.b32 %r21, %r20"):
        compute("nonsense.b32 $z, $a;", [np.zeros(32)], ["u32"], "u32")
