"""Kernels of norms whose statistics are not those of rows: sums over planes and over columns, what
is merged of them, and the pass that applies it.

A *plane* is the contiguous elements of one sample and channel. Where channels come last, a row of
all channels takes the place: x is ``outer`` groups of ``rows`` rows, and sums are of columns.
"""

from __future__ import annotations

import math
from typing import Any

from .activation import activation
from .operands import Operand, Parameter, number
from .plan import Spec
from .ptx import cuda, float64, int32, int64
from .rows import (
    RANGE,
    REAL,
    all_blocks,
    inlined,
    log2,
    room_size,
    summing,
    this_block,
    this_thread,
)

#: Chunks of a plane that a thread has in flight.
FLIGHT = 2


def _given(spec: Spec) -> Any:
    """``(mean, rstd, at)``: a row's pivot, rstd and shift, of statistics of any type."""
    real, most, wide = REAL[spec.compute], RANGE[spec.compute].most, spec.has("mean")
    wide = wide and spec.type_of("mean") == "float64"

    @inlined
    def given(mean: Any, rstd: Any, at: int) -> Any:
        pivot, root = real(mean[at]), rstd[at]
        if root > most:  # no spread, and eps 0
            root = 0 * pivot
        moved = real(0)
        if wide:  # what the pivot leaves of the mean
            moved = -real((mean[at] - float64(pivot)) * root)
        return pivot, real(root), moved

    return given


def plane_sums(spec: Spec) -> Any:
    """dweight and dbias of each plane, whose statistics are one of `channels` planes'; or, in a
    batch, where they are those of its channel, both as `sums`, dbias first."""
    threads, rows_at_once, elements = spec.threads, spec.rows, spec.elements
    real = REAL[spec.compute]
    x, dy = Operand(spec, "x"), Operand(spec, "dy")
    has_dweight, has_dbias = spec.has("dweight"), spec.has("dbias")
    has_shift, batch, has_sums = spec.has("shift"), "batch" in spec.flags, spec.has("sums")
    needs_x = has_dweight or has_sums
    x_words, dy_words, flight = x.words, dy.words, FLIGHT
    x_count, dy_count = x_words * flight, dy_words * flight
    x_fetch, dy_fetch, x_widen, dy_widen = x.fetch, dy.fetch, x.widen, dy.widen
    x_word, dy_word = x.word, dy.word
    shift_of_chunk, size = log2(elements), room_size(threads, rows_at_once)
    two, given = summing(threads, rows_at_once, 2), _given(spec)

    def kernel(
        dy: Any, dy_stride: int, x: Any, x_stride: int, mean: Any, rstd: Any, shift: Any,
        dweight: Any, dbias: Any, sums: Any, rows: int, cols: int, channels: int,
    ) -> None:  # fmt: skip
        xs = cuda.local.array(x_count, x_word)
        dys = cuda.local.array(dy_count, dy_word)
        values = cuda.local.array(elements, real)
        grads = cuda.local.array(elements, real)
        room = cuda.shared.array(size, real)

        lane = this_thread() % threads
        row = this_block() * rows_at_once + this_thread() // threads
        inside = row < rows
        chunks = (cols >> shift_of_chunk) if inside else int64(0)
        pivot, root, moved = real(0), real(0), real(0)
        if needs_x and inside:
            at = row % channels if batch else row // channels
            pivot, root, moved = given(mean, rstd, at)
            if has_shift:
                moved = shift[at]
        place, dy_place = row * x_stride, row * dy_stride
        first, second = real(0), real(0)
        for start in range(lane, chunks, threads * flight):
            for k in range(flight):
                there, step = chunks - start > k * threads, (start + k * threads) * elements
                if needs_x:
                    x_fetch(xs, k * x_words, x, place + step, there)
                dy_fetch(dys, k * dy_words, dy, dy_place + step, there)
            for k in range(flight):
                dy_widen(grads, 0, dys, k * dy_words)
                one, both = real(0), real(0)
                if needs_x:
                    x_widen(values, 0, xs, k * x_words)
                    for j in range(elements):
                        both += grads[j] * ((values[j] - pivot) * root + moved)
                for j in range(elements):
                    one += grads[j]
                first += one
                second += both
        first, second, _ = two(first, second, first, room, 0)
        if lane == 0 and inside:
            if has_dweight:
                dweight[row] = second
            if has_dbias:
                dbias[row] = first
            if has_sums:
                sums[row] = first
                sums[rows + row] = second

    return kernel


