"""Forward kernels: y, the sum where a residual is added, and the statistics.

`forward` holds a row in registers, so that it is read once; `forward_wide` reads it twice, the
second time from the L2 cache for the most part. Both form, as the CPU does,

    pivot = round(mean(x))    c = mean(x - pivot)    variance = mean((x - pivot)**2) - c*c
    y = ((x - pivot)*rstd - c*rstd)*weight + bias

because a mean rounded to the type of x can be off by much of a standard deviation. Where the pivot
was too far off it is moved by c; where the sums left the range of the type, the row is multiplied
by a power of two, which costs little, as it stands in registers. Both are one rare branch.
"""

from __future__ import annotations

import math
from typing import Any

from . import plan, ptx
from .activation import activation
from .operands import Operand, Parameter
from .plan import Spec
from .ptx import cuda, float64, int32, int64
from .rows import (
    INTEGER,
    RANGE,
    REAL,
    anyone,
    inlined,
    inverse_root,
    largest,
    log2,
    parameter_row,
    reciprocal,
    room_size,
    scaling,
    summing,
    this_block,
    this_thread,
)  # fmt: skip

#: Registers for the row's elements and for weight and bias together, up to which these are asked
#: for before the row is summed, so that they are there when the sums are. More would be spilled;
#: and fewer still where the row is a sum that is held as numbers.
HELD_AND_HOISTED, HELD_AND_HOISTED_SUMS = 36, 32
#: Chunks that a thread of a wide row has in flight.
WIDE_CHUNKS = 4


def _adding(spec: Spec) -> Any:
    """``(values, other, xs, at, rs, r_at, gs, ls)``: x*gate + linear_bias + residual of chunks as
    they were loaded, each step rounded. Without a residual, x."""
    x, residual = Operand(spec, "x"), Operand(spec, "residual")
    gate, linear_bias = Operand(spec, "gate"), Operand(spec, "linear_bias")
    elements, has_gate, has_bias = spec.elements, gate.there, linear_bias.there
    product = ptx.product(spec.compute)

    x_widen, r_widen, g_widen, l_widen = x.widen, residual.widen, gate.widen, linear_bias.widen

    @inlined
    def only_x(
        values: Any, other: Any, xs: Any, at: int, rs: Any, r_at: int, gs: Any, ls: Any
    ) -> None:
        x_widen(values, 0, xs, at)

    @inlined
    def add(
        values: Any, other: Any, xs: Any, at: int, rs: Any, r_at: int, gs: Any, ls: Any
    ) -> None:
        x_widen(values, 0, xs, at)
        if has_gate:
            g_widen(other, 0, gs, 0)
            for j in range(elements):
                values[j] = product(values[j], other[j])
        if has_bias:
            l_widen(other, 0, ls, 0)
            for j in range(elements):
                values[j] += other[j]
        r_widen(other, 0, rs, r_at)
        for j in range(elements):
            values[j] += other[j]

    return add if residual.there else only_x


def _finish(spec: Spec) -> Any:
    """``(values, weights, biases, pivot, rstd, shift, offset)``: a chunk's y from its x."""
    weight, bias, y = Operand(spec, "weight"), Operand(spec, "bias"), Operand(spec, "y")
    has_weight, has_bias, elements = weight.there, bias.there, spec.elements
    round_first, has_offset = "round_before_weight" in spec.flags, "offset" in spec.flags
    rounded = y.rounded
    activated, active = activation(spec.activation, spec.compute), bool(spec.activation)

    @inlined
    def finish(
        values: Any, weights: Any, biases: Any, pivot: Any, rstd: Any, shift: Any, offset: Any
    ) -> None:
        for j in range(elements):
            value = (values[j] - pivot) * rstd + shift
            if round_first:
                value = rounded(value)
            if has_weight:
                factor = weights[j]
                if has_offset:
                    factor += offset
                value *= factor
                if has_bias:  # in one instruction with the product
                    value += biases[j]
            elif has_bias:
                value += biases[j]
            if active:
                value = activated(value)
            values[j] = value

    return finish


