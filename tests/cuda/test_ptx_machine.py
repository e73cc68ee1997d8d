"""The interpreter's memory, threads, warps and blocks, by kernels written for it."""

import numpy as np
import pytest

from .ptx import Kernel, Memory, launch, numba_args
from .ptx_lines import compute, entry, run

THREAD = """
    mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x;
    mad.lo.u32 %r3, %r1, %r2, %r0;
"""


def numbers(count, dtype="u4"):
    return np.arange(count, dtype=dtype)


# Memory


@pytest.mark.parametrize("load", ["ld.global", "ld.global.nc", "ld.global.L1::no_allocate", "ld"])
@pytest.mark.parametrize("store", ["st.global", "st.global.cs", "st"])
@pytest.mark.parametrize(
    ("count", "known", "register"),
    [(1, "b8", "%h"), (2, "b16", "%h"), (4, "u16", "%h"), (1, "b32", "%r"), (2, "f32", "%f"),
     (4, "f32", "%f"), (8, "b32", "%r"), (1, "u64", "%d1"), (2, "f64", "%g"), (4, "b64", "%d1")],
)  # fmt: skip
def test_vectors(load, store, count, known, register, rng):
    width = count * int(known[1:]) // 8
    x = rng.integers(0, 256, 64 * width).astype("u1")
    y = np.zeros_like(x)
    names = [f"{register}{place}" for place in range(5, 5 + count)]
    vector = f".v{count}" if count > 1 else ""
    words = "{" + ", ".join(names) + "}" if count > 1 else names[0]
    body = f"""{THREAD}
        mad.wide.u32 %d2, %r3, {width}, %d0; mad.wide.u32 %d3, %r3, {width}, %d1;
        {load}{vector}.{known} {words}, [%d2]; {store}{vector}.{known} [%d3], {words};
    """
    stats = run(entry(body, ["p0", "p1"]), {"x": x, "y": y}, 2, 32, unwritten="y")
    assert np.array_equal(x, y)
    assert stats["x"].loads == {width: 64}
    assert stats["y"].stores == {width: 64}
    assert (stats.loaded, stats.stored) == (x.nbytes, y.nbytes)
    assert not stats["x"].stores


def test_narrow_loads_are_extended():
    """To the register's width: with zeros, or with the sign."""
    x, y = np.array([0x80, 0x7F], "u1"), np.zeros((2, 2), "u4")
    body = f"""{THREAD}
        cvt.u64.u32 %d2, %r0; add.u64 %d2, %d2, %d0; mad.wide.u32 %d3, %r0, 8, %d1;
        ld.global.s8 %r4, [%d2]; ld.global.u8 %r5, [%d2]; st.global.v2.u32 [%d3], {{%r4, %r5}};
    """
    run(entry(body, ["x", "y"]), {"x": x, "y": y}, 1, 2)
    assert y.tolist() == [[0xFFFF_FF80, 0x80], [0x7F, 0x7F]]


@pytest.mark.parametrize("generic", [False, True])
def test_shared_memory(generic):
    """Fixed and dynamic arrays, by their names and by generic addresses; one for each block."""
    shared = ".shared .align 4 .b8 fixed[128];\n.extern .shared .align 16 .b8 dynamic[];"
    body = f"""{THREAD}
        mov.u64 %d2, fixed; mov.u64 %d3, dynamic; {"cvta.shared.u64 %d2, %d2;" * generic}
        {"cvta.shared.u64 %d3, %d3;" * generic}
        mad.wide.u32 %d4, %r0, 4, %d2; mad.wide.u32 %d5, %r0, 4, %d3;
        st{".shared" * (not generic)}.u32 [%d4], %r3; mul.lo.u32 %r4, %r3, 3;
        st{".shared" * (not generic)}.u32 [%d5], %r4;
        bar.sync 0;
        xor.b32 %r5, %r0, 31; mad.wide.u32 %d4, %r5, 4, %d2; mad.wide.u32 %d5, %r5, 4, %d3;
        ld{".shared" * (not generic)}.u32 %r6, [%d4]; ld{".shared" * (not generic)}.u32 %r7, [%d5];
        mad.wide.u32 %d6, %r3, 8, %d0; st.global.v2.u32 [%d6], {{%r6, %r7}};
    """
    y = np.zeros((96, 2), "u4")
    stats = run(entry(body, ["y"], shared=shared), {"y": y}, 3, 32, shared=128)
    wanted = numbers(96).reshape(3, 32)[:, ::-1].ravel()
    assert np.array_equal(y, np.stack([wanted, 3 * wanted], 1))
    assert stats["shared"].loads == stats["shared"].stores == {4: 192}
    assert stats.barriers == 3


