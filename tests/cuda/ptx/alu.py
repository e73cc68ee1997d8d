"""Arithmetic, logic, comparison and moves: from an instruction to a function of frame and lanes."""

import operator

import numpy as np

from . import arithmetic
from .approximate import coarse_reciprocal
from .arithmetic import bfloat16_bits, bfloat16_values, flush, saturate
from .faults import Unsupported
from .formats import FORMATS, UNSIGNED, formats_in, wider
from .frame import reader, writer
from .parse import Register

ROUNDINGS = {"rn", "rz", "rm", "rp"}
BUILDERS = {}


def builds(*opcodes):
    """Register the builder of these opcodes."""

    def register(build):
        BUILDERS.update(dict.fromkeys(opcodes, build))
        return build

    return register


def apply(instruction, formats, function):
    """Write a function of operands of these types to the first operand."""
    write = writer(instruction, instruction.operands[0])
    words = instruction.operands[1:]
    if len(words) != len(formats):
        raise Unsupported(f"{len(words)} operands")
    reads = [reader(instruction, word, known) for word, known in zip(words, formats, strict=True)]
    if len(reads) == 1:
        (one,) = reads
        return lambda frame, lanes: write(frame, lanes, function(one(frame, lanes)))
    if len(reads) == 2:
        one, two = reads
        return lambda frame, lanes: write(
            frame, lanes, function(one(frame, lanes), two(frame, lanes))
        )
    return lambda frame, lanes: write(
        frame, lanes, function(*[read(frame, lanes) for read in reads])
    )


def rounding(instruction):
    """The rounding that the modifiers name; the nearest if none."""
    return next((word for word in instruction.modifiers if word in ROUNDINGS), "rn")


# Floating point -----------------------------------------------------------------------------------


def floating(instruction, known, function):
    """A function of floats, with its flushing and saturation, for any float type."""
    count = len(instruction.operands) - 1
    flushing, saturating = "ftz" in instruction.modifiers, "sat" in instruction.modifiers
    if known.kind == "x":
        return apply(instruction, [known] * count, _by_halves(known, function))
    if known.kind == "B":
        return apply(instruction, [known] * count, _on_bfloat16(function))
    if not (flushing or saturating):
        return apply(instruction, [known] * count, function)

    def adjusted(*values):
        result = function(*(flush(v) for v in values)) if flushing else function(*values)
        result = flush(result) if flushing else result
        return saturate(result) if saturating else result

    return apply(instruction, [known] * count, adjusted)


def _on_bfloat16(function):
    """In float64, where sums are rounded to odd by the caller's functions, then to bfloat16."""

    def on_bits(*values):
        return bfloat16_bits(function(*(bfloat16_values(v).astype(np.float64) for v in values)))

    return on_bits


def _by_halves(known, function):
    """A function of two values that lie in one register."""
    name = known.name.removesuffix("x2")
    inner = _on_bfloat16(function) if name == "bf16" else function

    def on_words(*words):
        halves = []
        for shift in (0, 16):
            parts = [(word >> np.uint32(shift)).astype(np.uint16) for word in words]
            value = inner(*(part.view(FORMATS[name].dtype) for part in parts))
            halves.append(value.view(np.uint16).astype(np.uint32))
        return halves[0] | (halves[1] << np.uint32(16))

    return on_words


def _binary_float(name, mode):
    if name in ("add", "sub"):
        sign = 1 if name == "add" else -1
        return lambda a, b: arithmetic.add(a, b if sign == 1 else -b, mode)
    if name == "mul":
        return lambda a, b: arithmetic.multiply(a, b, mode)
    return lambda a, b: arithmetic.divide(a, b, mode)


def _odd_sum(name):
    """Sums of bfloat16 values, exact enough to be rounded again."""
    return lambda a, b: arithmetic.odd_sum(a, b if name == "add" else -b)


def _odd_fma(a, b, c):
    return arithmetic.odd_sum(a * b, c)