def _rstds(spec: Spec) -> Any:
    """``(variance, padding, padded, eps, exponent)``: what the row, times 2^exponent, is multiplied
    by, and the rstd of the row as it came."""
    rms, real, most = "rms" in spec.flags, REAL[spec.compute], RANGE[spec.compute].most
    scaled, inverse_root_of = scaling(spec.compute), inverse_root(spec.compute)

    @inlined
    def rstds(variance: Any, padding: Any, padded: Any, eps: Any, exponent: int) -> Any:
        if variance < 0:
            variance = real(0)
        root = inverse_root_of(variance + padding)
        reported = scaled(root, exponent)
        if padding > most:  # next to which the variance is nothing
            reported = inverse_root_of(eps)
            root = scaled(reported, -exponent)
        if variance == 0:
            reported = inverse_root_of(eps)
            root = root if root <= most else real(0)
        if rms and padded > most and padding <= most:  # infinity among the elements
            root = real(math.nan)
            reported = root
        return root, reported

    return rstds


def _firsts(spec: Spec) -> Any:
    """``(row, weight_div, weight_mod, bias_div, bias_mod, width)``: where the row's weight and
    bias begin; one place, if rows differ alike in both."""
    own_weight, own_bias = "each:weight" in spec.flags, "each:bias" in spec.flags
    alike = "alike" in spec.flags

    @inlined
    def firsts(
        row: int, weight_div: int, weight_mod: int, bias_div: int, bias_mod: int, width: int
    ) -> Any:
        weight_first, bias_first = int64(0), int64(0)
        if own_weight:
            weight_first += parameter_row(row, weight_div, weight_mod) * width
        if alike:
            bias_first = weight_first
        elif own_bias:
            bias_first += parameter_row(row, bias_div, bias_mod) * width
        return weight_first, bias_first

    return firsts


def _moments(spec: Spec) -> Any:
    """``(moments, row, rows, cols, pivot, c, variance, exponent)``: of the row as it came, the
    pivot, the mean's distance from it, and the sum of squares of the distances from the mean: in
    double, three arrays of `rows`, one after the other."""
    scaled = scaling("float64")

    @inlined
    def write(
        moments: Any, row: int, rows: int, cols: int, pivot: Any, c: Any, variance: Any,
        exponent: int,
    ) -> None:  # fmt: skip
        back = -int64(exponent)
        moments[row] = scaled(float64(pivot), back)
        moments[rows + row] = scaled(float64(c), back)
        square = float64(variance if variance > 0 else 0 * variance)
        moments[2 * rows + row] = scaled(square * cols, 2 * back)

    return write