def test_local_memory_belongs_to_a_thread():
    body = f"""{THREAD}
        .local .align 16 .b8 depot[32]; .reg .b64 %SP, %SPL;
        mov.u64 %SPL, depot; cvta.local.u64 %SP, %SPL;
        st.local.u32 [%SPL+16], %r3; st.u32 [%SP+20], %r0;
        mul.wide.u32 %d2, %r3, 8; add.u64 %d2, %d2, %d0;
        ld.v2.u32 {{%r4, %r5}}, [%SP+16]; st.global.v2.u32 [%d2], {{%r4, %r5}};
    """
    y = np.zeros((64, 2), "u4")
    stats = run(entry(body, ["y"]), {"y": y}, 2, 32)
    assert np.array_equal(y, np.stack([numbers(64), numbers(64) % 32], 1))
    assert stats["local"].stored == stats["local"].loaded == 64 * 8
    assert stats.loaded == 0


def test_tables_of_the_module():
    head = ".const .align 4 .b32 table[4] = {5, 0x10, 4294967295, 7};\n.global .u16 one = 9;"
    body = f"""{THREAD}
        mov.u64 %d2, table; mad.wide.u32 %d2, %r0, 4, %d2; ld.const.u32 %r4, [%d2];
        ld.global.u16 %h1, [one]; cvt.u32.u16 %r5, %h1; ld.const.u32 %r6, [table+4];
        mad.wide.u32 %d3, %r0, 12, %d0; st.global.u32 [%d3], %r4; st.global.u32 [%d3+4], %r5;
        st.global.u32 [%d3+8], %r6;
    """
    y = np.zeros((4, 3), "u4")
    run(entry(body, ["y"], head=head), {"y": y}, 1, 4)
    assert np.array_equal(y, [[v, 9, 16] for v in (5, 16, 2**32 - 1, 7)])


def test_parameters_of_every_type():
    text = """.version 8.0
    .visible .entry kernel(.param .u64 y, .param .f32 f, .param .s32 i, .param .f64 g,
        .param .u8 b, .param .align 8 .b8 pair[16])
    { .reg .b64 %d<9>; .reg .f32 %f<3>; .reg .f64 %g<5>; .reg .b32 %r<4>;
      ld.param.u64 %d0, [y]; ld.param.f32 %f0, [f]; ld.param.s32 %r0, [i]; ld.param.f64 %g0, [g];
      ld.param.u8 %r1, [b]; cvt.f64.f32 %g1, %f0; cvt.rn.f64.s32 %g2, %r0; cvt.rn.f64.u32 %g3, %r1;
      st.global.v2.f64 [%d0], {%g0, %g1}; st.global.v2.f64 [%d0+16], {%g2, %g3}; ret; }
    """
    y = np.zeros(4)
    memory = Memory([y])
    kernel = Kernel(text)
    assert [p.format.name for p in kernel.parameters] == ["u64", "f32", "s32", "f64", "u8", "b8"]
    launch(kernel, 1, 1, [memory[0].address, 0.5, -3, 2.25, 200, 0], memory)
    memory.back()
    assert y.tolist() == [2.25, 0.5, -3, 200]


def test_arrays_are_given_as_numba_does():
    memory = Memory({"x": np.zeros(10, "f4"), "y": np.zeros(3, "f8")}, misalign={"y": 4})
    x, y = memory["x"], memory.pointer("y", itemsize=4, offset=8)
    assert x.address % 256 == 0
    assert memory["y"].address % 256 == 4
    assert numba_args([x, 7, y, 0.5]) == [
        0, 0, 10, 4, x.address, 10, 4, 7, 0, 0, 4, 4, memory["y"].address + 8, 4, 4, 0.5,
    ]  # fmt: skip
    assert numba_args(["x", "y"], memory) == numba_args([x, memory["y"]])