def _is_bfloat16(known):
    return known.name in ("bf16", "bf16x2")


@builds("add", "sub", "mul", "div")
def build_arithmetic(instruction):
    known = formats_in(instruction.modifiers)[-1]
    if known.is_integer:
        return build_integer(instruction, known)
    name, modifiers = instruction.opcode, instruction.modifiers
    if _is_bfloat16(known) and name in ("add", "sub"):
        return floating(instruction, known, _odd_sum(name))
    if name == "div" and ("approx" in modifiers or "full" in modifiers):
        return approximate(instruction, known)
    return floating(instruction, known, _binary_float(name, rounding(instruction)))


@builds("fma")
def build_fma(instruction):
    known, mode = formats_in(instruction.modifiers)[-1], rounding(instruction)
    if "relu" in instruction.modifiers:
        raise Unsupported("fma.relu")
    if _is_bfloat16(known):
        return floating(instruction, known, _odd_fma)
    return floating(instruction, known, lambda a, b, c: arithmetic.fma(a, b, c, mode))


def approximate(instruction, known):
    """An approximate function, which the launch may perturb."""
    opcode, flushing = instruction.opcode, "ftz" in instruction.modifiers
    if known.size == 8 and flushing and opcode in ("rcp", "rsqrt"):
        return apply(instruction, [known], lambda a: coarse_reciprocal(a, opcode == "rsqrt"))
    if known.kind != "f":
        raise Unsupported(f"{opcode}.{known.name}")
    write = writer(instruction, instruction.operands[0])
    reads = [reader(instruction, word, known) for word in instruction.operands[1:]]

    def execute(frame, lanes):
        values = [read(frame, lanes) for read in reads]
        write(frame, lanes, frame.approximation(opcode, known, flushing, *values))

    return execute


@builds("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def build_function(instruction):
    known, mode = formats_in(instruction.modifiers)[-1], rounding(instruction)
    if "approx" in instruction.modifiers:
        return approximate(instruction, known)
    if instruction.opcode == "sqrt":
        return floating(instruction, known, lambda a: arithmetic.square_root(a, mode))
    if instruction.opcode == "rcp":
        return floating(instruction, known, lambda a: arithmetic.divide(a.dtype.type(1), a, mode))
    raise Unsupported(f"an exact {instruction.opcode}")


@builds("copysign")
def build_copysign(instruction):
    known = formats_in(instruction.modifiers)[-1]
    return apply(instruction, [known] * 2, lambda sign, size: np.copysign(size, sign))


TESTS = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "notanumber": np.isnan,
    "number": lambda a: ~np.isnan(a),
    "normal": lambda a: np.isfinite(a) & (np.abs(a) >= np.finfo(a.dtype).tiny),
    "subnormal": lambda a: (a != 0) & (np.abs(a) < np.finfo(a.dtype).tiny),
}


@builds("testp")
def build_test(instruction):
    return apply(instruction, formats_in(instruction.modifiers), TESTS[instruction.modifiers[0]])


@builds("neg", "abs")
def build_sign(instruction):
    known = formats_in(instruction.modifiers)[-1]
    function = operator.neg if instruction.opcode == "neg" else np.abs
    if known.kind in "xB":
        return apply(instruction, [known], _sign_bits(instruction.opcode, known))
    if known.is_float:
        return floating(instruction, known, function)
    return apply(instruction, [known], function)


def _sign_bits(opcode, known):
    signs = known.dtype.type(0x8000 if known.kind == "B" else 0x8000_8000)
    return (lambda a: a ^ signs) if opcode == "neg" else (lambda a: a & ~signs)


@builds("min", "max")
def build_extreme(instruction):
    known = formats_in(instruction.modifiers)[-1]
    if known.is_integer:
        function = np.minimum if instruction.opcode == "min" else np.maximum
        return apply(instruction, [known] * 2, function)
    exact = arithmetic.minimum if instruction.opcode == "min" else arithmetic.maximum
    propagate = "NaN" in instruction.modifiers

    def of_all(first, *others):
        for other in others:
            first = exact(first, other, propagate)
        return first

    return floating(instruction, known, of_all)


