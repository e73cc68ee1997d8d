"""What the interpreter must report: each fault in a small kernel, and next to it the right way."""

import numpy as np
import pytest

from .ptx import (
    BadShuffle,
    BlockDependence,
    DivergentBarrier,
    Fault,
    Kernel,
    Memory,
    Misaligned,
    OutOfBounds,
    Race,
    ReadOnlyWrite,
    SharedWrite,
    Uninitialised,
    Unsupported,
    hazards,
    launch,
)
from .ptx_lines import entry, run

THREAD = """
    mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x;
    mad.lo.u32 %r3, %r1, %r2, %r0; mul.wide.u32 %d8, %r3, 4; mul.wide.u32 %d7, %r0, 4;
    mov.u32 %r20, 1; setp.eq.u32 %p9, %r0, 5; setp.ne.u32 %p10, %r1, 0;
"""
ROOM = ".shared .align 16 .b8 room[1024];"


def kernel(body, parameters=("x",), shared=ROOM):
    return entry(f"{THREAD} mov.u64 %d9, room; {body}", parameters, shared=shared)


def ok(body, grid=2, block=64, **options):
    """A body that does nothing wrong."""
    return run(kernel(body), {"x": np.zeros(256, "u4")}, grid, block, **options)


def faulty(fault, match, body, grid=2, block=64, **options):
    """A body that does."""
    with pytest.raises(fault, match=match):
        ok(body, grid, block, **options)


# Memory


@pytest.mark.parametrize("access", ["ld.global.u32 %r5, [%d6{}];", "st.global.u32 [%d6{}], %r20;"])
def test_past_the_end_of_an_array(access):
    start = "add.u64 %d6, %d0, %d8; "
    ok(start + access.format("+512"))
    faulty(OutOfBounds, "thread 63 of block 1 accesses 4 bytes 1024 bytes after the start of x",
           start + access.format("+516"))  # fmt: skip
    faulty(OutOfBounds, "thread 0 of block 0", start + access.format("+-4"))
    faulty(
        OutOfBounds, "thread 5 of block 0", f"add.u64 %d6, %d0, %d8; @%p9 {access.format('+2048')}"
    )


def test_from_one_array_into_the_next():
    """Gaps lie between arrays, whatever their sizes."""
    text = kernel("add.u64 %d6, %d0, %d8; ld.global.u32 %r5, [%d6+256];", ("x", "y"))
    with pytest.raises(OutOfBounds, match="512 bytes after the start of x"):
        run(text, {"x": np.zeros(128, "u4"), "y": np.zeros(128, "u4")}, 2, 64)


def test_across_the_end_of_an_array():
    text = kernel("ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%d0+16];")
    run(text, {"x": np.zeros(8, "u4")}, 1, 1)
    with pytest.raises(OutOfBounds, match="16 bytes 16 bytes after the start of x"):
        run(text, {"x": np.zeros(7, "u4")}, 1, 1)


def test_misaligned_accesses():
    body = "mul.wide.u32 %d6, %r0, 16; add.u64 %d6, %d6, %d0; "
    load = body + "ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%d6];"
    ok(load, 1, 64)
    ok(load, 1, 64, misalign=16)
    for misalign in (4, 8):
        faulty(Misaligned, "thread 0 of block 0.*16 bytes", load, 1, 64, misalign=misalign)
    two = body + "@%p9 add.u64 %d6, %d6, 4; ld.global.v2.u32 {%r4, %r5}, [%d6];"
    faulty(Misaligned, "thread 5 of block 0.*8 bytes, at `ld.global.v2", two, 1, 64)
    store = "add.u64 %d6, %d9, 2; st.shared.u32 [%d6], %r20;"
    faulty(Misaligned, "of 4 bytes, at `st.shared", store, 1, 1)


def test_outside_of_shared_memory():
    store = "add.u64 %d6, %d9, %d7; st.shared.u32 [%d6+{}], %r20;"
    ok(store.format(768))
    faulty(OutOfBounds, "thread 63 of block 0: shared address 0x400", store.format(772))
    faulty(OutOfBounds, "thread 0 of block 0: shared address -0x4", store.format(-4))
    ok(store.format(1024), shared=256)
    faulty(OutOfBounds, "thread 32 of block 0: shared", store.format(1024), shared=128)


