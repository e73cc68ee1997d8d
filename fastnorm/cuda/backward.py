"""Backward kernels: dx, and sums over rows for dweight and dbias.

With xh = (x - mean)*rstd and g = dy*weight,

    dx = rstd*(g - mean(g) - xh*mean(g*xh))      dweight = sum dy*xh      dbias = sum dy

The saved mean is only a pivot of the row's own precision: c = mean(x - mean) is formed again, and
xh = (x - mean)*rstd - c*rstd.

`backward` holds rows in registers. To sum over rows as well, its threads own columns and go from
row to row of a slice, sums in registers; what they have is added up by `reduce`, slice after slice.
No order depends on who comes first. Rows too wide for that have a kernel for dx, which leaves
c*rstd of each row to `backward_columns`.
"""

from __future__ import annotations

from typing import Any

from .operands import Operand, Parameter, number
from .plan import COLUMN_CHUNKS, COLUMN_ROWS, REDUCE_COLUMNS, REDUCE_LANES, Spec
from .ptx import cuda, int32, int64, uint32
from .rows import (
    RANGE,
    REAL,
    all_blocks,
    inlined,
    log2,
    parameter_row,
    reciprocal,
    room_size,
    summing,
    this_block,
    this_thread,
)

#: Registers that the weight may take in a kernel that goes from row to row.
KEPT_WORDS = 4
#: Chunks that a thread of a wide row has in flight, of x and of dy each.
WIDE_CHUNKS = 2
#: Rows that a thread of `backward_columns` has in flight.
ROWS_IN_FLIGHT = 4


def _product(spec: Spec) -> Any:
    """``(values, grads, factors, j, pivot, rstd, offset)``: xh but for its shift, and g."""
    has_weight, has_offset = spec.has("weight"), "offset" in spec.flags

    @inlined
    def pair(
        values: Any, grads: Any, factors: Any, j: int, pivot: Any, rstd: Any, offset: Any
    ) -> Any:
        away = (values[j] - pivot) * rstd
        grad = grads[j]
        if has_weight:
            factor = factors[j]
            if has_offset:
                factor += offset
            grad = grad * factor
        return away, grad

    return pair


def _coefficients(spec: Spec) -> Any:
    """``(first, second, third, per_n)``: shift of xh, mean(g) and mean(g*xh) from a row's sums."""
    rms, real = "rms" in spec.flags, REAL[spec.compute]

    @inlined
    def coefficients(first: Any, second: Any, third: Any, per_n: Any) -> Any:
        if rms:
            return real(0), real(0), third * per_n
        shift = -first * per_n
        return shift, second * per_n, (third + shift * second) * per_n

    return coefficients


def _finish(spec: Spec) -> Any:
    """``(results, others, words, more)``: dx as it is stored, in `words`: rounded, and where there
    is a gradient of the sum, `more`, added to that and rounded again, as two calls would."""
    dx, dsum, elements = Operand(spec, "dx"), Operand(spec, "dsum"), spec.elements
    rounded, widen, narrow, adds = dx.rounded, dsum.widen, dx.narrow, dsum.there

    @inlined
    def finish(results: Any, others: Any, words: Any, more: Any) -> None:
        if adds:
            widen(others, 0, more, 0)
            for j in range(elements):
                results[j] = rounded(results[j]) + others[j]
        narrow(words, 0, results)

    return finish