# Integers -----------------------------------------------------------------------------------------


def divide_integers(a, b):
    """Towards zero; a division by zero gives all ones, as devices do."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        quotient = a // safe
    else:
        quotient = np.where(safe == -1, -a, _towards_zero(a, np.where(safe == -1, 1, safe)))
    return np.where(zero, np.array(-1).astype(a.dtype), quotient).astype(a.dtype)[()]


def _towards_zero(a, b):
    down = a // b
    return down + ((down * b != a) & ((a < 0) != (b < 0)))


def remainder(a, b):
    """What `divide_integers` leaves."""
    return a - divide_integers(a, b) * b


def high_product(a, b):
    """The upper half of a product."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
        return (a.astype(wide) * b.astype(wide) >> bits).astype(a.dtype)
    high = _high64(a.view(np.uint64), b.view(np.uint64))
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, b.view(np.uint64), np.uint64(0))
        high = high - np.where(b < 0, a.view(np.uint64), np.uint64(0))
    return high.view(a.dtype)


def _high64(a, b):
    low, half = np.uint64(0xFFFF_FFFF), np.uint64(32)
    a_low, a_high, b_low, b_high = a & low, a >> half, b & low, b >> half
    cross = a_high * b_low + (a_low * b_low >> half)
    other = a_low * b_high + (cross & low)
    return a_high * b_high + (cross >> half) + (other >> half)


def saturated_sum(sign):
    def add(a, b):
        wide = a.astype(np.int64) + sign * b.astype(np.int64)
        return np.clip(wide, -(2**31), 2**31 - 1).astype(np.int32)

    return add


INTEGER = {
    "add": operator.add,
    "sub": operator.sub,
    "div": divide_integers,
    "rem": remainder,
}


def build_integer(instruction, known):
    """add, sub, mul, div of integers."""
    modifiers, opcode = instruction.modifiers, instruction.opcode
    if "cc" in modifiers:
        return build_carry(instruction)
    if opcode == "mul":
        return apply(instruction, [known] * 2, _product(modifiers, known))
    if "sat" in modifiers:
        return apply(instruction, [known] * 2, saturated_sum(1 if opcode == "add" else -1))
    return apply(instruction, [known] * 2, INTEGER[opcode])


@builds("rem")
def build_remainder(instruction):
    return build_integer(instruction, formats_in(instruction.modifiers)[-1])


def _product(modifiers, known):
    if "wide" in modifiers:
        wide = wider(known).dtype
        return lambda a, b: a.astype(wide) * b.astype(wide)
    if "hi" in modifiers:
        return high_product
    return operator.mul


@builds("mad")
def build_mad(instruction):
    known = formats_in(instruction.modifiers)[-1]
    if known.is_float:
        return build_fma(instruction)
    if "cc" in instruction.modifiers:
        return build_carry(instruction)
    product = _product(instruction.modifiers, known)
    last = wider(known) if "wide" in instruction.modifiers else known
    return apply(instruction, [known, known, last], lambda a, b, c: product(a, b) + c)


@builds("addc", "subc", "madc")
def build_carry(instruction):
    """Sums that take and leave a carry. A difference carries where it does not borrow."""
    known = formats_in(instruction.modifiers)[-1]
    modifiers, opcode = instruction.modifiers, instruction.opcode
    write = writer(instruction, instruction.operands[0])
    reads = [
        reader(instruction, word, FORMATS[f"u{8 * known.size}"])
        for word in instruction.operands[1:]
    ]
    product = _product(modifiers, known)

    def execute(frame, lanes):
        *factors, b = [read(frame, lanes) for read in reads]
        a = factors[0] if len(factors) == 1 else product(*(f.view(known.dtype) for f in factors))
        a = a.view(b.dtype)
        subtracts = opcode.startswith("sub")
        b = ~b if subtracts else b
        first = a.dtype.type(subtracts)
        if opcode.endswith("c"):
            first = _carry(frame, lanes).astype(a.dtype)
        half = a + b
        total = half + first
        if "cc" in modifiers:
            frame.carry_after(lanes, (half < a) | (total < half))
        write(frame, lanes, total)

    return execute