# ---- channels that come last ---------------------------------------------------------------------


def _columns(spec: Spec) -> Any:
    """``(sums, room)``: a column's sums of the block's rows added up in their order, to those of
    the first; two barriers."""
    elements, real = spec.elements, float64 if spec.has("moments") else REAL[spec.compute]
    width, rows = spec.threads * elements, spec.rows
    threads = spec.threads

    @inlined
    def added(sums: Any, room: Any) -> None:
        lane, mine = this_thread() % threads, this_thread() // threads
        for j in range(elements):
            room[mine * width + j * threads + lane] = sums[j]
        cuda.syncthreads()
        for j in range(elements):
            value = real(0)
            for each in range(rows):
                value += room[each * width + j * threads + lane]
            sums[j] = value
        cuda.syncthreads()

    return added


def _place(spec: Spec) -> Any:
    """``(cols)``: the column where this thread's chunk begins and whether there is one; the block's
    number among those that have the same columns; and how many strips of columns there are."""
    threads, elements, shift_of_chunk = spec.threads, spec.elements, log2(spec.elements)

    @inlined
    def place(cols: int) -> Any:
        chunks = cols >> shift_of_chunk
        strips = (chunks + threads - 1) // threads
        index = this_block()
        chunk = index % strips * threads + this_thread() % threads
        return chunk * elements, chunk < chunks, index // strips, strips

    return place


@inlined
def rows_of(part: int, rows: int, parts: int, part_rows: int) -> Any:
    """The first row of a part of a sample, and how many it has."""
    begin = part % parts * part_rows
    count = rows - begin if rows - begin < part_rows else part_rows
    return part // parts * rows + begin, count


def column_moments(spec: Spec) -> Any:
    """Of each column of `part_rows` rows: pivot, shift and the sum of squares, as a row's moments
    are. In double, so that no number leaves the range."""
    threads, at_once, flight, elements = spec.threads, spec.rows, spec.vectors, spec.elements
    x = Operand(spec, "x")
    x_words, x_count = x.words, x.words * flight
    x_fetch, x_widen, x_word = x.fetch, x.widen, x.word
    size, real = threads * at_once * elements, REAL[spec.compute]
    added, place = _columns(spec), _place(spec)
    # The mean of floats has as many digits in double as there are to have.
    corrected = spec.compute == "float64"

    def kernel(
        x: Any, x_stride: int, moments: Any, rows: int, cols: int, parts: int, part_rows: int
    ) -> None:
        xs = cuda.local.array(x_count, x_word)
        values = cuda.local.array(elements, real)
        pivots = cuda.local.array(elements, float64)
        firsts = cuda.local.array(elements, float64)
        seconds = cuda.local.array(elements, float64)
        room = cuda.shared.array(size, float64)

        mine = this_thread() // threads
        column, has_columns, part, _ = place(cols)
        top, count = rows_of(part, rows, parts, part_rows)
        for i in range(flight):
            row = i * at_once + mine
            x_fetch(xs, i * x_words, x, (top + row) * x_stride + column,
                    has_columns and row < count)  # fmt: skip
        for j in range(elements):
            pivots[j], firsts[j], seconds[j] = float64(0), float64(0), float64(0)
        for i in range(flight):  # what is past the end reads as 0
            x_widen(values, 0, xs, i * x_words)
            for j in range(elements):
                pivots[j] += float64(values[j])
        added(pivots, room)
        for j in range(elements):
            pivots[j] /= float64(count)
        nothing = int32(cols >> 40)  # zero, which the compiler cannot know
        for i in range(x_count):  # else it would keep all numbers, as doubles
            xs[i] += nothing
        for i in range(flight):
            x_widen(values, 0, xs, i * x_words)
            if i * at_once + mine < count:
                for j in range(elements):
                    away = float64(values[j]) - pivots[j]
                    if corrected:
                        firsts[j] += away
                    seconds[j] += away * away
        if corrected:
            added(firsts, room)
        added(seconds, room)
        if mine == 0 and has_columns:
            total = moments.size // 3
            for j in range(elements):
                at, c = part * cols + column + j, firsts[j] / float64(count)
                moments[at] = pivots[j]
                moments[total + at] = c
                moments[2 * total + at] = seconds[j] - float64(count) * c * c

    return kernel