def test_outside_of_local_memory():
    body = ".local .align 4 .b8 depot[8]; mov.u64 %d6, depot; st.local.u32 [%d6+{}], %r20;"
    ok(body.format(4))
    faulty(OutOfBounds, "local address 0x8", body.format(8))


def test_outside_of_constants():
    head = ".const .align 4 .b32 table[4] = {1, 2, 3, 4};"
    run(entry("ld.const.u32 %r1, [table+12];", head=head), {}, 1, 1)
    with pytest.raises(OutOfBounds, match="constant"):
        run(entry("ld.const.u32 %r1, [table+16];", head=head), {}, 1, 1)


def test_addresses_of_nothing():
    faulty(OutOfBounds, "generic address 0x10", "mov.u64 %d6, 16; ld.u32 %r5, [%d6];")


def test_registers_that_nobody_wrote():
    faulty(Uninitialised, "register.*at `add.u32 %r5, %r6", "add.u32 %r5, %r6, 1;")
    some = "@%p9 mov.u32 %r6, 3; {} st.global.u32 [%d6], %r6;"
    start = "add.u64 %d6, %d0, %d8; "
    ok(start + "@%p9 mov.u32 %r6, 3; @!%p9 mov.u32 %r6, 4; st.global.u32 [%d6], %r6;")
    ok(start + some.replace("{} st", "@%p9 st"))
    faulty(Uninitialised, "at `st.global", start + some.format(""))
    ok("mov.u32 %r7, %r6; selp.u32 %r7, %r6, 1, %p10;")  # copies of it harm nobody
    faulty(Uninitialised, "at `add", "mov.u32 %r7, %r6; add.u32 %r7, %r7, 1;")
    chosen = "selp.u32 %r7, %r6, 1, %p10; add.u32 %r7, %r7, 1;"
    ok(chosen, grid=1)
    faulty(Uninitialised, "at `add", chosen)


def test_shared_memory_that_nobody_wrote():
    body = "add.u64 %d6, %d9, %d7; {} st.shared.u32 [%d6], %r20; ld.shared.u32 %r5, [%d6];"
    ok(body.format(""))
    faulty(Uninitialised, "thread 0 of block 0 reads what nobody wrote", body.format("@%p9"))


def test_local_memory_that_nobody_wrote():
    body = """.local .align 4 .b8 depot[8]; mov.u64 %d6, depot;
        {} st.local.u32 [%d6], %r20; ld.local.u32 %r5, [%d6];"""
    ok(body.format(""))
    faulty(Uninitialised, "local memory", body.format("@%p9"))


def test_results_that_nobody_wrote():
    """An array of results holds nothing at first; what has been written may be read."""
    body = "add.u64 %d6, %d0, %d8; st.global.u32 [%d6], %r0; ld.global.u32 %r5, [%d6+{}];"
    ok(body.format(0), unwritten="x")
    faulty(Uninitialised, "reads what nobody wrote", body.format(512), unwritten="x")
    ok(body.format(512))


def test_results_that_are_read_in_other_pieces():
    """A vector at the end is read first, so that pieces are large; then single words."""
    body = """
        setp.eq.u32 %p1, %r0, 0; @!%p1 ret; st.global.v4.u32 [%d0+256], {%r20, %r20, %r20, %r20};
        ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%d0+256]; st.global.u32 [%d0+4], %r20;
    """
    ok(body + "ld.global.u32 %r5, [%d0+4];", 1, unwritten="x")
    for offset in (0, 8, 252, 272):
        load = f"ld.global.u32 %r5, [%d0+{offset}];"
        faulty(Uninitialised, "reads what nobody wrote", body + load, 1, unwritten="x")


# Threads that disagree


def test_barriers_that_some_never_reach():
    ok("bar.sync 0;")
    faulty(
        DivergentBarrier,
        "block 0: .*: 63 threads wait.*; 1 threads wait",
        "@%p9 bra A; bar.sync 0; A: bar.sync 0;",
    )


