"""The C core by itself: the same bits on every instruction set and every CPU that can be had here,
no wide instruction outside the objects that are dispatched to, no memory error.

checksums.c runs a fixed list of cases; its sums must agree between instruction sets and between
machines. aarch64 and older x86 CPUs run under qemu.
"""

import os
import re

import pytest

from fastnorm import _core

from .helpers import c_build
from .helpers.c_build import NATIVE, command, output, tool

#: 400 KB for the norms of rows, 48 for those of channels and of weights.
KERNEL_CODE_BYTES = 448 * 1024


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """The core as it is built for this machine."""
    return c_build.Core(tmp_path_factory.mktemp("native"), tool("gcc", "cc"), NATIVE, ["-fopenmp"])


@pytest.fixture(scope="module")
def checksums(core):
    return core.program("checksums")


def by_isa(text):
    """{instruction set: {case: checksum}} of what the program printed."""
    sums = {}
    for line in text.splitlines():
        isa, case, checksum = line.split()
        assert case not in sums.setdefault(isa, {}), f"{case} ran twice"
        sums[isa][case] = checksum
    return sums


@pytest.fixture(scope="module")
def native_sums(checksums):
    """Every way of running a case agreed with the others, or the program would have failed."""
    return by_isa(output(checksums))


@pytest.fixture(scope="module")
def expected(native_sums):
    return next(iter(native_sums.values()))


def assert_part_of(sums, isas, expected):
    """What --short printed: these instruction sets, and for most cases what is expected."""
    assert list(sums) == isas
    for isa, of_isa in sums.items():
        assert len(of_isa) > 0.9 * len(expected)
        assert of_isa == {case: expected[case] for case in of_isa}, isa


# ---- bits ----------------------------------------------------------------------------------------


def test_every_instruction_set_gives_the_same_bits(native_sums, expected):
    supported = [name for name in _core.isa_names() if _core.isa_supported(name)]
    assert list(native_sums) == supported
    for isa, sums in native_sums.items():
        assert sums == expected, isa


#: The kernel that an op is, where it has none of its own: Python adds the sum's gradient to dx.
KERNELS = {
    "add_layer_norm_backward": "layer_norm_backward",
    "add_rms_norm_backward": "rms_norm_backward",
}


def test_every_op_and_type_is_among_the_cases(expected):
    short = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}
    for op in _core.OPS:
        for dtype in _core.DTYPES:
            start = f"{KERNELS.get(op, op)}-{short[dtype]}-"
            assert any(case.startswith(start) for case in expected), start
    assert len(set(expected.values())) > 0.8 * len(expected), "the inputs are too much alike"


def test_aarch64_gives_the_same_bits(expected, tmp_path):
    if NATIVE == "aarch64":
        pytest.skip("this is aarch64: the other tests are about it")
    compiler = tool("aarch64-linux-gnu-gcc")
    emulator = tool("qemu-aarch64", "qemu-aarch64-static")
    program = c_build.Core(tmp_path, compiler, "aarch64").program("checksums", "-static")
    assert by_isa(output(emulator, program, "neon")) == {"neon": expected}
    assert_part_of(by_isa(output(emulator, program, "--short")), ["neon", "scalar"], expected)


OLD_CPUS = {"Nehalem": ["scalar"], "Haswell": ["avx2", "scalar"]}


@pytest.mark.skipif(NATIVE != "x86_64", reason="for x86-64")
@pytest.mark.parametrize("cpu", OLD_CPUS)
def test_old_cpus_give_the_same_bits(checksums, expected, cpu):
    """And meet no illegal instruction on the way."""
    emulator = tool("qemu-x86_64", "qemu-x86_64-static")
    sums = by_isa(output(emulator, "-cpu", cpu, checksums, "--short"))
    assert_part_of(sums, OLD_CPUS[cpu], expected)