def column_sums(spec: Spec) -> Any:
    """Of each column of `part_rows` rows: sums of dy, of dy*xh, and, of a sample's own statistics,
    of xh, which has no share of the mean's rounding yet."""
    threads, at_once, elements, flight = spec.threads, spec.rows, spec.elements, 2 * FLIGHT
    real, batch = REAL[spec.compute], "batch" in spec.flags
    x, dy = Operand(spec, "x"), Operand(spec, "dy")
    x_words, dy_words = x.words, dy.words
    x_count, dy_count = x_words * flight, dy_words * flight
    x_fetch, dy_fetch, x_widen, dy_widen = x.fetch, dy.fetch, x.widen, dy.widen
    x_word, dy_word = x.word, dy.word
    size = threads * at_once * elements
    added, given, place = _columns(spec), _given(spec), _place(spec)

    def kernel(
        dy: Any, dy_stride: int, x: Any, x_stride: int, mean: Any, rstd: Any, sums: Any,
        rows: int, cols: int, parts: int, part_rows: int, channels: int,
    ) -> None:  # fmt: skip
        xs = cuda.local.array(x_count, x_word)
        dys = cuda.local.array(dy_count, dy_word)
        values = cuda.local.array(elements, real)
        grads = cuda.local.array(elements, real)
        pivots = cuda.local.array(elements, real)
        roots = cuda.local.array(elements, real)
        shifts = cuda.local.array(elements, real)
        ones = cuda.local.array(elements, real)
        boths = cuda.local.array(elements, real)
        aways = cuda.local.array(elements, real)
        room = cuda.shared.array(size, real)

        mine = this_thread() // threads
        column, has_columns, part, _ = place(cols)
        top, count = rows_of(part, rows, parts, part_rows)
        for j in range(elements):
            ones[j], boths[j], aways[j] = real(0), real(0), real(0)
            pivots[j], roots[j], shifts[j] = real(0), real(0), real(0)
            if has_columns:
                at = column + j
                if not batch:
                    at = part // parts * (cols // channels) + (column + j) // channels
                pivots[j], roots[j], shifts[j] = given(mean, rstd, at)
        for start in range(mine, count, at_once * flight):
            for i in range(flight):
                row = start + i * at_once
                there = has_columns and row < count
                x_fetch(xs, i * x_words, x, (top + row) * x_stride + column, there)
                dy_fetch(dys, i * dy_words, dy, (top + row) * dy_stride + column, there)
            for i in range(flight):
                x_widen(values, 0, xs, i * x_words)
                dy_widen(grads, 0, dys, i * dy_words)
                inside = start + i * at_once < count
                for j in range(elements):
                    xh = (values[j] - pivots[j]) * roots[j] + shifts[j]
                    ones[j] += grads[j]
                    boths[j] += grads[j] * xh
                    aways[j] += xh if inside else real(0)
        added(ones, room)
        added(boths, room)
        if not batch:
            added(aways, room)
        if mine == 0 and has_columns:
            total = sums.size // 2 if batch else sums.size // 3
            for j in range(elements):
                at = part * cols + column + j
                sums[at] = ones[j]
                sums[total + at] = boths[j]
                if not batch:
                    sums[2 * total + at] = aways[j]

    return kernel


# ---- what is merged, in double -------------------------------------------------------------------


def _total(spec: Spec) -> Any:
    """``(value, room)``: added up over the block's lanes of a column, in their order."""
    width, lanes = spec.threads, spec.rows

    @inlined
    def total(value: Any, room: Any) -> Any:
        lane, mine = this_thread() % width, this_thread() // width
        room[mine * width + lane] = value
        cuda.syncthreads()
        value = room[lane]
        for each in range(1, lanes):
            value += room[each * width + lane]
        cuda.syncthreads()
        return value

    return total


def _number(spec: Spec, name: str, default: float) -> tuple[Any, Any]:
    """``(array, at)``: an element as a double, or the default where there is no such array; and
    ``(array, at, value)``, which writes one, rounded."""
    there, operand = spec.has(name), Operand(spec, name)
    narrow, store, word = operand.narrow, operand.store, operand.word
    number_of = number(spec, name, "float64", "own")

    @inlined
    def read(array: Any, at: int) -> Any:
        return number_of(array, at, True) if there else float64(default)

    @inlined
    def write(array: Any, at: int, value: Any) -> None:
        words = cuda.local.array(1, word)
        values = cuda.local.array(1, float64)
        values[0] = value
        narrow(words, 0, values)
        store(array, at, words, 0, True)

    return read, write