def forward(spec: Spec) -> Any:
    """A row in registers: by some lanes of a warp, a warp, or a block."""
    threads, rows_at_once, vectors, elements = (
        spec.threads, spec.rows, spec.vectors, spec.elements,
    )  # fmt: skip
    how = "own" if "aliased" in spec.flags else "once"
    compute = spec.compute
    real, integer, limits = REAL[compute], INTEGER[compute], RANGE[compute]
    x, residual = Operand(spec, "x", how), Operand(spec, "residual", how)
    gate, linear_bias = Operand(spec, "gate", "kept"), Operand(spec, "linear_bias", "kept")
    weight, bias = Parameter(spec, "weight"), Parameter(spec, "bias")
    y, sums = Operand(spec, "y"), Operand(spec, "sum")
    held_count = vectors * elements
    # Rows of 16 bits stay as they came, which takes half the registers; what is computed with is
    # made of them each time. Not those that are moved one at a time: each has a register anyway.
    held = sums if residual.there else x
    packed = elements > 1 and plan.SIZES[held.kind] == 2
    packed = packed and ("round_sum" in spec.flags or not residual.there)
    x_count = vectors * x.words
    h_count, h_words, h_word = vectors * held.words, held.words, held.word
    number_count = 1 if packed else held_count
    r_count = vectors * residual.words if residual.there else 1
    round_sum, round_to_sum = "round_sum" in spec.flags, sums.rounded
    needed = vectors * (weight.registers * weight.there + bias.registers * bias.there)
    loose = residual.there and not packed
    taken = held_count * (2 if compute == "float64" else 1) + needed
    hoisted = taken <= (HELD_AND_HOISTED_SUMS if loose else HELD_AND_HOISTED)
    # Where rows are added, or chunks are many because rows are not aligned, there are no registers
    # for parameters of several chunks at a time; and ptxas asks for more where a wide weight is
    # alone.
    wide = "rms" in spec.flags and weight.registers > x.registers
    narrow = spec.access < 16
    if not hoisted and (residual.there or wide or narrow):
        weight, bias = Parameter(spec, "weight", "own"), Parameter(spec, "bias", "own")
    if loose or narrow:
        gate, linear_bias = Operand(spec, "gate", "own"), Operand(spec, "linear_bias", "own")
    # A loop with so much in it may be left as one; what it found by its number would then be held
    # in memory, not in registers.
    turns = spec.activation == "gelu"
    w_count = (vectors if hoisted and weight.there else 1) * weight.words
    b_count = (vectors if hoisted and bias.there else 1) * bias.words
    w_step, b_step = (weight.words, bias.words) if hoisted else (0, 0)
    rms, adds, has_sum = "rms" in spec.flags, residual.there, sums.there
    has_weight, has_bias = weight.there, bias.there
    has_mean, has_rstd = spec.has("mean"), spec.has("rstd")
    has_moments, has_y, runs = spec.has("moments"), y.there, "runs" in spec.flags
    write_moments = _moments(spec)
    # A float16 row cannot leave the range of float32.
    scales = held.kind != "float16" or not packed
    shift_of_chunk, size = log2(elements), room_size(threads, rows_at_once)
    one, two = summing(threads, rows_at_once, 1), summing(threads, rows_at_once, 2)
    top, among = largest(threads, rows_at_once), anyone(threads, rows_at_once)
    magnitude, scaled = ptx.bits_of(compute), scaling(compute)
    reciprocal_of, rstds = reciprocal(compute), _rstds(spec)
    added, finish = _adding(spec), _finish(spec)
    least, most, infinity = limits.least, limits.most, limits.infinity
    mantissa, half = limits.mantissa, limits.half
    x_fetch, r_fetch, g_fetch = x.fetch, residual.fetch, gate.fetch
    l_fetch, w_fetch, b_fetch = linear_bias.fetch, weight.fetch, bias.fetch
    w_widen, b_widen, y_narrow, y_store = weight.widen, bias.widen, y.narrow, y.store
    s_narrow, s_store = sums.narrow, sums.store
    x_word, r_word, g_word, l_word = x.word, residual.word, gate.word, linear_bias.word
    x_widen, h_widen, h_narrow = x.widen, held.widen, held.narrow
    w_word, b_word, y_word, s_word = weight.word, bias.word, y.word, sums.word
    g_words, l_words, y_words, s_words = gate.words, linear_bias.words, y.words, sums.words
    x_words, r_words = x.words, residual.words
    has_gate, has_linear_bias = gate.there, linear_bias.there
    own_gate, own_linear_bias = gate.own, linear_bias.own
    firsts = _firsts(spec)

    @inlined
    def numbers(values: Any, held: Any, words: Any, k: int) -> None:
        """The row's k-th chunk."""
        if packed:
            h_widen(values, 0, words, k * h_words)
        else:
            for j in range(elements):
                values[j] = held[k * elements + j]

    @inlined
    def anew(words: Any, nothing: int) -> None:
        """Without it, the compiler would keep the numbers of one pass for the next one."""
        if packed:
            for k in range(h_count):
                words[k] += nothing

    @inlined
    def turn(held: Any, words: Any, weights: Any, biases: Any) -> None:
        """The next chunk, and its parameters, to where the first one is."""
        for i in range(number_count - elements):
            held[i] = held[i + elements]
        for i in range(h_count - h_words if packed else 0):
            words[i] = words[i + h_words]
        for i in range(w_count - w_step if hoisted and has_weight else 0):
            weights[i] = weights[i + w_step]
        for i in range(b_count - b_step if hoisted and has_bias else 0):
            biases[i] = biases[i + b_step]

    @inlined
    def row_total(values: Any, held: Any, words: Any, room: Any, phase: int) -> Any:
        total = real(0)
        for k in range(vectors):
            numbers(values, held, words, k)
            part = values[0]
            for j in range(1, elements):
                part += values[j]
            total += part
        total, _, _ = one(total, total, total, room, phase)
        return total

    def kernel(
        x: Any, x_stride: int, residual: Any, residual_stride: int,
        gate: Any, gate_div: int, gate_mod: int,
        linear_bias: Any, linear_bias_div: int, linear_bias_mod: int,
        weight: Any, weight_div: int, weight_mod: int, bias: Any, bias_div: int, bias_mod: int,
        y: Any, y_stride: int, sum: Any, sum_stride: int, mean: Any, rstd: Any,
        moments: Any, rows: int, cols: int, eps: Any, offset: Any,
        channels: int, factor: int, places: int,
    ) -> None:  # fmt: skip
        held = cuda.local.array(number_count, real)
        words = cuda.local.array(h_count, h_word)
        xs = cuda.local.array(x_count, x_word)
        values = cuda.local.array(elements, real)
        other = cuda.local.array(elements, real)
        weights = cuda.local.array(w_count, w_word)
        biases = cuda.local.array(b_count, b_word)
        factors = cuda.local.array(elements, real)
        terms = cuda.local.array(elements, real)
        results = cuda.local.array(y_words, y_word)
        room = cuda.shared.array(size, real)
        tops = cuda.shared.array(size, integer)

        lane = this_thread() % threads
        row = this_block() * rows_at_once + this_thread() // threads
        inside = row < rows
        # A row past the last has no chunks, but its threads take part in all sums.
        left = int32((cols >> shift_of_chunk) - lane) if inside else int32(0)
        column = int64(lane * elements)
        place = row * x_stride + column

        if adds:
            rs = cuda.local.array(r_count, r_word)
            gs = cuda.local.array(g_words, g_word)
            ls = cuda.local.array(l_words, l_word)
            ss = cuda.local.array(s_words, s_word)
            other_place = row * residual_stride + column
            sum_place = row * sum_stride + column
            gate_place, bias_place = column, column
            if own_gate:
                gate_place += parameter_row(row, gate_div, gate_mod) * cols
            if own_linear_bias:
                bias_place += parameter_row(row, linear_bias_div, linear_bias_mod) * cols
            for k in range(vectors):
                there, step = left > k * threads, k * threads * elements
                x_fetch(xs, k * x_words, x, place + step, there)
                r_fetch(rs, k * r_words, residual, other_place + step, there)
            for k in range(vectors):
                there, step = left > k * threads, k * threads * elements
                if has_gate:
                    g_fetch(gs, 0, gate, gate_place + step, there)
                if has_linear_bias:
                    l_fetch(ls, 0, linear_bias, bias_place + step, there)
                added(values, other, xs, k * x_words, rs, k * r_words, gs, ls)
                if has_sum:
                    s_narrow(ss, 0, values)
                    s_store(sum, sum_place + step, ss, 0, there)
                if packed:
                    h_narrow(words, k * h_words, values)
                else:
                    for j in range(elements):
                        held[k * elements + j] = round_to_sum(values[j]) if round_sum else values[j]
        else:
            for k in range(vectors):
                x_fetch(xs, k * x_words, x, place + k * threads * elements, left > k * threads)

        if hoisted:
            weight_first, bias_first = firsts(
                row, weight_div, weight_mod, bias_div, bias_mod, channels if runs else cols
            )
            for k in range(vectors):
                there, at = left > k * threads, column + k * threads * elements
                if has_weight:
                    w_fetch(weights, k * w_step, weight, weight_first, at, there, factor, places)
                if has_bias:
                    b_fetch(biases, k * b_step, bias, bias_first, at, there, factor, places)

        if not adds:
            for k in range(vectors):
                if packed:
                    for j in range(x_words):
                        words[k * h_words + j] = xs[k * x_words + j]
                else:
                    x_widen(held, k * elements, xs, k * x_words)
        per_n = reciprocal_of(cols)
        padding, exponent = eps, integer(0)
        pivot, phase = real(0), 0
        nothing = int32(cols >> 40)  # zero, which the compiler cannot know
        if not rms:
            pivot = row_total(values, held, words, room, phase) * per_n
            phase = 1
        c, variance, padded = real(0), real(0), real(0)
        for attempt in range(4):
            anew(words, nothing)
            first, second = real(0), real(0)
            for k in range(vectors):
                # What is past the end reads as 0.
                middle = pivot if left > k * threads else real(0)
                part, square = real(0), real(0)
                numbers(values, held, words, k)
                for j in range(elements):
                    away = values[j] - middle
                    part += away
                    square += away * away
                first += part
                second += square
            if rms:
                second, _, _ = one(second, second, second, room, phase)
            else:
                first, second, _ = two(first, second, second, room, phase)
                c = first * per_n
            phase ^= 1
            variance = second * per_n - c * c
            padded = variance + padding
            fine = least <= padded and padded <= most
            settled = fine and c * c <= variance * real(0.25)
            if attempt == 3 or not among(not settled):
                break
            moved = pivot + c
            if attempt == 0 and scales:
                bits = integer(0)
                anew(words, nothing)
                for k in range(vectors):
                    numbers(values, held, words, k)
                    for j in range(elements):
                        size_of_one = magnitude(values[j])
                        bits = size_of_one if size_of_one > bits else bits
                bits = top(bits, tops)
                if not fine and bits > 0 and bits < infinity:
                    exponent = integer(half - (bits >> mantissa))
                    padding = scaled(scaled(eps, exponent), exponent)
                if packed:  # exact, but for what is nothing next to the largest
                    anew(words, nothing)
                    for k in range(vectors):
                        numbers(values, held, words, k)
                        for j in range(elements):
                            values[j] = scaled(values[j], exponent)
                        h_narrow(words, k * h_words, values)
                else:
                    for k in range(held_count):
                        held[k] = scaled(held[k], exponent)
                if not rms:
                    anew(words, nothing)
                    total = row_total(values, held, words, room, phase)
                    phase ^= 1
                    if not fine:
                        moved = total * per_n
            if not rms and not settled:
                pivot = moved

        anew(words, nothing)
        root, reported = rstds(variance, padding, padded, eps, exponent)
        shift = -c * root
        if lane == 0 and inside:
            if has_mean:
                mean[row] = scaled(pivot + c, -exponent)
            if has_rstd:
                rstd[row] = reported
            if has_moments:
                write_moments(moments, row, rows, cols, pivot, c, variance, exponent)

        if not hoisted:
            weight_first, bias_first = firsts(
                row, weight_div, weight_mod, bias_div, bias_mod, channels if runs else cols
            )
        for k in range(vectors if has_y else 0):
            there, step = left > k * threads, k * threads * elements
            if not hoisted:
                at = column + step
                if has_weight:
                    w_fetch(weights, 0, weight, weight_first, at, there, factor, places)
                if has_bias:
                    b_fetch(biases, 0, bias, bias_first, at, there, factor, places)
            chunk = 0 if turns else k
            if has_weight:
                w_widen(factors, 0, weights, chunk * w_step)
            if has_bias:
                b_widen(terms, 0, biases, chunk * b_step)
            numbers(values, held, words, chunk)
            if turns:
                turn(held, words, weights, biases)
            finish(values, factors, terms, pivot, root, shift, offset)
            y_narrow(results, 0, values)
            y_store(y, row * y_stride + column + step, results, 0, there)

    return kernel