def test_different_barriers():
    """Warps at two barriers, one in each branch."""
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B:"
    faulty(DivergentBarrier, "32 threads wait at `bar.sync 0`; 32 threads", body)


def test_guarded_barriers():
    faulty(DivergentBarrier, "one barrier", "@%p9 bar.sync 0; bar.sync 0;")
    ok("@%p10 bar.sync 0;")  # all of block 1, none of block 0


def test_one_block_of_several():
    """The fault is found in the block that has it."""
    body = "setp.eq.u32 %p1, %r3, 70; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B:"
    faulty(DivergentBarrier, "block 1: .*: 63 threads wait.*; 1 threads", body)
    ok(body, grid=1)


SHUFFLE = "shfl.sync.{}.b32 %r5, %r0, {}, {}, {};"


def test_lanes_that_never_come():
    faulty(
        BadShuffle,
        "never come: 31 threads",
        "@%p9 bra A; " + SHUFFLE.format("idx", 0, 31, -1) + " A:",
    )
    faulty(BadShuffle, "never come", "@%p9 bar.warp.sync -1;")
    ok("@%p9 ret; " + SHUFFLE.format("bfly", 0, 31, -1))


def test_lanes_that_have_returned_have_no_value():
    body = "@%p9 ret; " + SHUFFLE.format("bfly", 1, 31, -1)
    faulty(BadShuffle, "reads lane 5, which is not there", body)


def test_lanes_that_no_thread_is_in():
    body = SHUFFLE.format("down", 1, 31, -1)
    ok(body, block=64)
    faulty(BadShuffle, "reads lane 20", body, grid=1, block=20)


def test_sources_outside_of_the_mask():
    lanes = "and.b32 %r0, %r0, 31; setp.lt.u32 %p1, %r0, 16; selp.u32 %r6, 65535, 4294901760, %p1; "
    ok(lanes + SHUFFLE.format("bfly", 8, 31, "%r6"))
    faulty(
        BadShuffle,
        "reads lane 16, which is not there or not",
        lanes + SHUFFLE.format("bfly", 16, 31, "%r6"),
    )


def test_masks_without_oneself():
    faulty(BadShuffle, "own bit", SHUFFLE.format("idx", 0, 31, 0xFFFF))
    ok(
        "and.b32 %r0, %r0, 31; setp.lt.u32 %p1, %r0, 16; @%p1 "
        + SHUFFLE.format("idx", 0, 31, 0xFFFF)
    )


def test_masks_that_disagree():
    odd = "selp.u32 %r6, -1, 0x7fffffff, %p9; and.b32 %r7, %r0, 31; setp.ne.u32 %p1, %r7, 31; "
    faulty(
        BadShuffle,
        "different masks",
        odd + "selp.u32 %r6, %r6, -1, %p1; bar.warp.sync %r6;",
        block=32,
    )


def test_votes_need_their_lanes_too():
    faulty(BadShuffle, "never come", "@%p9 vote.sync.any.pred %p1, %p9, -1;")


# Races in shared memory

OWN = "add.u64 %d6, %d9, %d7; st.shared.u32 [%d6], %r0; "
LOAD_FIRST = "ld.shared.u32 %r5, [%d9{}]; "


def test_reads_of_what_another_warp_has_just_written():
    body = OWN + "{} " + LOAD_FIRST.format("")
    ok(body.format("bar.sync 0;"))
    faulty(Race, "thread 1 of block 0 reads what thread 0 of block 0 wrote", body.format(""))
    faulty(Race, "thread 32 of block 0 reads", body.format("bar.warp.sync -1;"))


def test_reads_of_what_another_lane_has_just_written():
    body = OWN + "{} " + LOAD_FIRST.format("")
    ok(body.format("bar.warp.sync -1;"), block=32)
    faulty(Race, "thread 1 of block 0 reads", body.format(""), block=32)
    shuffle = SHUFFLE.format("bfly", 1, 31, -1)  # which orders no memory
    faulty(Race, "thread 1 of block 0 reads", body.format(shuffle), block=32)