def _carry(frame, lanes):
    if frame.carry is None:
        raise Unsupported("a carry that nothing has left")
    return frame.carry if lanes is None else frame.carry[lanes]


# Bits ---------------------------------------------------------------------------------------------

LOGIC = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


@builds("and", "or", "xor")
def build_logic(instruction):
    known = formats_in(instruction.modifiers)[-1]
    return apply(instruction, [known] * 2, LOGIC[instruction.opcode])


@builds("not")
def build_not(instruction):
    return apply(instruction, formats_in(instruction.modifiers), operator.invert)


@builds("cnot")
def build_cnot(instruction):
    known = formats_in(instruction.modifiers)[-1]
    return apply(instruction, [known], lambda a: (a == 0).astype(known.dtype))


@builds("shl", "shr")
def build_shift(instruction):
    known = formats_in(instruction.modifiers)[-1]
    function = _left if instruction.opcode == "shl" else _right
    return apply(instruction, [known, FORMATS["u32"]], function)


def _left(a, count):
    bits = 8 * a.dtype.itemsize
    shifted = a << np.minimum(count, bits - 1).astype(a.dtype)
    return np.where(count < bits, shifted, a.dtype.type(0))[()]


def _right(a, count):
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < bits, shifted, a.dtype.type(0))[()]


@builds("shf")
def build_funnel(instruction):
    left, wraps = "l" in instruction.modifiers, "wrap" in instruction.modifiers
    word = FORMATS["b32"]

    def function(low, high, count):
        count = (count & 31 if wraps else np.minimum(count, 32)).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        if left:
            return (both << count >> np.uint64(32)).astype(np.uint32)
        return (both >> count).astype(np.uint32)

    return apply(instruction, [word, word, FORMATS["u32"]], function)


@builds("lop3")
def build_lop3(instruction):
    """Any function of three bits: the last operand is its table."""
    *words, table = instruction.operands
    table = int(table, 0)

    def function(a, b, c):
        result = np.zeros_like(a | b | c)
        for row in range(8):
            if table >> row & 1:
                pick = [v if row & bit else ~v for v, bit in ((a, 4), (b, 2), (c, 1))]
                result = result | (pick[0] & pick[1] & pick[2])
        return result

    return apply(instruction._replace(operands=tuple(words)), [FORMATS["b32"]] * 3, function)


@builds("bfe")
def build_extract(instruction):
    known, byte = formats_in(instruction.modifiers)[-1], FORMATS["u32"]
    bits = 8 * known.size

    def function(a, start, length):
        start = np.minimum(start & 255, bits).astype(np.int64)
        length = np.minimum(length & 255, bits).astype(np.int64)
        signed = known.kind == "s"
        room = np.maximum(bits - start - length, 0).astype(np.uint32)
        raised = _left(a.view(UNSIGNED[known.size]), room)
        lowered = _right(
            raised.view(known.dtype), (room + np.minimum(start, bits)).astype(np.uint32)
        )
        over = start + length > bits
        if signed:
            filled = _right(a, np.minimum(start, bits - 1).astype(np.uint32))
            lowered = np.where(over, filled, lowered)
        return np.where(length == 0, known.dtype.type(0), lowered)[()]

    return apply(instruction, [known, byte, byte], function)


@builds("bfi")
def build_insert(instruction):
    known, byte = formats_in(instruction.modifiers)[-1], FORMATS["u32"]

    def function(a, into, start, length):
        ones = ~known.dtype.type(0)
        start, length = start & 255, length & 255
        mask = _left(~_left(np.broadcast_to(ones, np.shape(length)), length), start)
        return (_left(a, start) & mask) | (into & ~mask)

    return apply(instruction, [known, known, byte, byte], function)