def _scaled(spec: Spec) -> Any:
    """``(target, at, size, first, second, root)``: how the distance from the mean, the sum of two,
    is formed of x: ``x * scale - start``, which are written, and what that is too much. The scale
    is 1, or a power of two where squares would leave the range. Then ``root / scale`` too, in which
    no spread at eps 0 counts as 0.
    """
    real = REAL[spec.type_of("coefficients")]
    low, high, far = 2.0**-64, 2.0**64, 2.0**100
    most = RANGE["float64"].most

    @inlined
    def scaled(target: Any, at: int, size: int, first: Any, second: Any, root: Any) -> Any:
        if root > most:
            root = float64(0)
        scale = float64(1)
        if root < low and root > 0:
            scale = float64(1 / far)
        if root > high:
            scale = float64(far)
        start = real(first * scale + second * scale)
        target[at] = real(scale)
        target[size + at] = start
        return (first * scale - float64(start)) + second * scale, root / scale, root

    return scaled


def _forward(spec: Spec) -> Any:
    """``(target, at, size, first, second, root, weight, bias)``: the four coefficients of
    ``y = (x*scale - start)*slope + constant``."""
    scaled, real = _scaled(spec), REAL[spec.type_of("coefficients")]

    @inlined
    def write(
        target: Any, at: int, size: int, first: Any, second: Any, root: Any, weight: Any, bias: Any
    ) -> None:
        rest, slope, _ = scaled(target, at, size, first, second, root)
        slope *= weight
        target[2 * size + at] = real(slope)
        target[3 * size + at] = real(bias - rest * slope)

    return write


def merge(spec: Spec) -> Any:
    """Statistics of `channels` channels of all parts, of their moments; the running statistics of
    a batch, and the coefficients of `apply`.

    "average" is of instances: only the means of their means and of their variances.
    """
    lanes, width_of_block = spec.rows, spec.threads
    average, size_of_room = "average" in spec.flags, spec.rows * spec.threads
    pairs = "pairs" in spec.flags
    has_running = spec.has("running_mean"), spec.has("running_var")
    has_mean, has_rstd, applied = (
        spec.has("mean"), spec.has("rstd"), spec.has("coefficients"),
    )  # fmt: skip
    runs_mean, runs_var = has_running
    total = _total(spec)
    apply_to: Any = _forward(spec) if applied else None
    weight_of, bias_of = _number(spec, "weight", 1.0)[0], _number(spec, "bias", 0.0)[0]
    old_mean, new_mean = _number(spec, "running_mean", 0.0)
    old_var, new_var = _number(spec, "running_var", 0.0)

    def kernel(
        moments: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, mean: Any,
        rstd: Any, coefficients: Any, outer: int, groups: int, channels: int, parts: int,
        count: int, last: int, eps: Any, keep: Any, take: Any, bessel: Any,
    ) -> None:  # fmt: skip
        room = cuda.shared.array(size_of_room, float64)
        lane, mine = this_thread() % width_of_block, this_thread() // width_of_block
        index = this_block() * width_of_block + lane
        inside = index < outer * groups
        sample, group = index // groups, index % groups
        width, size = groups * channels, moments.size // 3
        base = sample * parts * width + group * channels
        items = parts * channels if inside else int64(0)
        pivot = moments[base] if inside else float64(0)
        value = float64(0)
        for i in range(mine, items, lanes):
            part = i // channels
            at = base + part * width + i - part * channels
            number = float64(last if part == parts - 1 else count)
            value += number * ((moments[at] - pivot) + moments[size + at])
        number = float64((parts - 1) * count + last) * float64(channels)
        away = total(value, room) / number
        value = float64(0)
        for i in range(mine, items, lanes):
            part = i // channels
            at = base + part * width + i - part * channels
            value += moments[2 * size + at]
            if not average:
                distance = ((moments[at] - pivot) + moments[size + at]) - away
                number_here = float64(last if part == parts - 1 else count)
                value += number_here * distance * distance
        variance = total(value, room) / number
        root = 1 / math.sqrt(variance + eps)
        if mine == 0 and inside:
            if has_mean:
                mean[index] = pivot + away
            if has_rstd:
                rstd[index] = root
            if runs_mean:
                kept = keep * old_mean(running_mean, index)
                new_mean(running_mean, index, kept + take * (pivot + away))
            if runs_var:
                kept = keep * old_var(running_var, index)
                new_var(running_var, index, kept + take * (variance * bessel))
        if applied and inside:
            for k in range(mine, channels, lanes):
                at = sample * width + group * channels + k
                own = at if pairs else group * channels + k
                apply_to(coefficients, at, outer * width, pivot, away, root,
                         weight_of(weight, own), bias_of(bias, own))  # fmt: skip

    return kernel