def test_writes_where_another_has_just_read():
    """All read the first word, then thread 0 writes it again."""
    body = OWN + "bar.sync 0; " + LOAD_FIRST.format("") + "{} setp.eq.u32 %p1, %r0, 0; "
    body += "@%p1 st.shared.u32 [%d9], %r20;"
    ok(body.format("bar.sync 0;"))
    faulty(Race, "thread 0 of block 0 writes what another", body.format(""))
    faulty(Race, "thread 0 of block 0 writes what another", body.format("bar.warp.sync -1;"))
    ok(body.format("bar.warp.sync -1;"), block=32)
    vote, sum_ = "vote.sync.any.pred %p2, %p9, -1;", "redux.sync.add.s32 %r8, %r0, -1;"
    for heard in (SHUFFLE.format("bfly", 1, 31, -1), vote, sum_):
        ok(body.format(heard), block=32)  # they have all read by then
    faulty(Race, "thread 0 of block 0 writes what another", body.format(""), block=32)


def test_one_reader_in_another_warp():
    """A single reader of each piece, so nothing hides behind many."""
    body = (
        OWN + "bar.sync 0; xor.b32 %r6, %r0, {}; mul.wide.u32 %d5, %r6, 4; add.u64 %d5, %d9, %d5; "
    )
    body += "ld.shared.u32 %r5, [%d5]; {} st.shared.u32 [%d6], %r20;"
    ok(body.format(0, ""))
    ok(body.format(32, "bar.sync 0;"))
    faulty(Race, "writes what another", body.format(32, ""))
    faulty(Race, "writes what another", body.format(32, "bar.warp.sync -1;"))
    ok(body.format(1, "bar.warp.sync -1;"))
    faulty(Race, "writes what another", body.format(1, ""))


def test_two_readers_at_different_times():
    """First a lane of the same warp reads, then one of another; then the owner writes."""
    read = "xor.b32 %r6, %r0, {}; mul.wide.u32 %d5, %r6, 4; add.u64 %d5, %d9, %d5; "
    read += "ld.shared.u32 %r5, [%d5]; "
    body = OWN + "bar.sync 0; " + read.format(1) + read.format(33) + "{} st.shared.u32 [%d6], %r20;"
    ok(body.format("bar.sync 0;"))
    faulty(Race, "writes what another", body.format("bar.warp.sync -1;"))


def test_many_readers_at_once():
    """The last of them writes: it is one of many readers, not the only one."""
    body = OWN + "bar.sync 0; " + LOAD_FIRST.format("") + "{} setp.eq.u32 %p1, %r0, {}; "
    body += "@%p1 st.shared.u32 [%d9], %r20;"
    ok(body.format("bar.sync 0;", 63))
    faulty(Race, "thread 63 of block 0 writes what", body.format("bar.warp.sync -1;", 63))
    ok(body.format("bar.warp.sync -1;", 31), block=32)
    faulty(Race, "thread 31 of block 0 writes what", body.format("", 31), block=32)


def test_readers_before_the_last_barrier_do_not_count():
    """Others have read before it; after it the owner reads and writes."""
    read = "xor.b32 %r6, %r0, {}; mul.wide.u32 %d5, %r6, 4; add.u64 %d5, %d9, %d5; "
    read += "ld.shared.u32 %r5, [%d5]; bar.sync 0; "
    body = OWN + "bar.sync 0; " + read.format(1) + read.format(33)
    ok(body + "ld.shared.u32 %r5, [%d6]; st.shared.u32 [%d6], %r20;")


def test_races_after_earlier_barriers():
    body = "bar.sync 0; bar.sync 0; " + OWN
    faulty(Race, "thread 1 of block 0 reads", body + LOAD_FIRST.format(""))
    faulty(Race, "writes where", body + "xor.b32 %r6, %r0, 33; mul.wide.u32 %d5, %r6, 4; "
           "add.u64 %d5, %d9, %d5; st.shared.u32 [%d5], %r20;")  # fmt: skip