@builds("popc")
def build_count(instruction):
    known = formats_in(instruction.modifiers)
    return apply(instruction, known, lambda a: np.bitwise_count(a).astype(np.uint32))


def _leading_zeros(a):
    """Zeros above the highest bit that is set, by halving."""
    bits = 8 * a.dtype.itemsize
    count = np.full(np.shape(a), bits, np.uint32)
    for shift in range(bits):
        count = np.where((a >> a.dtype.type(shift)) != 0, np.uint32(bits - 1 - shift), count)
    return count[()]


@builds("clz")
def build_leading(instruction):
    return apply(instruction, formats_in(instruction.modifiers), _leading_zeros)


@builds("bfind")
def build_find(instruction):
    known = formats_in(instruction.modifiers)[-1]
    bits = 8 * known.size

    def function(a):
        a = np.where(a < 0, ~a, a).astype(UNSIGNED[known.size])
        zeros = _leading_zeros(a)
        place = zeros if "shiftamt" in instruction.modifiers else np.uint32(bits - 1) - zeros
        return np.where(zeros == bits, np.uint32(0xFFFF_FFFF), place)[()]

    return apply(instruction, [known], function)


@builds("brev")
def build_reverse(instruction):
    known = formats_in(instruction.modifiers)[-1]

    def function(a):
        result = a & known.dtype.type(0)
        for place in range(8 * known.size):
            bit = (a >> known.dtype.type(place)) & known.dtype.type(1)
            result = result | (bit << known.dtype.type(8 * known.size - 1 - place))
        return result

    return apply(instruction, [known], function)


# Which of the bytes (a: 0 to 3, b: 4 to 7) each byte of the result is, for each value of c & 3.
PERMUTATIONS = {
    "f4e": ((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)),
    "b4e": ((0, 7, 6, 5), (1, 0, 7, 6), (2, 1, 0, 7), (3, 2, 1, 0)),
    "rc8": ((0,) * 4, (1,) * 4, (2,) * 4, (3,) * 4),
    "ecl": ((0, 1, 2, 3), (1, 1, 2, 3), (2, 2, 2, 3), (3, 3, 3, 3)),
    "ecr": ((0, 0, 0, 0), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 3)),
    "rc16": ((0, 1, 0, 1), (2, 3, 2, 3), (0, 1, 0, 1), (2, 3, 2, 3)),
}


@builds("prmt")
def build_permute(instruction):
    mode = next((word for word in instruction.modifiers if word in PERMUTATIONS), None)
    return apply(instruction, [FORMATS["b32"]] * 3, lambda a, b, c: permute(a, b, c, mode))


def permute(a, b, c, mode=None):
    """Four bytes of eight."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    result = np.uint32(0)
    for place in range(4):
        if mode:
            nibble = np.array(PERMUTATIONS[mode])[:, place][(c & 3).astype(int)].astype(np.uint32)
        else:
            nibble = (c >> np.uint32(4 * place)) & np.uint32(15)
        byte = (both >> (8 * (nibble & np.uint32(7))).astype(np.uint64)).astype(np.uint32) & 255
        sign = np.where(byte & 0x80, np.uint32(255), np.uint32(0))
        byte = np.where(nibble & 8, sign, byte)
        result = result | (byte << np.uint32(8 * place))
    return result.astype(np.uint32)[()]


# Comparison and moves -----------------------------------------------------------------------------


def _unordered(a, b):
    return np.isnan(a) | np.isnan(b)


COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
    "equ": lambda a, b: (a == b) | _unordered(a, b),
    "neu": lambda a, b: ~(a == b),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~_unordered(a, b),
    "nan": _unordered,
}


def _ordered_unequal(a, b):
    """`ne` of floats is false for NaN; NumPy's is true."""
    return (a != b) & ~_unordered(a, b)