def _row_of(spec: Spec) -> Any:
    """``(index, count, group, div, mod)``: a group's row of this index, and whether there is one of
    its `count`."""
    grouped, adjoining = "grouped" in spec.flags, "adjoining" in spec.flags

    @inlined
    def row_of(index: int, count: int, group: int, div: int, mod: int) -> Any:
        row = index
        if adjoining:
            row = group * div + index
        elif grouped:
            row = (index // div * mod + group) * div + index % div
        return row, index < count

    return row_of


def backward(spec: Spec) -> Any:
    """Rows in registers; sums over rows too, or none."""
    threads, rows_at_once, vectors, elements = (
        spec.threads, spec.rows, spec.vectors, spec.elements,
    )  # fmt: skip
    compute = spec.compute
    real, most = REAL[compute], RANGE[compute].most
    ahead = "ahead" in spec.flags
    how = "ahead" if ahead else "once"
    x, dy, dsum = Operand(spec, "x", how), Operand(spec, "dy", how), Operand(spec, "dsum")
    weight, dx = Parameter(spec, "weight"), Operand(spec, "dx")
    partial = Operand(spec, "dweight" if spec.has("dweight") else "dbias")
    rms, sums, grouped = "rms" in spec.flags, "sums" in spec.flags, "grouped" in spec.flags
    row_of, adjoining = _row_of(spec), "adjoining" in spec.flags
    has_dx, has_dsum, has_shift = dx.there, dsum.there, spec.has("shift")
    has_dweight, has_dbias = spec.has("dweight") and sums, spec.has("dbias") and sums
    has_weight, own_weight, runs = weight.there, weight.own, "runs" in spec.flags
    # A group of rows whose gradients are summed has one weight.
    one_weight = not own_weight or grouped
    kept = has_weight and one_weight and vectors * weight.registers <= KEPT_WORDS
    if not kept:  # nor loaded a chunk ahead, for which there are no registers
        weight = Parameter(spec, "weight", "own")
    x_words, dy_words, w_words = x.words, dy.words, weight.words
    x_count, dy_count, s_count = vectors * x_words, vectors * dy_words, dsum.words
    w_count, w_step = (vectors * w_words, w_words) if kept else (w_words, 0)
    # A wider dy is numbers as it came.
    dy_anew = 0 if dy.kind == compute != x.kind else dy_count
    total = vectors * elements if sums else 1
    block, columns = threads * rows_at_once, threads * vectors * elements
    combined = columns * rows_at_once if sums and rows_at_once > 1 else 1
    shift_of_chunk, size = log2(elements), room_size(threads, rows_at_once)
    three = summing(threads, rows_at_once, 1 if rms else 3)
    pair, coefficients, finish = _product(spec), _coefficients(spec), _finish(spec)
    reciprocal_of = reciprocal(compute)
    how = "own" if ahead else "kept"
    root_of, pivot_of = [number(spec, name, how=how) for name in ("rstd", "mean")]
    x_fetch, dy_fetch, w_fetch, s_fetch = x.fetch, dy.fetch, weight.fetch, dsum.fetch
    x_widen, dy_widen, w_widen, dx_store = x.widen, dy.widen, weight.widen, dx.store
    p_narrow, p_store = partial.narrow, partial.store
    x_word, dy_word, w_word, s_word = x.word, dy.word, weight.word, dsum.word
    dx_word, dx_words, p_word, p_words = dx.word, dx.words, partial.word, partial.words

    @inlined
    def ask(xs: Any, dys: Any, x: Any, dy: Any, place: int, dy_place: int, left: int) -> None:
        for k in range(vectors):
            there, step = left > k * threads, k * threads * elements
            x_fetch(xs, k * x_words, x, place + step, there)
            dy_fetch(dys, k * dy_words, dy, dy_place + step, there)

    @inlined
    def write(
        target: Any, sums_of: Any, values: Any, words: Any, room: Any, first: int, cols: int,
        left: int, thread: int,
    ) -> None:  # fmt: skip
        """A block's sums to where its slice has its own."""
        lane, at_once = thread % threads, thread // threads
        if rows_at_once == 1:
            for k in range(vectors):
                for j in range(elements):
                    values[j] = sums_of[k * elements + j]
                p_narrow(words, 0, values)
                column = (k * threads + lane) * elements
                p_store(target, first + column, words, 0, left > k * threads)
        else:
            # Rows that went side by side, in their order.
            for k in range(vectors):
                for j in range(elements):
                    column = (k * threads + lane) * elements + j
                    room[at_once * columns + column] = sums_of[k * elements + j]
            cuda.syncthreads()
            column = thread
            while column < cols:
                value = room[column]
                for each in range(1, rows_at_once):
                    value += room[each * columns + column]
                target[first + column] = value
                column += block
            cuda.syncthreads()

    def kernel(
        dy: Any, dy_stride: int, x: Any, x_stride: int, dsum: Any, dsum_stride: int,
        weight: Any, weight_div: int, weight_mod: int, mean: Any, rstd: Any,
        dx: Any, dx_stride: int, shift: Any, dweight: Any, dbias: Any,
        rows: int, cols: int, offset: Any, div: int, mod: int,
        channels: int, factor: int, places: int,
    ) -> None:  # fmt: skip
        xs = cuda.local.array(x_count, x_word)
        dys = cuda.local.array(dy_count, dy_word)
        next_xs = cuda.local.array(x_count, x_word)
        next_dys = cuda.local.array(dy_count, dy_word)
        ws = cuda.local.array(w_count, w_word)
        ss = cuda.local.array(s_count, s_word)
        words = cuda.local.array(dx_words, dx_word)
        values = cuda.local.array(elements, real)
        grads = cuda.local.array(elements, real)
        factors = cuda.local.array(elements, real)
        dweights = cuda.local.array(total, real)
        dbiases = cuda.local.array(total, real)
        sum_words = cuda.local.array(p_words, p_word)
        room = cuda.shared.array(size, real)

        lane = this_thread() % threads
        at_once = this_thread() // threads
        chunks = int32((cols >> shift_of_chunk) - lane)
        column = int64(lane * elements)
        block_index, blocks = this_block(), all_blocks()
        group, count = int64(0), rows
        if grouped:
            group, block_index, blocks = block_index % mod, block_index // mod, blocks // mod
            count = rows // mod
        step = blocks * rows_at_once
        per_n = reciprocal_of(cols)
        weight_first = int64(0)
        if own_weight and one_weight:
            weight_first += group * (channels if runs else cols)
        if kept:
            for k in range(vectors):
                place = column + k * threads * elements
                w_fetch(ws, k * w_step, weight, weight_first, place, chunks > k * threads, factor,
                        places)  # fmt: skip
        for k in range(total):
            dweights[k] = real(0)
            dbiases[k] = real(0)

        # The next row's x and dy are asked for before this row's sums, whose barrier would
        # otherwise leave memory idle: as they come, a quarter or half of what they are in floats.
        next_pivot, next_rstd = real(0), real(0)
        row, left, inside = int64(0), int32(0), False
        if ahead:
            row, inside = row_of(block_index * rows_at_once + at_once, count, group, div, mod)
            left = chunks if inside else int32(0)
            ask(next_xs, next_dys, x, dy, row * x_stride + column, row * dy_stride + column, left)
            next_rstd = root_of(rstd, row, inside)
            if not rms:
                next_pivot = pivot_of(mean, row, inside)
        phase = 0
        nothing = int32(cols >> 40)  # zero, which the compiler cannot know
        # Of range, Numba would count the rounds first, by a division.
        start = block_index * rows_at_once
        while start < count:
            if ahead:
                this_row, this_left, this_inside = row, left, inside
                if adjoining or not grouped:  # which is cheaper to form again than to keep
                    this_row, this_inside = row_of(start + at_once, count, group, div, mod)
                    this_left = chunks if this_inside else int32(0)
                pivot, root = next_pivot, next_rstd
                for k in range(x_count):
                    xs[k] = next_xs[k]
                for k in range(dy_count):
                    dys[k] = next_dys[k]
                row, inside = row_of(start + step + at_once, count, group, div, mod)
                left = chunks if inside else int32(0)
                ask(next_xs, next_dys, x, dy, row * x_stride + column, row * dy_stride + column,
                    left)  # fmt: skip
                next_rstd = root_of(rstd, row, inside)
                if not rms:
                    next_pivot = pivot_of(mean, row, inside)
            else:
                this_row, this_inside = row_of(start + at_once, count, group, div, mod)
                this_left = chunks if this_inside else int32(0)
                ask(xs, dys, x, dy, this_row * x_stride + column, this_row * dy_stride + column,
                    this_left)  # fmt: skip
                pivot, root = real(0), root_of(rstd, this_row, this_inside)
                if not rms:
                    pivot = pivot_of(mean, this_row, this_inside)
            if not one_weight:
                width = channels if runs else cols
                weight_first = parameter_row(this_row, weight_div, weight_mod) * width
            if root > most:  # a constant row, and eps 0
                root = real(0)

            first, second, third = real(0), real(0), real(0)
            for k in range(vectors):
                there = this_left > k * threads
                if has_weight:
                    if not kept:
                        place = column + k * threads * elements
                        w_fetch(ws, 0, weight, weight_first, place, there, factor, places)
                    w_widen(factors, 0, ws, k * w_step)
                x_widen(values, 0, xs, k * x_words)
                dy_widen(grads, 0, dys, k * dy_words)
                middle = pivot if there else real(0)  # what is past the end reads as 0
                one, two, both = real(0), real(0), real(0)
                for j in range(elements):
                    away, grad = pair(values, grads, factors, j, middle, root, offset)
                    one += away
                    two += grad
                    both += grad * away
                first += one
                second += two
                third += both
            if rms:
                third, _, _ = three(third, third, third, room, phase)
            else:
                first, second, third = three(first, second, third, room, phase)
            phase ^= 1
            # Else the numbers of the first pass are kept for the second, in twice the registers.
            for k in range(x_count):
                xs[k] += nothing
            for k in range(dy_anew):
                dys[k] += nothing
            moved, mean_g, mean_g_xh = coefficients(first, second, third, per_n)
            if has_shift and lane == 0 and this_inside:
                shift[this_row] = moved

            for k in range(vectors):
                there = this_left > k * threads
                place = column + k * threads * elements
                if has_weight:
                    if not kept:
                        w_fetch(ws, 0, weight, weight_first, place, there, factor, places)
                    w_widen(factors, 0, ws, k * w_step)
                if has_dx and has_dsum:
                    s_fetch(ss, 0, dsum, this_row * dsum_stride + place, there)
                x_widen(values, 0, xs, k * x_words)
                dy_widen(grads, 0, dys, k * dy_words)
                for j in range(elements):
                    plain = grads[j]
                    away, grad = pair(values, grads, factors, j, pivot, root, offset)
                    xh = away + moved
                    if has_dweight:
                        dweights[k * elements + j] += plain * xh
                    if has_dbias:
                        dbiases[k * elements + j] += plain
                    if has_dx:
                        values[j] = root * (grad - mean_g - xh * mean_g_xh)
                if has_dx:
                    finish(values, factors, words, ss)
                    dx_store(dx, this_row * dx_stride + place, words, 0, there)
            start += step

        if sums:
            together = cuda.shared.array(combined, real)
            first_of_slice = (group * blocks + block_index) * cols
            # Known when the last row is done, and no sooner: else places in the room would be
            # formed before the first one, and kept.
            thread = int64(uint32(this_thread() + int64(start < 0)))
            if has_dweight:
                write(dweight, dweights, values, sum_words, together, first_of_slice, cols, chunks,
                      thread)  # fmt: skip
            if has_dbias:
                write(dbias, dbiases, values, sum_words, together, first_of_slice, cols, chunks,
                      thread)  # fmt: skip

    return kernel


def backward_wide(spec: Spec) -> Any:
    """dx of rows that no block's registers hold: x and dy are read for the sums, then for dx."""
    threads, elements, compute, flight = spec.threads, spec.elements, spec.compute, WIDE_CHUNKS
    real, most = REAL[compute], RANGE[compute].most
    x, dy, dsum = Operand(spec, "x"), Operand(spec, "dy"), Operand(spec, "dsum")
    weight, dx = Parameter(spec, "weight"), Operand(spec, "dx")
    rms, has_dx, has_dsum, has_shift = (
        "rms" in spec.flags, dx.there, dsum.there, spec.has("shift"),
    )  # fmt: skip
    has_weight, own_weight, shift_of_chunk = weight.there, weight.own, log2(elements)
    runs = "runs" in spec.flags
    x_words, dy_words, w_words, s_words = x.words, dy.words, weight.words, dsum.words
    x_count, dy_count, w_count = flight * x_words, flight * dy_words, flight * w_words
    size, three = room_size(threads, 1), summing(threads, 1, 1 if rms else 3)
    pair, coefficients, finish = _product(spec), _coefficients(spec), _finish(spec)
    reciprocal_of = reciprocal(compute)
    x_fetch, dy_fetch, w_fetch, s_fetch = x.fetch, dy.fetch, weight.fetch, dsum.fetch
    x_widen, dy_widen, w_widen, dx_store = x.widen, dy.widen, weight.widen, dx.store
    x_word, dy_word, w_word, s_word = x.word, dy.word, weight.word, dsum.word
    dx_word, dx_words = dx.word, dx.words

    @inlined
    def fetch(
        xs: Any, dys: Any, ws: Any, x: Any, dy: Any, weight: Any, place: int, dy_place: int,
        weight_first: int, column: int, left: int, factor: int, places: int,
    ) -> None:  # fmt: skip
        for k in range(flight):
            there, step = left > k * threads, k * threads * elements
            x_fetch(xs, k * x_words, x, place + step, there)
            dy_fetch(dys, k * dy_words, dy, dy_place + step, there)
            if has_weight:
                w_fetch(ws, k * w_words, weight, weight_first, column + step, there, factor,
                        places)  # fmt: skip

    @inlined
    def widen(values: Any, grads: Any, factors: Any, xs: Any, dys: Any, ws: Any, k: int) -> None:
        x_widen(values, 0, xs, k * x_words)
        dy_widen(grads, 0, dys, k * dy_words)
        if has_weight:
            w_widen(factors, 0, ws, k * w_words)

    def kernel(
        dy: Any, dy_stride: int, x: Any, x_stride: int, dsum: Any, dsum_stride: int,
        weight: Any, weight_div: int, weight_mod: int, mean: Any, rstd: Any,
        dx: Any, dx_stride: int, shift: Any, rows: int, cols: int, offset: Any,
        channels: int, factor: int, places: int,
    ) -> None:  # fmt: skip
        xs = cuda.local.array(x_count, x_word)
        dys = cuda.local.array(dy_count, dy_word)
        ws = cuda.local.array(w_count, w_word)
        ss = cuda.local.array(s_words, s_word)
        words = cuda.local.array(dx_words, dx_word)
        values = cuda.local.array(elements, real)
        grads = cuda.local.array(elements, real)
        factors = cuda.local.array(elements, real)
        room = cuda.shared.array(size, real)

        lane, row = this_thread(), this_block()
        chunks = cols >> shift_of_chunk
        place, dy_place, weight_first = row * x_stride, row * dy_stride, int64(0)
        if own_weight:
            width_of_row = channels if runs else cols
            weight_first += parameter_row(row, weight_div, weight_mod) * width_of_row
        root, pivot = rstd[row], real(0)
        if not rms:
            pivot = mean[row]
        if root > most:  # a constant row, and eps 0
            root = real(0)
        first, second, third = real(0), real(0), real(0)
        for start in range(lane, chunks, threads * flight):
            at = start * elements
            fetch(xs, dys, ws, x, dy, weight, place + at, dy_place + at, weight_first, at,
                  chunks - start, factor, places)  # fmt: skip
            for k in range(flight):
                widen(values, grads, factors, xs, dys, ws, k)
                middle = pivot if chunks - start > k * threads else real(0)
                one, two, both = real(0), real(0), real(0)
                for j in range(elements):
                    away, grad = pair(values, grads, factors, j, middle, root, offset)
                    one += away
                    two += grad
                    both += grad * away
                first += one
                second += two
                third += both
        if rms:
            third, _, _ = three(third, third, third, room, 0)
        else:
            first, second, third = three(first, second, third, room, 0)
        moved, mean_g, mean_g_xh = coefficients(first, second, third, reciprocal_of(cols))
        if has_shift and lane == 0:
            shift[row] = moved
        if has_dx:
            for start in range(lane, chunks, threads * flight):
                at = start * elements
                fetch(xs, dys, ws, x, dy, weight, place + at, dy_place + at, weight_first, at,
                      chunks - start, factor, places)  # fmt: skip
                for k in range(flight):
                    there, step = chunks - start > k * threads, at + k * threads * elements
                    widen(values, grads, factors, xs, dys, ws, k)
                    for j in range(elements):
                        away, grad = pair(values, grads, factors, j, pivot, root, offset)
                        values[j] = root * (grad - mean_g - (away + moved) * mean_g_xh)
                    if has_dsum:
                        s_fetch(ss, 0, dsum, row * dsum_stride + step, there)
                    finish(values, factors, words, ss)
                    dx_store(dx, row * dx_stride + step, words, 0, there)

    return kernel


def columns(spec: Spec) -> Any:
    """Sums over rows of a strip of columns and a slice of rows."""
    elements, real = spec.elements, REAL[spec.compute]
    most = RANGE[spec.compute].most
    x, dy = Operand(spec, "x"), Operand(spec, "dy")
    has_dweight, has_dbias = spec.has("dweight"), spec.has("dbias")
    has_shift, has_mean, grouped = spec.has("shift"), spec.has("mean"), "grouped" in spec.flags
    row_of = _row_of(spec)
    x_words, dy_words = x.words, dy.words
    x_count, dy_count = x_words * ROWS_IN_FLIGHT, dy_words * ROWS_IN_FLIGHT
    width, at_once, flight = COLUMN_CHUNKS * elements, COLUMN_ROWS, ROWS_IN_FLIGHT
    block, size = COLUMN_CHUNKS * COLUMN_ROWS, width * at_once
    x_fetch, dy_fetch, x_widen, dy_widen = x.fetch, dy.fetch, x.widen, dy.widen
    x_word, dy_word = x.word, dy.word
    root_of, pivot_of, shift_of = [number(spec, name) for name in ("rstd", "mean", "shift")]

    @inlined
    def write(target: Any, sums_of: Any, room: Any, first: int, past: int) -> None:
        lane, mine = this_thread() % COLUMN_CHUNKS, this_thread() // COLUMN_CHUNKS
        for j in range(elements):
            room[mine * width + lane * elements + j] = sums_of[j]
        cuda.syncthreads()
        for column in range(this_thread(), width if width < past else past, block):
            value = room[column]
            for each in range(1, at_once):
                value += room[each * width + column]
            target[first + column] = value
        cuda.syncthreads()

    def kernel(
        dy: Any, dy_stride: int, x: Any, x_stride: int, mean: Any, rstd: Any, shift: Any,
        dweight: Any, dbias: Any, rows: int, cols: int, div: int, mod: int,
    ) -> None:  # fmt: skip
        xs = cuda.local.array(x_count, x_word)
        dys = cuda.local.array(dy_count, dy_word)
        values = cuda.local.array(elements, real)
        grads = cuda.local.array(elements, real)
        dweights = cuda.local.array(elements, real)
        dbiases = cuda.local.array(elements, real)
        room = cuda.shared.array(size, real)

        lane, mine = this_thread() % COLUMN_CHUNKS, this_thread() // COLUMN_CHUNKS
        strips = (cols + width - 1) // width
        strip, rest = this_block() % strips, this_block() // strips
        slices = all_blocks() // strips
        group, count = int64(0), rows
        if grouped:
            group, rest, slices = rest % mod, rest // mod, slices // mod
            count = rows // mod
        first_column = strip * width
        column = first_column + lane * elements
        has_columns = column < cols
        for j in range(elements):
            dweights[j] = real(0)
            dbiases[j] = real(0)
        step = slices * at_once
        start = rest * at_once + mine
        while start < count:
            for i in range(flight):
                row, there = row_of(start + i * step, count, group, div, mod)
                there = has_columns and there
                if has_dweight:
                    x_fetch(xs, i * x_words, x, row * x_stride + column, there)
                dy_fetch(dys, i * dy_words, dy, row * dy_stride + column, there)
            for i in range(flight):
                row, there = row_of(start + i * step, count, group, div, mod)
                dy_widen(grads, 0, dys, i * dy_words)
                if has_dweight:
                    x_widen(values, 0, xs, i * x_words)
                    pivot, moved = real(0), real(0)
                    root = root_of(rstd, row, there)
                    if root > most:
                        root = real(0)
                    if has_mean:
                        pivot = pivot_of(mean, row, there)
                    if has_shift:
                        moved = shift_of(shift, row, there)
                    for j in range(elements):
                        dweights[j] += grads[j] * ((values[j] - pivot) * root + moved)
                if has_dbias:
                    for j in range(elements):
                        dbiases[j] += grads[j]
            start += step * flight
        first = (group * slices + rest) * cols + first_column
        if has_dweight:
            write(dweight, dweights, room, first, cols - first_column)
        if has_dbias:
            write(dbias, dbiases, room, first, cols - first_column)

    return kernel


def reduce(spec: Spec) -> Any:
    """Sums of slices added up: 16 threads a column, each every 16th slice, and then these."""
    real, lanes, width = REAL[spec.compute], REDUCE_LANES, REDUCE_COLUMNS
    several, size = spec.has("result1"), lanes * width

    @inlined
    def added(partials: Any, result: Any, room: Any, index: int, cols: int) -> None:
        lane, mine = this_thread() % width, this_thread() // width
        strips = (cols + width - 1) // width
        group, column = index // strips, index % strips * width + lane
        groups = result.size // cols
        slices = partials.size // result.size
        value = real(0)
        if group < groups and column < cols:
            first = group * slices * cols + column
            for each in range(mine, slices, lanes):
                value += partials[first + each * cols]
        room[mine * width + lane] = value
        cuda.syncthreads()
        if mine == 0 and column < cols:
            for each in range(1, lanes):
                value += room[each * width + lane]
            result[group * cols + column] = value

    def kernel(partials0: Any, result0: Any, partials1: Any, result1: Any, cols: int) -> None:
        room = cuda.shared.array(size, real)
        index = this_block()
        if several:
            half = all_blocks() // 2
            if index < half:
                added(partials0, result0, room, index, cols)
            else:
                added(partials1, result1, room, index - half, cols)
        else:
            added(partials0, result0, room, index, cols)

    return kernel


def fill(spec: Spec) -> Any:
    """An array full of one value: results where there is nothing to sum."""
    real = REAL[spec.compute]
    value = {"zero": 0.0, "nan": float("nan")}[spec.flags[0]]

    def kernel(array: Any) -> None:
        index = this_block() * cuda.blockDim.x + this_thread()
        if index < array.size:
            array[index] = real(value)

    return kernel