def test_conflicts_in_the_middle_of_a_vector():
    """Threads write words; then one reads or writes four of which the third is another's."""
    start = "mul.wide.u32 %d6, %r0, 16; add.u64 %d6, %d9, %d6; st.shared.u32 [%d6+8], %r0; "
    fill = "st.shared.u32 [%d6], %r0; st.shared.u32 [%d6+4], %r0; st.shared.u32 [%d6+12], %r0; "
    other = "xor.b32 %r6, %r0, 33; mul.wide.u32 %d5, %r6, 16; add.u64 %d5, %d9, %d5; "
    write = "st.shared.v4.u32 [%d5], {%r20, %r20, %r20, %r20};"
    ok(start + "bar.sync 0; " + other + write)
    faulty(Race, "writes where", start + other + write)
    read = "ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%d5]; "
    ok(start + fill + "bar.sync 0; " + other + read)
    faulty(Uninitialised, "nobody wrote", start + "bar.sync 0; " + other + read)
    again = "st.shared.u32 [%d6+8], %r20;"
    ok(start + fill + "bar.sync 0; " + other + read + "bar.sync 0; " + again)
    faulty(Race, "writes what another", start + fill + "bar.sync 0; " + other + read + again)


def test_two_writers():
    body = OWN + "{} xor.b32 %r6, %r0, {}; mul.wide.u32 %d5, %r6, 4; add.u64 %d5, %d9, %d5; "
    body += "st.shared.u32 [%d5], %r20;"
    ok(body.format("", 0))
    ok(body.format("bar.sync 0;", 33))
    faulty(Race, "writes where thread 33 of block 0 did", body.format("", 33))
    faulty(Race, "writes where", body.format("bar.warp.sync -1;", 33))
    ok(body.format("bar.warp.sync -1;", 1))
    faulty(Race, "writes where thread 1 of block 0 did", body.format("", 1))


def test_two_writers_at_once():
    faulty(Race, "write the same place", "st.shared.u32 [%d9], %r20;", block=32)
    ok("@%p9 st.shared.u32 [%d9], %r20;")


def test_pieces_of_words():
    """A race of a byte in a word that others own is seen, and neighbours are none."""
    bytes_ = "cvt.u64.u32 %d6, %r0; add.u64 %d6, %d6, %d9; cvt.u16.u32 %h1, %r0; "
    bytes_ += "st.shared.u8 [%d6], %h1; "
    ok(bytes_)
    ok(bytes_ + "ld.shared.u8 %h2, [%d6];")
    word = "and.b32 %r6, %r0, 60; cvt.u64.u32 %d5, %r6; add.u64 %d5, %d5, %d9; "
    word += "ld.shared.u32 %r5, [%d5];"
    ok(bytes_ + "bar.sync 0; " + word)
    faulty(Race, "reads what", bytes_ + word)


def test_double_buffers():
    """Two rooms by turns need one barrier a turn; one room needs two."""
    body = """
        mov.u32 %r10, 0;
    TOP:
        and.b32 %r11, %r10, {mask}; mul.wide.u32 %d4, %r11, 256; add.u64 %d4, %d4, %d9;
        add.u64 %d5, %d4, %d7; st.shared.u32 [%d5], %r0; bar.sync 0; ld.shared.u32 %r5, [%d4+128];
        {more} add.u32 %r10, %r10, 1; setp.lt.u32 %p1, %r10, 6; @%p1 bra TOP;
    """
    ok(body.format(mask=1, more=""))
    ok(body.format(mask=0, more="bar.sync 0;"))
    faulty(Race, "thread 32 of block 0 writes what another", body.format(mask=0, more=""))


def test_races_may_be_left_alone():
    body = OWN + LOAD_FIRST.format("")
    faulty(Race, "reads", body)
    ok(body, races=False)


# Blocks and global memory


def test_two_threads_write_the_same_element():
    store = "mul.wide.u32 %d6, {}, 4; add.u64 %d6, %d6, %d0; st.global.u32 [%d6], %r20;"
    ok(store.format("%r3"))
    ok(store.format("%r3") + store.format("%r3"))  # the same thread twice
    faulty(SharedWrite, "of block 1 writes where thread", store.format("%r0"), lanes=64)
    faulty(SharedWrite, "write the same place", store.format("%r0"))  # all blocks at once
    shifted = store.format("%r3") + "bar.sync 0; xor.b32 %r6, %r3, 1; " + store.format("%r6")
    faulty(SharedWrite, "thread 0 of block 0 writes where thread 1 of block 0 did", shifted)