def prepare(spec: Spec) -> Any:
    """Coefficients of `apply` from statistics that are known, and these as float64. "gradient":
    those of dx, which is dy*weight*rstd."""
    block, gradient, running = spec.threads, "gradient" in spec.flags, spec.has("running_var")
    applied, has_mean, has_rstd = spec.has("coefficients"), spec.has("mean"), spec.has("rstd")
    writes = "writes" in spec.flags
    apply_to: Any = _forward(spec) if applied else None
    weight_of, bias_of = _number(spec, "weight", 1.0)[0], _number(spec, "bias", 0.0)[0]
    mean_of, var_of = _number(spec, "running_mean", 0.0)[0], _number(spec, "running_var", 0.0)[0]

    def kernel(
        weight: Any, bias: Any, running_mean: Any, running_var: Any, mean: Any, rstd: Any,
        coefficients: Any, channels: int, eps: Any,
    ) -> None:  # fmt: skip
        index = this_block() * block + this_thread()
        if index < channels:
            middle, root = float64(0), float64(0)
            if running:
                middle = mean_of(running_mean, index)
                root = 1 / math.sqrt(var_of(running_var, index) + eps)
            else:
                if has_mean:
                    middle = mean[index]
                root = rstd[index]
            if writes and has_mean:
                mean[index] = middle
            if writes and has_rstd:
                rstd[index] = root
            if applied:
                if gradient:
                    middle = float64(0)
                apply_to(coefficients, index, channels, middle, float64(0), root,
                         weight_of(weight, index), bias_of(bias, index))  # fmt: skip

    return kernel


def merge_sums(spec: Spec) -> Any:
    """dweight and dbias of each sample and channel, of the sums of all parts, and the five
    coefficients of `apply_backward`. Without "batch", a group's channels share statistics, whose
    mean is corrected."""
    lanes, width_of_block = spec.rows, spec.threads
    size_of_room, batch = spec.rows * spec.threads, "batch" in spec.flags
    pairs = "pairs" in spec.flags
    has_dweight, has_dbias = spec.has("dweight"), spec.has("dbias")
    applied = spec.has("coefficients")
    real = REAL[spec.type_of("coefficients")] if applied else float64
    total = _total(spec)
    scaled: Any = _scaled(spec) if applied else None
    weight_of = _number(spec, "weight", 1.0)[0]
    kinds = 2 if batch else 3

    def kernel(
        sums: Any, mean: Any, rstd: Any, weight: Any, dweight: Any, dbias: Any, coefficients: Any,
        outer: int, groups: int, channels: int, parts: int, count: int,
    ) -> None:  # fmt: skip
        room = cuda.shared.array(size_of_room, float64)
        lane, mine = this_thread() % width_of_block, this_thread() // width_of_block
        index = this_block() * width_of_block + lane
        inside = index < outer * groups
        sample, group = index // groups, index % groups
        width, size = groups * channels, sums.size // kinds
        base = sample * parts * width + group * channels
        items = parts * channels if inside else int64(0)
        first, second, third = float64(0), float64(0), float64(0)
        for i in range(mine, items, lanes):
            part = i // channels
            at = base + part * width + i - part * channels
            own = group * channels + i - part * channels
            factor = weight_of(weight, sample * width + own if pairs else own)
            first += factor * float64(sums[at])
            second += factor * float64(sums[size + at])
            if not batch:
                third += float64(sums[2 * size + at])
        first, second = total(first, room), total(second, room)
        if not batch:
            third = total(third, room)
        number = float64(count) * float64(channels)
        moved = -third / number
        mean_g, mean_g_xh = first / number, (second + moved * first) / number
        for k in range(mine, channels if inside else int64(0), lanes):
            at = sample * width + group * channels + k
            own = at if pairs else group * channels + k
            one, both = float64(0), float64(0)
            for part in range(parts):
                place = base + part * width + k
                one += float64(sums[place])
                both += float64(sums[size + place])
            if has_dweight:
                dweight[at] = both + moved * one
            if has_dbias:
                dbias[at] = one
            if applied:
                root = float64(rstd[index])
                middle, span = float64(mean[index]), outer * width
                more = float64(0)
                if root > 0 and root <= 1e300:
                    more = -moved / root
                rest, slope, root = scaled(coefficients, at, span, middle, more, root)
                coefficients[2 * span + at] = real(root * weight_of(weight, own))
                coefficients[3 * span + at] = real(-root * mean_g_xh * slope)
                coefficients[4 * span + at] = real(root * (mean_g_xh * rest * slope - mean_g))

    return kernel