@pytest.mark.skipif(NATIVE != "x86_64", reason="for x86-64")
def test_an_instruction_set_that_the_cpu_lacks_is_refused(checksums):
    emulator = tool("qemu-x86_64", "qemu-x86_64-static")
    for cpu, isa in (("Nehalem", "avx2"), ("SandyBridge", "avx2"), ("Haswell", "avx512")):
        done = command(emulator, "-cpu", cpu, checksums, isa)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"cannot run {isa}" in done.stderr


# ---- which CPU can run what ----------------------------------------------------------------------

FMA, OSXSAVE, AVX, F16C = 1 << 12, 1 << 27, 1 << 28, 1 << 29
AVX2, BMI2, F, DQ, BW, VL = 1 << 5, 1 << 8, 1 << 16, 1 << 17, 1 << 30, 1 << 31
SSE_STATE, AVX_STATE, ZMM_STATE = 0x2, 0x4, 0xE0
BF16 = 1 << 5
HASWELL = (FMA | OSXSAVE | AVX | F16C, AVX2 | BMI2, SSE_STATE | AVX_STATE, 0)
LEAF7_OF_SKYLAKE = AVX2 | BMI2 | F | DQ | BW | VL
SKYLAKE = (FMA | OSXSAVE | AVX | F16C, LEAF7_OF_SKYLAKE, SSE_STATE | AVX_STATE | ZMM_STATE, 0)
COOPER_LAKE = (*SKYLAKE[:3], BF16)


def but(cpu, register, bits):
    """A CPU less some bits of one register."""
    return tuple(value & ~bits if k == register else value for k, value in enumerate(cpu))


CPUS = {
    "everything": (SKYLAKE, ["avx512", "avx2"]),
    "Haswell": (HASWELL, ["avx2"]),
    "nothing": ((0, 0, 0, 0), []),
    "Cooper Lake": (COOPER_LAKE, ["avx512_bf16", "avx512", "avx2"]),
    "AVX512_BF16 and no ZMM registers": (but(COOPER_LAKE, 2, ZMM_STATE), ["avx2"]),
    "all bits set": (
        (2**32 - 1, 2**32 - 1, 2**64 - 1, 2**32 - 1),
        ["avx512_bf16", "avx512", "avx2"],
    ),
    "the system saves no ZMM registers": (but(SKYLAKE, 2, ZMM_STATE), ["avx2"]),
    "the system saves some of the ZMM state": (but(SKYLAKE, 2, 0x80), ["avx2"]),
    "the system saves no YMM registers": (but(SKYLAKE, 2, AVX_STATE), []),
    "the system does not use XSAVE": (but(SKYLAKE, 0, OSXSAVE), []),
    "no AVX": (but(SKYLAKE, 0, AVX), []),
    "no FMA": (but(SKYLAKE, 0, FMA), []),
    "no F16C": (but(SKYLAKE, 0, F16C), []),
    "no AVX2": (but(SKYLAKE, 1, AVX2), []),
    "no AVX-512 F": (but(SKYLAKE, 1, F), ["avx2"]),
    "no AVX-512 DQ": (but(SKYLAKE, 1, DQ), ["avx2"]),
    "no AVX-512 BW": (but(SKYLAKE, 1, BW), ["avx2"]),
    "no AVX-512 VL": (but(SKYLAKE, 1, VL), ["avx2"]),
    "AVX-512 without BMI2": (but(SKYLAKE, 1, BMI2), ["avx2"]),
}


@pytest.fixture(scope="module")
def cpu_x86(tmp_path_factory):
    path = tmp_path_factory.mktemp("cpu") / "cpu_x86"
    source = c_build.PROGRAMS / "cpu_x86.c"
    output(tool("gcc", "cc"), "-std=gnu11", f"-I{c_build.SOURCES}", source, "-o", path)
    return path