def test_overlapping_elements():
    """A vector over what another thread writes by words."""
    body = """
        add.u64 %d6, %d0, %d8; st.global.u32 [%d6], %r20;
        @%p9 st.global.v4.u32 [%d0+{}], {{%r20, %r20, %r20, %r20}};
    """
    faulty(SharedWrite, "thread 5 of block 0 writes", body.format(64), 1)
    ok(body.format(512), 1)


def test_blocks_that_read_what_others_write():
    body = """
        add.u64 %d6, %d0, %d8; {first} st.global.u32 [%d6], %r20; {second}
    """
    load = "xor.b32 %r6, %r3, 64; mul.wide.u32 %d5, %r6, 4; add.u64 %d5, %d0, %d5; "
    load += "ld.global.u32 %r5, [%d5];"
    own = "ld.global.u32 %r5, [%d6];"
    ok(body.format(first=own, second=own))
    for lanes in (64, 128):
        faulty(BlockDependence, "of block", body.format(first="", second=load), lanes=lanes)
        faulty(BlockDependence, "of block", body.format(first=load, second=""), lanes=lanes)
    faulty(BlockDependence, "thread 0 of block 0 reads what thread 0 of block 1 wrote",
           body.format(first="", second=load))  # fmt: skip
    faulty(BlockDependence, "thread 0 of block 0 writes what another block reads",
           body.format(first=load, second=""))  # fmt: skip


def test_one_of_several_blocks_that_read():
    """All blocks read a word, and the last of them writes it."""
    body = (
        "ld.global.u32 %r5, [%d0]; @%p10 setp.eq.u32 %p9, %r0, 0; @%p10 and.pred %p10, %p9, %p10;"
    )
    store = " @%p10 st.global.u32 [%d0+{}], %r20;"
    ok(body + store.format(16))
    for lanes in (64, 128):
        faulty(BlockDependence, "thread 0 of block 1 writes what another block reads",
               body + store.format(0), lanes=lanes)  # fmt: skip


def test_reads_that_wait_to_matter(monkeypatch):
    """Reads of an array are noted when it is written, or when too many wait."""
    body = "ld.global.u32 %r5, [%d0]; ld.global.u32 %r6, [%d0+4]; bar.sync 0; {}"
    store = "setp.eq.u32 %p1, %r3, 64; @%p1 st.global.u32 [%d0], %r20;"
    for backlog in (1, 100, 1 << 20):
        monkeypatch.setattr(hazards, "BACKLOG", backlog)
        ok(body.format(""))
        faulty(BlockDependence, "thread 0 of block 1 writes", body.format(store), lanes=64)


def test_constants_that_change():
    """`ld.global.nc` of what is written, by the same thread even: its cache may be older."""
    body = "add.u64 %d6, %d0, %d8; {} st.global.u32 [%d6], %r20; {}"
    for load in ("ld.global{}.u32 %r5, [%d6];", "ld.global{}.u32 %r5, [%d6+512];"):
        for nc in ("", ".nc"):
            before = body.format(load.format(nc), "")
            after = body.format("", load.format(nc))
            if nc and "512" not in load:
                faulty(ReadOnlyWrite, "thread 0 of block 0 writes what ld.global.nc", before)
                faulty(ReadOnlyWrite, "thread 0 of block 0 has written what is read", after)
            else:
                ok(before)
                ok(after)


def test_threads_that_read_what_others_of_the_block_write():
    body = """
        add.u64 %d6, %d0, %d8; st.global.u32 [%d6], %r20; {}
        xor.b32 %r6, %r3, 33; mul.wide.u32 %d5, %r6, 4; add.u64 %d5, %d0, %d5;
        ld.global.u32 %r5, [%d5];
    """
    ok(body.format("bar.sync 0;"))
    faulty(Race, "thread 0 of block 0 reads what thread 33 of block 0 wrote", body.format(""))