def test_what_one_launch_writes_the_next_may_read():
    copy = f"""{THREAD}
        mad.wide.u32 %d3, %r3, 4, %d0; mad.wide.u32 %d4, %r3, 4, %d1;
        ld.global.u32 %r4, [%d3]; st.global.u32 [%d4], %r4;
    """
    kernel = Kernel(entry(copy, ["a", "b"]))
    x = numbers(64)
    memory = Memory(
        {"x": x, "partial": np.zeros_like(x), "y": np.zeros_like(x)}, 4, ["partial", "y"]
    )
    for source, target in (("x", "partial"), ("partial", "y")):
        launch(kernel, 2, 32, [memory[source].address, memory[target].address], memory)
    assert np.array_equal(memory.read("y"), x)


# Statistics


@pytest.mark.parametrize(
    ("stride", "shift", "sectors"),
    [(4, 0, 4), (4, 4, 5), (8, 0, 8), (32, 0, 32), (0, 0, 1), (-4, 248, 5)],
)
def test_sectors_of_a_warp(stride, shift, sectors):
    """32-byte pieces that a warp of 4-byte loads touches."""
    body = f"""{THREAD}
        mul.lo.s32 %r4, %r0, {stride}; cvt.s64.s32 %d2, %r4; add.s64 %d2, %d2, %d0;
        ld.global.u32 %r5, [%d2+{shift}];
    """
    stats = run(entry(body, ["x"]), {"x": np.zeros(512, "u4")}, 2, 32)
    assert stats["x"].load_sectors == 2 * sectors
    assert stats["x"].load_requests == 2
    assert stats["x"].load_efficiency == 128 / (32 * sectors)


def test_sectors_in_any_order():
    """Lanes that jump to and fro touch no more sectors; stores are counted as loads are."""
    body = f"""{THREAD}
        mul.lo.u32 %r4, %r0, 9; and.b32 %r4, %r4, 31; and.b32 %r5, %r0, 32; or.b32 %r4, %r4, %r5;
        mul.wide.u32 %d2, %r4, 4; add.u64 %d3, %d2, %d0; ld.global.u32 %r6, [%d3];
        mul.wide.u32 %d4, %r4, 8; add.u64 %d5, %d4, %d1; st.global.u32 [%d5], %r6;
    """
    arrays = {"x": np.zeros(64, "u4"), "y": np.zeros(128, "u4")}
    stats = run(entry(body, ["x", "y"]), arrays, 1, 64)
    x, y = stats["x"], stats["y"]
    assert (x.load_requests, x.load_sectors, x.load_efficiency) == (2, 8, 1)
    assert (y.store_requests, y.store_sectors, y.store_efficiency) == (2, 16, 0.5)
    assert (x.store_requests, x.store_sectors, y.load_requests, y.load_sectors) == (0, 0, 0, 0)


# Threads