def forward_wide(spec: Spec) -> Any:
    """A block a row, read twice: once for the sums, once for y. The pivot is the mean of the row's
    first columns; what is added to x is added both times, so that a sum may overwrite its terms."""
    threads, elements, compute, flight = spec.threads, spec.elements, spec.compute, WIDE_CHUNKS
    how = "own" if "aliased" in spec.flags else "once"
    real, integer, limits = REAL[compute], INTEGER[compute], RANGE[compute]
    x, residual = Operand(spec, "x", how), Operand(spec, "residual", how)
    gate, linear_bias = Operand(spec, "gate", "kept"), Operand(spec, "linear_bias", "kept")
    weight, bias = Parameter(spec, "weight"), Parameter(spec, "bias")
    y, sums = Operand(spec, "y"), Operand(spec, "sum")
    rms, adds, has_sum = "rms" in spec.flags, residual.there, sums.there
    round_sum, round_to_sum = "round_sum" in spec.flags, sums.rounded
    has_weight, has_bias = weight.there, bias.there
    has_gate, has_linear_bias = gate.there, linear_bias.there
    has_mean, has_rstd = spec.has("mean"), spec.has("rstd")
    has_moments, has_y, runs = spec.has("moments"), y.there, "runs" in spec.flags
    write_moments = _moments(spec)
    shift_of_chunk, size = log2(elements), room_size(threads, 1)
    one, two, top = summing(threads, 1, 1), summing(threads, 1, 2), largest(threads, 1)
    magnitude, scaled = ptx.bits_of(compute), scaling(compute)
    reciprocal_of, rstds = reciprocal(compute), _rstds(spec)
    added, finish = _adding(spec), _finish(spec)
    least, most, infinity = limits.least, limits.most, limits.infinity
    mantissa, half = limits.mantissa, limits.half
    x_fetch, r_fetch, g_fetch = x.fetch, residual.fetch, gate.fetch
    l_fetch, w_fetch, b_fetch = linear_bias.fetch, weight.fetch, bias.fetch
    w_widen, b_widen, y_narrow, y_store = weight.widen, bias.widen, y.narrow, y.store
    s_narrow, s_store = sums.narrow, sums.store
    x_word, r_word, g_word, l_word = x.word, residual.word, gate.word, linear_bias.word
    w_word, b_word, y_word, s_word = weight.word, bias.word, y.word, sums.word
    x_words, r_words, g_words, l_words = x.words, residual.words, gate.words, linear_bias.words
    w_words, b_words, y_words, s_words = weight.words, bias.words, y.words, sums.words
    x_count, r_count = flight * x_words, flight * r_words
    own_gate, own_linear_bias = gate.own, linear_bias.own
    firsts = _firsts(spec)

    @inlined
    def fetch(
        xs: Any, rs: Any, x: Any, residual: Any, place: int, other_place: int, left: int
    ) -> None:
        """Several chunks at a distance of the block's threads."""
        for k in range(flight):
            there, step = left > k * threads, k * threads * elements
            x_fetch(xs, k * x_words, x, place + step, there)
            if adds:
                r_fetch(rs, k * r_words, residual, other_place + step, there)

    @inlined
    def chunk(
        values: Any, other: Any, xs: Any, rs: Any, gs: Any, ls: Any, k: int, gate: Any,
        linear_bias: Any, gate_place: int, bias_place: int, there: bool,
    ) -> None:  # fmt: skip
        """What the statistics see of the k-th of them, and what is stored as the sum."""
        if has_gate:
            g_fetch(gs, 0, gate, gate_place + k * threads * elements, there)
        if has_linear_bias:
            l_fetch(ls, 0, linear_bias, bias_place + k * threads * elements, there)
        added(values, other, xs, k * x_words, rs, k * r_words, gs, ls)

    @inlined
    def seen(value: Any, exponent: int) -> Any:
        if round_sum:
            value = round_to_sum(value)
        return scaled(value, exponent)

    def kernel(
        x: Any, x_stride: int, residual: Any, residual_stride: int,
        gate: Any, gate_div: int, gate_mod: int,
        linear_bias: Any, linear_bias_div: int, linear_bias_mod: int,
        weight: Any, weight_div: int, weight_mod: int, bias: Any, bias_div: int, bias_mod: int,
        y: Any, y_stride: int, sum: Any, sum_stride: int, mean: Any, rstd: Any,
        moments: Any, rows: int, cols: int, eps: Any, offset: Any,
        channels: int, factor: int, places: int,
    ) -> None:  # fmt: skip
        xs = cuda.local.array(x_count, x_word)
        rs = cuda.local.array(r_count, r_word)
        gs = cuda.local.array(g_words, g_word)
        ls = cuda.local.array(l_words, l_word)
        ws = cuda.local.array(w_words, w_word)
        bs = cuda.local.array(b_words, b_word)
        ys = cuda.local.array(y_words, y_word)
        ss = cuda.local.array(s_words, s_word)
        values = cuda.local.array(elements, real)
        other = cuda.local.array(elements, real)
        factors = cuda.local.array(elements, real)
        terms = cuda.local.array(elements, real)
        room = cuda.shared.array(size, real)
        tops = cuda.shared.array(size, integer)

        lane = this_thread()
        row = this_block()
        chunks = cols >> shift_of_chunk
        place, other_place = row * x_stride, row * residual_stride
        gate_place, bias_place = int64(0), int64(0)
        if own_gate:
            gate_place += parameter_row(row, gate_div, gate_mod) * cols
        if own_linear_bias:
            bias_place += parameter_row(row, linear_bias_div, linear_bias_mod) * cols
        weight_first, bias_first = firsts(
            row, weight_div, weight_mod, bias_div, bias_mod, channels if runs else cols
        )

        padding, exponent = eps, integer(0)
        pivot, phase = real(0), 0
        per_n = reciprocal_of(cols)
        c, variance, padded = real(0), real(0), real(0)
        first_chunks = chunks if chunks < flight * threads else int64(flight * threads)
        # A pass for the pivot, over the first columns; one for the sums; and, seldom, one for the
        # largest element, one for another pivot and one for the sums again.
        for attempt in range(4):
            if not rms and (attempt == 0 or (attempt == 1 and exponent != 0)):
                total = real(0)
                at = lane * elements
                fetch(xs, rs, x, residual, place + at, other_place + at, first_chunks - lane)
                for k in range(flight):
                    there = first_chunks - lane > k * threads
                    chunk(values, other, xs, rs, gs, ls, k, gate, linear_bias, gate_place + at,
                          bias_place + at, there)  # fmt: skip
                    if there:
                        for j in range(elements):
                            total += seen(values[j], exponent)
                total, _, _ = one(total, total, total, room, phase)
                phase ^= 1
                pivot = total / real(first_chunks * elements)
            first, second = real(0), real(0)
            for start in range(lane, chunks, threads * flight):
                at = start * elements
                fetch(xs, rs, x, residual, place + at, other_place + at, chunks - start)
                for k in range(flight):
                    there = chunks - start > k * threads
                    chunk(values, other, xs, rs, gs, ls, k, gate, linear_bias, gate_place + at,
                          bias_place + at, there)  # fmt: skip
                    part, square = real(0), real(0)
                    for j in range(elements):
                        away = seen(values[j], exponent) - pivot
                        part += away
                        square += away * away
                    if there:
                        first += part
                        second += square
            if rms:
                second, _, _ = one(second, second, second, room, phase)
            else:
                first, second, _ = two(first, second, second, room, phase)
                c = first * per_n
            phase ^= 1
            variance = second * per_n - c * c
            padded = variance + padding
            fine = least <= padded and padded <= most
            settled = fine and c * c <= variance * real(0.25)
            if attempt == 3 or settled:
                break
            if attempt == 0 and not fine:
                bits = integer(0)
                for start in range(lane, chunks, threads * flight):
                    at = start * elements
                    fetch(xs, rs, x, residual, place + at, other_place + at, chunks - start)
                    for k in range(flight):
                        there = chunks - start > k * threads
                        chunk(values, other, xs, rs, gs, ls, k, gate, linear_bias,
                              gate_place + at, bias_place + at, there)  # fmt: skip
                        for j in range(elements):
                            one_of = magnitude(seen(values[j], exponent))
                            bits = one_of if there and one_of > bits else bits
                bits = top(bits, tops)
                if bits > 0 and bits < infinity:
                    exponent = integer(half - (bits >> mantissa))
                    padding = scaled(scaled(eps, exponent), exponent)
            elif not rms:
                pivot += c

        root, reported = rstds(variance, padding, padded, eps, exponent)
        shift = -c * root
        if lane == 0:
            if has_mean:
                mean[row] = scaled(pivot + c, -exponent)
            if has_rstd:
                rstd[row] = reported
            if has_moments:
                write_moments(moments, row, rows, cols, pivot, c, variance, exponent)

        for start in range(lane, chunks if has_y else 0, threads * flight):
            at = start * elements
            fetch(xs, rs, x, residual, place + at, other_place + at, chunks - start)
            for k in range(flight):
                there, step = chunks - start > k * threads, at + k * threads * elements
                if has_weight:
                    w_fetch(ws, 0, weight, weight_first, step, there, factor, places)
                    w_widen(factors, 0, ws, 0)
                if has_bias:
                    b_fetch(bs, 0, bias, bias_first, step, there, factor, places)
                    b_widen(terms, 0, bs, 0)
                chunk(values, other, xs, rs, gs, ls, k, gate, linear_bias, gate_place + at,
                      bias_place + at, there)  # fmt: skip
                if has_sum:
                    s_narrow(ss, 0, values)
                    s_store(sum, row * sum_stride + step, ss, 0, there)
                for j in range(elements):
                    values[j] = seen(values[j], exponent)
                finish(values, factors, terms, pivot, root, shift, offset)
                y_narrow(ys, 0, values)
                y_store(y, row * y_stride + step, ys, 0, there)

    return kernel