def test_threads_that_write_what_others_of_the_block_read():
    body = """
        xor.b32 %r6, %r3, 33; mul.wide.u32 %d5, %r6, 4; add.u64 %d5, %d0, %d5;
        ld.global.u32 %r5, [%d5]; {} add.u64 %d6, %d0, %d8; st.global.u32 [%d6], %r20;
    """
    ok(body.format("bar.sync 0;"))
    faulty(Race, "writes what another", body.format(""))


# Launches


def test_limits_of_a_launch():
    text = kernel("")
    for block in (0, 1025, (32, 33)):
        with pytest.raises(Fault, match="at most 1024 threads"):
            run(text, {"x": np.zeros(4)}, 1, block)
    bounded = text.replace("kernel(.param .u64 x)\n", "kernel(.param .u64 x) .maxntid 128, 1, 1\n")
    run(bounded, {"x": np.zeros(4)}, 1, 128)
    with pytest.raises(Fault, match="at most 128 threads"):
        run(bounded, {"x": np.zeros(4)}, 1, 129)
    with pytest.raises(Fault, match="bytes of shared memory"):
        run(text, {"x": np.zeros(4)}, 1, 32, shared=227 * 1024)
    with pytest.raises(TypeError, match="0 values for 1 parameters"):
        launch(Kernel(text), 1, 32, [], Memory({}))


def test_traps():
    faulty(Fault, "thread 5 of block 0 traps, at `@%p9 trap`", "@%p9 trap;")


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("atom.global.add.u32 %r5, [%d0], 1;", "opcode atom"),
        ("red.global.add.u32 [%d0], 1;", "opcode red"),
        ("cp.async.ca.shared.global [%d9], [%d0], 16;", "opcode cp"),
        ("bar.sync 1, 32;", "some threads"),
        ("bar.arrive 0;", "does not wait"),
        ("barrier.cluster.wait;", "of a cluster"),
        ("redux.sync.min.f32 %f1, %f1, -1;", "redux of floats"),
        ("mov.u32 %r5, %clock;", "the time"),
        ("mov.u32 %r5, %smid;", "register %smid"),
        ("mov.u32 %r5, unknown;", "operand unknown"),
        ("mov.u32 5, %r5;", "destination 5"),
        ("add.u32 room, %r5, 1;", "destination room"),
        ("bra NOWHERE;", "label NOWHERE"),
        ("st.global.u32 [one], %r20;", "a store to a variable"),
        ("ld.shared::cluster.u32 %r5, [%d9];", "of other blocks"),
        ("ld.global.v2.u32 %r5, [%d0];", "vector of another length"),
        ("st.global.v2.u32 [%d0], %r5;", "vector of another length"),
        ("ld.global.u32 %r5, [%d0*4];", "address"),
        ("setp.oddly.u32 %p1, %r0, 1;", "cannot read"),
        ("add.u32 %r5, %r0;", "1 operands"),
        ("fma.rn.relu.bf16 %h1, %h1, %h1, %h1;", "fma.relu"),
        ("ex2.approx.ftz.bf16 %h1, %h1;", "ex2.bf16"),
        ("ex2.f32 %f1, %f1;", "an exact ex2"),
        ("cvt.rn.bf16x2.f32 %r1, %f1;", "packed"),
        ("addc.u32 %r5, %r0, 1;", "a carry"),
        (".reg .q32 %q<4>;", "type q32"),
        (".shared .q8 other[4];", "directive"),
        ("call.uni (r0), missing, (p0);", "call"),
        ("@@ 5;", "statement"),
    ],
)
def test_what_is_not_known_is_said(body, match):
    text = kernel(body, shared=f"{ROOM} .global .u32 one = 1;")
    with pytest.raises(Unsupported, match=match):
        run(text, {"x": np.zeros(256, "u4")}, 1, 32)


def test_recursion_is_not_known():
    head = ".func again() { call again; ret; }"
    with pytest.raises(Unsupported, match="recursion"):
        Kernel(entry("call again;", head=head))


def test_braces_must_match():
    with pytest.raises(Unsupported, match="never closed"):
        Kernel(".visible .entry kernel() { { ret; }")