# ---- what is applied -----------------------------------------------------------------------------


def apply(spec: Spec) -> Any:
    """``y = (x*scale - start)*slope + constant``, by channel: threads keep their columns'
    coefficients for several rows."""
    return _applied(spec, Operand(spec, "y"))


def apply_backward(spec: Spec) -> Any:
    """``dx = dy*first + (x*scale - start)*slope + constant``, by channel, as `apply`."""
    return _applied(spec, Operand(spec, "dx"))


def _applied(spec: Spec, target: Operand) -> Any:
    """Either of these: the coefficients scale, start, first where there is dy, slope, constant."""
    threads, at_once, flight, elements = spec.threads, spec.rows, spec.vectors, spec.elements
    real, how = REAL[spec.compute], "own" if "aliased" in spec.flags else "once"
    x, dy, known = Operand(spec, "x", how), Operand(spec, "dy"), Parameter(spec, "coefficients")
    backward = dy.there
    x_words, dy_words, c_words, words_of_result = x.words, dy.words, known.words, target.words
    x_count, dy_count = x_words * flight, dy_words * flight
    x_word, dy_word, c_word, word_of_result = x.word, dy.word, known.word, target.word
    x_fetch, dy_fetch, c_fetch = x.fetch, dy.fetch, known.fetch
    x_widen, dy_widen, c_widen = x.widen, dy.widen, known.widen
    narrow, store = target.narrow, target.store
    kinds = 5 if backward else 4
    # Where each begins in what a thread keeps.
    start, first, count = elements, 2 * elements, kinds * elements
    slope, constant = count - 2 * elements, count - elements
    place, activated = _place(spec), activation(spec.activation, spec.compute)

    def kernel(
        dy: Any, dy_stride: int, x: Any, x_stride: int, coefficients: Any, y: Any, y_stride: int,
        dx: Any, dx_stride: int, rows: int, cols: int, outer: int, width: int, factor: int,
        places: int,
    ) -> None:  # fmt: skip
        xs = cuda.local.array(x_count, x_word)
        dys = cuda.local.array(dy_count, dy_word)
        words = cuda.local.array(c_words, c_word)
        results = cuda.local.array(words_of_result, word_of_result)
        values = cuda.local.array(elements, real)
        grads = cuda.local.array(elements, real)
        kept = cuda.local.array(count, real)

        column, has_columns, rest, strips = place(cols)
        blocks = all_blocks() // strips // outer
        sample = rest // blocks
        top = rest % blocks * (at_once * flight) + this_thread() // threads
        for i in range(flight):
            row = top + i * at_once
            there, row = has_columns and row < rows, sample * rows + row
            x_fetch(xs, i * x_words, x, row * x_stride + column, there)
            if backward:
                dy_fetch(dys, i * dy_words, dy, row * dy_stride + column, there)
        for k in range(kinds):
            begin = k * outer * width + sample * width
            c_fetch(words, 0, coefficients, begin, column, has_columns, factor, places)
            c_widen(kept, k * elements, words, 0)
        for i in range(flight):
            row = top + i * at_once
            there, row = has_columns and row < rows, sample * rows + row
            x_widen(values, 0, xs, i * x_words)
            if backward:
                dy_widen(grads, 0, dys, i * dy_words)
            for j in range(elements):
                away = values[j] * kept[j] - kept[start + j]
                value = away * kept[slope + j] + kept[constant + j]
                if backward:
                    value = grads[j] * kept[first + j] + value
                values[j] = activated(value)
            narrow(results, 0, values)
            if backward:
                store(dx, row * dx_stride + column, results, 0, there)
            else:
                store(y, row * y_stride + column, results, 0, there)

    return kernel