@pytest.mark.parametrize("name", CPUS)
def test_what_a_described_cpu_can_run(cpu_x86, name):
    registers, isas = CPUS[name]
    assert output(cpu_x86, *(f"{value:x}" for value in registers)).split() == isas


# ---- the objects ---------------------------------------------------------------------------------


def test_an_instruction_set_exports_its_table_alone(core):
    nm = tool("nm")
    for isa in core.isas:
        lines = output(nm, "--defined-only", "--extern-only", core.objects[f"isa_{isa}"])
        assert [line.split()[-1] for line in lines.splitlines()] == [f"fn_isa_{isa}"]


@pytest.mark.skipif(NATIVE != "x86_64", reason="for x86-64")
def test_wide_instructions_keep_to_their_objects(core):
    objdump = tool("objdump")
    wide = {"isa_avx512": (), "isa_avx2": (r"%zmm", r"%k[0-7]", r"%[xy]mm(1[6-9]|2\d|3[01])")}
    for name, path in core.objects.items():
        code = output(objdump, "-d", "--no-show-raw-insn", path)
        for register in wide.get(name, (r"%[yz]mm", r"\bv[a-z]+[sp][sd]\b", r"%k[0-7]")):
            assert not re.search(register, code), f"{name}: {register}"
    assert "%zmm" in output(objdump, "-d", core.objects["isa_avx512"])


def test_the_kernels_code_stays_small(core):
    if "clang" in output(core.compiler, "--version"):
        pytest.skip("the budget is for gcc's code; clang unrolls more")
    total = 0
    for path in core.objects.values():
        for line in output(tool("size"), "-A", path).splitlines():
            if line.startswith((".text", ".rodata", ".data", ".eh_frame")):
                total += int(line.split()[1])
    assert 0 < total <= KERNEL_CODE_BYTES, f"{total:,} bytes"


def test_flags_that_would_change_results_are_refused(core, tmp_path):
    source = c_build.SOURCES / "isa_scalar.c"
    for flag in ("-ffast-math", "-Ofast"):
        done = command(core.compiler, *core.flags, flag, "-c", source, "-o", tmp_path / "x.o")
        assert done.returncode != 0
        assert "-ffast-math" in done.stderr


@pytest.mark.skipif(NATIVE != "x86_64", reason="for x86-64")
@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_an_instruction_set_is_not_compiled_without_its_flags(core, tmp_path, isa):
    source = c_build.SOURCES / f"isa_{isa}.c"
    done = command(core.compiler, *core.flags, "-c", source, "-o", tmp_path / "x.o")
    assert done.returncode != 0
    assert f"isa_{isa}.c needs -m" in done.stderr


@pytest.mark.parametrize("language", [("gcc", "c", "-std=c99"), ("g++", "c++", "-std=c++11")])
def test_the_header_stands_alone(language, tmp_path):
    compiler, name, standard = language
    source = tmp_path / "user"
    source.write_text('#include "fastnorm.h"\nint main(void) { return fn_isa_count() < 1; }\n')
    output(
        tool(compiler), "-x", name, standard, "-Wall", "-Wextra", "-pedantic", "-Werror",
        f"-I{c_build.SOURCES}", "-fsyntax-only", source,
    )  # fmt: skip


# ---- memory --------------------------------------------------------------------------------------


def test_without_memory_nothing_is_written(core):
    output(core.program("no_memory", "-Wl,--wrap=malloc"))


def test_sanitizers_find_nothing(expected, tmp_path):
    """Addresses and undefined behaviour, in every case and every way."""
    compiler = tool("gcc", "cc")
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    if command(compiler, *flags, probe, "-o", tmp_path / "probe").returncode != 0:
        pytest.skip(f"{compiler} has no sanitizers here")
    # An address sanitizer that is preloaded for Python would be one too many.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    program = c_build.Core(tmp_path, compiler, NATIVE, flags).program("checksums")
    for isa, sums in by_isa(output(program, env=env)).items():
        assert sums == expected, isa