def comparison(name, known):
    """The function of this name for operands of this type."""
    if name == "ne" and known.is_float:
        return _ordered_unequal
    return COMPARISONS[name]


def _values(known):
    """What makes numbers of the bits of a type."""
    return bfloat16_values if known.kind == "B" else (lambda bits: bits)


@builds("setp", "set")
def build_comparison(instruction):
    """Compare, combine with a predicate if there is one, write one result or two."""
    known = formats_in(instruction.modifiers)[-1]
    compare, values = comparison(instruction.modifiers[0], known), _values(known)
    combine = next((LOGIC[word] for word in instruction.modifiers if word in LOGIC), None)
    first, _, second = instruction.operands[0].partition("|")
    writes = [writer(instruction, word.strip()) for word in (first, second) if word.strip()]
    one, two = (reader(instruction, word, known) for word in instruction.operands[1:3])
    flushing = "ftz" in instruction.modifiers
    result = _flag_format(instruction)
    if combine:
        other = reader(instruction, instruction.operands[3], FORMATS["pred"])

    def execute(frame, lanes):
        a, b = values(one(frame, lanes)), values(two(frame, lanes))
        found = compare(flush(a), flush(b)) if flushing else compare(a, b)
        for write, flags in zip(writes, (found, ~found), strict=False):
            if combine:
                flags = combine(flags, other(frame, lanes))
            write(frame, lanes, result(flags))

    return execute


def _flag_format(instruction):
    """What `set` makes of a flag: all bits, or 1.0."""
    if instruction.opcode == "setp":
        return lambda flags: flags
    known = formats_in(instruction.modifiers)[0]
    true = known.dtype.type(1) if known.kind == "f" else ~UNSIGNED[known.size].type(0)
    return lambda flags: np.where(flags, true, true.dtype.type(0))[()]


@builds("selp")
def build_select(instruction):
    """One of two operands; it may be the only one that has been written."""
    known = formats_in(instruction.modifiers)[-1]
    write = writer(instruction, instruction.operands[0])
    words = instruction.operands[1:3]
    reads = [quiet_reader(instruction, word, known) for word in words]
    choose = reader(instruction, instruction.operands[3], FORMATS["pred"])
    index = instruction.lookup(instruction.operands[0]).index

    def execute(frame, lanes):
        flags = choose(frame, lanes)
        (a, a_unset), (b, b_unset) = (read(frame, lanes) for read in reads)
        write(frame, lanes, np.where(flags, a, b)[()])
        frame.forget(index, lanes, np.where(flags, a_unset, b_unset))

    return execute


def quiet_reader(instruction, word, known):
    """Values and where they have not been written: for what only copies them."""
    meaning = instruction.lookup(word)
    if not isinstance(meaning, Register):
        read = reader(instruction, word, known)
        return lambda frame, lanes: (read(frame, lanes), np.False_)
    index, nothing = meaning.index, known.dtype.type(0)

    def read_quietly(frame, lanes):
        unset = frame.is_undefined(index, lanes)
        if frame.values[index] is None:
            return nothing, unset
        return frame.look(index, lanes).view(known.dtype), unset

    return read_quietly


@builds("slct")
def build_sign_select(instruction):
    known, sign = formats_in(instruction.modifiers)
    return apply(instruction, [known, known, sign], lambda a, b, c: np.where(c >= 0, a, b)[()])


@builds("mov")
def build_move(instruction):
    """A copy: what has not been written stays so."""
    known = formats_in(instruction.modifiers)[-1]
    target, source = instruction.operands
    if target.startswith("{") or source.startswith("{"):
        return apply(instruction, [known], lambda a: a)
    write = writer(instruction, target)
    read = quiet_reader(instruction, source, known)
    index = instruction.lookup(target).index

    def execute(frame, lanes):
        value, unset = read(frame, lanes)
        write(frame, lanes, value)
        frame.forget(index, lanes, unset)

    return execute