def test_numbers_of_threads_and_blocks():
    names = [f"%{kind}.{axis}" for axis in "xyz" for kind in ("tid", "ntid", "ctaid", "nctaid")]
    names += ["%laneid", "%warpid", "%nwarpid", "%lanemask_lt", "%lanemask_ge", "%lanemask_gt"]
    body = ["mov.u64 %d1, %d0;"]
    linear = """
        mov.u32 %r0, %ctaid.z; mad.lo.u32 %r0, %r0, 3, 0; mov.u32 %r1, %ctaid.y;
        add.u32 %r0, %r0, %r1; mad.lo.u32 %r0, %r0, 2, 0; mov.u32 %r1, %ctaid.x;
        add.u32 %r0, %r0, %r1; mul.lo.u32 %r0, %r0, 40; mov.u32 %r1, %tid.z;
        mad.lo.u32 %r0, %r1, 20, %r0; mov.u32 %r1, %tid.y; mad.lo.u32 %r0, %r1, 10, %r0;
        mov.u32 %r1, %tid.x; add.u32 %r0, %r0, %r1;
    """
    body.append(f"{linear} mad.wide.u32 %d1, %r0, {4 * len(names)}, %d1;")
    body += [f"mov.u32 %r5, {n}; st.global.u32 [%d1+{4 * p}], %r5;" for p, n in enumerate(names)]
    y = np.zeros((240, len(names)), "u4")
    run(entry("\n".join(body), ["y"]), {"y": y}, (2, 3, 1), (10, 2, 2), lanes=80)
    for number, row in enumerate(y):
        block, thread = divmod(number, 40)
        place, sizes = (thread % 10, thread // 10 % 2, thread // 20), (10, 2, 2)
        where, grid = (block % 2, block // 2, 0), (2, 3, 1)
        wanted = [v for axis in zip(place, sizes, where, grid, strict=True) for v in axis]
        lane = thread % 32
        masks = [(1 << lane) - 1, 2**32 - (1 << lane), 2**32 - (2 << lane)]
        assert row.tolist() == [*wanted, lane, thread // 32, 2, *masks]


def test_loops_of_different_length():
    """Collatz steps: every thread leaves the loop at another time, and all meet after it."""
    x = numbers(128) + 1
    text = """
        mov.u32 $z, 0; mov.u32 %r1, $a;
    TOP:
        setp.eq.u32 %p1, %r1, 1; @%p1 bra END;
        add.u32 $z, $z, 1; and.b32 %r2, %r1, 1; setp.eq.u32 %p2, %r2, 0;
        @%p2 bra HALVE;
        mad.lo.u32 %r1, %r1, 3, 1; bra.uni TOP;
    HALVE:
        shr.u32 %r1, %r1, 1; bra TOP;
    END:
    """

    def steps(n):
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert compute(text, [x], ["u32"], "u32").tolist() == [steps(int(n)) for n in x]


def test_those_behind_catch_up_once():
    """Threads that skip nothing run up to where the others wait, and no instruction twice."""
    text = """
        mov.u32 $z, 0; setp.lt.u32 %p1, $a, 20; @%p1 bra LATER;
        add.u32 $z, $z, 1; add.u32 $z, $z, 1;
    LATER:
        add.u32 $z, $z, 10;
    """
    x = numbers(64)
    assert np.array_equal(compute(text, [x], ["u32"], "u32"), np.where(x < 20, 10, 12))


def test_instructions_are_counted():
    """Each once for all threads that run it together."""
    body = "mov.u32 %r4, %tid.x; setp.lt.u32 %p1, %r4, 9; @%p1 bra SKIP; add.u32 %r4, %r4, 1; SKIP:"
    assert run(entry(body), {}, 2, 32).instructions == 5


def test_predicated_instructions():
    x = numbers(64)
    text = """
        mov.u32 $z, 7; setp.lt.u32 %p1, $a, 20; @%p1 add.u32 $z, $a, 1; @!%p1 mov.u32 $z, $a;
        setp.gt.u32 %p2, $a, 90; @%p2 mov.u32 $z, 1000;
    """
    assert np.array_equal(compute(text, [x], ["u32"], "u32"), np.where(x < 20, x + 1, x))


def test_returns_of_some():
    y = np.full(64, 99, "u4")
    body = f"""{THREAD}
        mad.wide.u32 %d1, %r3, 4, %d0; setp.ge.u32 %p1, %r0, 10; @%p1 ret;
        st.global.u32 [%d1], %r3; and.b32 %r4, %r0, 1; setp.eq.u32 %p2, %r4, 0; @%p2 exit;
        add.u32 %r5, %r3, 100; st.global.u32 [%d1], %r5;
    """
    run(entry(body, ["y"]), {"y": y}, 2, 32)
    t = numbers(64) % 32
    odd = np.where(t % 2, numbers(64) + 100, numbers(64))
    assert np.array_equal(y, np.where(t < 10, odd, 99))


def test_names_belong_to_scopes():
    text = """
        { .reg .b32 t; mov.u32 t, 5; { .reg .b32 t; mov.u32 t, 6; } add.u32 $z, $a, t; }
        { .reg .b32 t; mov.u32 t, 1; bra SKIP; mov.u32 t, 9; SKIP: add.u32 $z, $z, t; }
        { bra SKIP; add.u32 $z, $z, 50; SKIP: }
    """
    assert np.array_equal(compute(text, [numbers(32)], ["u32"], "u32"), numbers(32) + 6)


def test_calls():
    """Twice the same function, which branches and has local memory, from diverged threads too."""
    head = """
    .func (.param .b32 out) twice(.param .b32 in);
    .func (.param .b32 out) twice(.param .b32 in)
    { .reg .b32 %x<4>; .reg .pred %q; .local .align 4 .b8 room[4];
      ld.param.u32 %x1, [in]; st.local.u32 [room], %x1; setp.lt.u32 %q, %x1, 10; @%q bra SMALL;
      ld.local.u32 %x2, [room]; add.u32 %x3, %x1, %x2; st.param.b32 [out], %x3; ret;
    SMALL: mov.u32 %x3, 1; st.param.b32 [out], %x3; ret; }
    .func store(.param .b64 where, .param .b32 what)
    { .reg .b64 %w; .reg .b32 %v; ld.param.u64 %w, [where]; ld.param.u32 %v, [what];
      st.global.u32 [%w], %v; ret; }
    """
    body = f"""{THREAD}
        mov.u32 %r4, %r3; setp.gt.u32 %p1, %r0, 15; @%p1 bra MORE;
        bra LAST;
    MORE:
        {{ .param .b32 p0; .param .b32 r0; st.param.b32 [p0], %r4;
           call.uni (r0), twice, (p0); ld.param.b32 %r4, [r0]; }}
    LAST:
        {{ .param .b32 p0; .param .b32 r0; st.param.b32 [p0+0], %r4;
           call.uni (r0), twice, (p0); ld.param.b32 %r5, [r0+0]; }}
        mad.wide.u32 %d1, %r3, 4, %d0;
        {{ .param .b64 p0; .param .b32 p1; st.param.b64 [p0], %d1; st.param.b32 [p1], %r5;
           call store, (p0, p1); }}
    """
    y = np.zeros(64, "u4")
    run(entry(body, ["y"], head=head), {"y": y}, 2, 32)

    def twice(n):
        return np.where(n < 10, 1, 2 * n)

    n = numbers(64)
    assert np.array_equal(y, twice(np.where(n % 32 > 15, twice(n), n)))


def test_the_number_of_threads_at_a_time_does_not_matter(rng):
    x = rng.standard_normal(4096).astype("f4")
    text = "mul.f32 $z, $a, $a; setp.gt.f32 %p1, $a, 0f00000000; @%p1 bra END; neg.f32 $z, $z; END:"
    whole = compute(text, [x], ["f32"], "f32")
    assert np.array_equal(whole, np.where(x > 0, x * x, -x * x))
    for lanes in (1, 128, 300, 1 << 20):
        assert np.array_equal(compute(text, [x], ["f32"], "f32", lanes=lanes), whole)


# Warps


def shuffled(mode, lane, b, c, values):
    """The PTX ISA's pseudocode, one lane at a time."""
    segment, clamp = c >> 8 & 31, c & 31
    most, least = lane & segment | clamp & ~segment, lane & segment
    b &= 31
    if mode == "up":
        source, inside = lane - b, lane - b >= most
    elif mode == "down":
        source, inside = lane + b, lane + b <= most
    else:
        source = lane ^ b if mode == "bfly" else least | b & ~segment
        inside = source <= most
    return values[source if inside else lane], inside


@pytest.mark.parametrize("width", [32, 16, 8, 4])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode, width, rng):
    x = rng.integers(0, 2**32, 64).astype("u4")
    for b in (0, 1, 3, width // 2, 31):
        c = (32 - width) << 8 | (0 if mode == "up" else 31)
        text = f"shfl.sync.{mode}.b32 $z|%p1, $a, {b}, {c}, -1; selp.u32 $y, 1, 0, %p1;"
        found, flags = compute(text, [x], ["u32"], "u32", "u32")
        for place in range(64):
            warp, lane = divmod(place, 32)
            right = shuffled(mode, lane, b, c, x[32 * warp : 32 * warp + 32])
            assert (found[place], bool(flags[place])) == right, (b, place)


def test_shuffles_with_lanes_of_their_own(rng):
    x = rng.integers(0, 2**32, 96).astype("u4")
    b = rng.integers(0, 32, 96).astype("u4")
    found = compute("shfl.sync.idx.b32 $z, $a, $b, 31, -1;", [x, b], ["u32"] * 2, "u32")
    assert np.array_equal(found, np.take_along_axis(x.reshape(3, 32), b.reshape(3, 32), 1).ravel())


def test_shuffles_of_what_all_threads_share():
    found = compute(
        "mov.u32 %r1, 7; shfl.sync.bfly.b32 $z, %r1, 1, 31, -1;", [numbers(64)], ["u32"], "u32"
    )
    assert (found == 7).all()


def test_doubles_are_shuffled_by_halves(rng):
    x = rng.standard_normal(64)
    text = """
        mov.b64 {%r1, %r2}, $a; shfl.sync.bfly.b32 %r3, %r1, 5, 31, -1;
        shfl.sync.bfly.b32 %r4, %r2, 5, 31, -1; mov.b64 $z, {%r3, %r4};
    """
    assert np.array_equal(compute(text, [x], ["f64"], "f64"), x[numbers(64) ^ 5])


def test_shuffles_of_some_lanes():
    """Under a branch, with the mask of those that take it; and of a block of 20 threads."""
    text = """
        mov.u32 $z, 77; mov.u32 %r2, %laneid; setp.ge.u32 %p1, %r2, 8; @%p1 bra END;
        shfl.sync.bfly.b32 $z, $a, 4, 31, 255;
    END:
    """
    x = numbers(20) + 5
    found = compute(text, [x], ["u32"], "u32")
    assert np.array_equal(found, np.where(numbers(20) < 8, x[(numbers(20) ^ 4) & 15], 77))
    short = compute("shfl.sync.up.b32 $z, $a, 1, 0, 0xfffff;", [x], ["u32"], "u32")
    assert np.array_equal(short, np.maximum(x - 1, 5))


def test_lanes_wait_for_those_of_their_mask():
    """Two ways to the same shuffle, one much longer."""
    text = """
        mov.u32 %r1, %laneid; setp.lt.u32 %p1, %r1, 16; mov.u32 %r2, 0; mov.u32 %r3, 0;
        @%p1 bra SHUFFLE;
        bra LATER;
    SHUFFLE:
        shfl.sync.idx.b32 $z, $a, 31, 31, -1; bra END;
    LATER:
        add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, 5; @%p2 bra LATER;
        add.u32 $a, $a, 100; bra SHUFFLE;
    END:
    """
    assert (compute(text, [numbers(32)], ["u32"], "u32") == 131).all()


def test_votes(rng):
    x = rng.integers(0, 2, 96).astype("u4")
    x[:32], x[32:64] = 1, 0
    text = "setp.ne.u32 %p1, $a, 0;"
    rows = x.reshape(3, 32).astype(bool)
    right = {
        "all": rows.all(1),
        "any": rows.any(1),
        "uni": rows.all(1) | ~rows.any(1),
    }
    for mode, flags in right.items():
        line = f"{text} vote.sync.{mode}.pred %p2, %p1, -1; selp.u32 $z, 1, 0, %p2;"
        assert np.array_equal(compute(line, [x], ["u32"], "u32"), np.repeat(flags, 32))
    words = (rows << np.arange(32)).sum(1)
    ballot = compute(f"{text} vote.sync.ballot.b32 $z, %p1, -1;", [x], ["u32"], "u32")
    assert np.array_equal(ballot, np.repeat(words, 32))
    active = "setp.ne.u32 %p1, $a, 0; mov.u32 $z, 0; @%p1 activemask.b32 $z;"
    assert np.array_equal(compute(active, [x], ["u32"], "u32"), np.repeat(words, 32) * x)


@pytest.mark.parametrize("name", ["add", "min", "max", "and", "or", "xor"])
def test_reductions_of_a_warp(name, rng):
    x = rng.integers(0, 2**32, 64).astype("u4")
    known = "b32" if name in ("and", "or", "xor") else "s32"
    function = {"add": np.add, "min": np.minimum, "max": np.maximum}.get(name)
    function = function or getattr(np, f"bitwise_{name}")
    signed = x.view("i4").reshape(2, 32)
    right = np.repeat(function.reduce(signed, axis=1).astype("i4"), 32)
    found = compute(f"redux.sync.{name}.{known} $z, $a, -1;", [x], ["u32"], "s32")
    assert np.array_equal(found, right)
    half = "mov.u32 %r1, %laneid; setp.lt.u32 %p1, %r1, 16; selp.b32 %r2, 0xffff, 0xffff0000, %p1;"
    found = compute(f"{half} redux.sync.{name}.{known} $z, $a, %r2;", [x], ["u32"], "s32")
    signed = x.view("i4").reshape(4, 16)
    assert np.array_equal(found, np.repeat(function.reduce(signed, axis=1).astype("i4"), 16))


# Blocks


def test_barriers_order_diverged_warps():
    """Each warp takes its own time before the barrier; after it everybody sees everything."""
    shared = ".shared .align 4 .b8 room[512];"
    body = f"""{THREAD}
        shr.u32 %r4, %r0, 5; mov.u32 %r5, 0;
    SPIN:
        add.u32 %r5, %r5, 1; setp.le.u32 %p1, %r5, %r0; @%p1 bra SPIN;
        mov.u64 %d2, room; mad.wide.u32 %d3, %r0, 4, %d2; st.shared.u32 [%d3], %r5;
        bar.sync 0;
        sub.u32 %r6, 127, %r0; mad.wide.u32 %d3, %r6, 4, %d2; ld.shared.u32 %r7, [%d3];
        mad.wide.u32 %d4, %r3, 4, %d0; st.global.u32 [%d4], %r7;
    """
    y = np.zeros(256, "u4")
    stats = run(entry(body, ["y"], shared=shared), {"y": y}, 2, 128)
    assert np.array_equal(y, np.tile(128 - numbers(128), 2))
    assert stats.barriers == 2
    assert stats.barriers_after_exit == 0


def test_blocks_pass_barriers_independently():
    """A loop with a barrier, of another length in each block."""
    body = f"""{THREAD}
        mov.u32 %r4, 0;
    TOP:
        bar.sync 0; add.u32 %r4, %r4, 1; setp.le.u32 %p1, %r4, %r1; @%p1 bra TOP;
        mad.wide.u32 %d1, %r3, 4, %d0; st.global.u32 [%d1], %r4;
    """
    y = np.zeros(4 * 64, "u4")
    stats = run(entry(body, ["y"]), {"y": y}, 4, 64)
    assert np.array_equal(y, np.repeat(numbers(4) + 1, 64))
    assert stats.barriers == 1 + 2 + 3 + 4


def test_barriers_of_those_that_are_left():
    body = f"""{THREAD}
        setp.ge.u32 %p1, %r0, 40; @%p1 ret; bar.sync 0;
        mad.wide.u32 %d1, %r3, 4, %d0; st.global.u32 [%d1], %r3;
    """
    y = np.zeros(64, "u4")
    stats = run(entry(body, ["y"]), {"y": y}, 1, 64)
    assert np.array_equal(y, np.where(numbers(64) < 40, numbers(64), 0))
    assert stats.barriers_after_exit == 1


def test_barriers_that_the_others_do_not_come_to():
    """They return while the rest waits already."""
    body = f"""{THREAD}
        setp.ge.u32 %p1, %r0, 40; @%p1 bra END; bar.sync 0;
        mad.wide.u32 %d1, %r3, 4, %d0; st.global.u32 [%d1], %r3;
    END:
    """
    y = np.zeros(128, "u4")
    run(entry(body, ["y"]), {"y": y}, 2, 64)
    assert np.array_equal(y, np.where(numbers(128) % 64 < 40, numbers(128), 0))


def test_votes_of_a_block(rng):
    x = rng.integers(0, 2, 256).astype("u4")
    x[:64], x[64:128] = 1, 0
    rows = x.reshape(-1, 64).astype(bool)
    body = f"""{THREAD}
        mad.wide.u32 %d2, %r3, 4, %d0; ld.global.u32 %r4, [%d2]; setp.ne.u32 %p1, %r4, 0;
        bar.red.popc.u32 %r5, 0, %p1; bar.red.and.pred %p2, 0, %p1; bar.red.or.pred %p3, 0, %p1;
        selp.u32 %r6, 1, 0, %p2; selp.u32 %r7, 1, 0, %p3;
        mad.wide.u32 %d2, %r3, 16, %d1; st.global.v4.u32 [%d2], {{%r5, %r6, %r7, %r7}};
    """
    y = np.zeros((256, 4), "u4")
    run(entry(body, ["x", "y"]), {"x": x, "y": y}, 4, 64)
    right = np.stack([rows.sum(1), rows.all(1), rows.any(1), rows.any(1)], 1)
    assert np.array_equal(y, np.repeat(right, 64, 0))
