"""Registers, spills and vector accesses of the kernels, against ptx_budget.json.

FASTNORM_WRITE_BUDGET=1 writes the file anew, as this machine's ptxas has it.
"""

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
pytest.importorskip("numba.cuda", reason="numba, which compiles the kernels, is not installed")

from fastnorm.cuda import channel_plan, compiler, plan

from . import running

if compiler.available():
    pytest.skip(compiler.available(), allow_module_level=True)

BUDGET = Path(__file__).with_name("ptx_budget.json")
PTXAS = shutil.which("ptxas")
#: Each target that is assembled for, and the one that is written in its PTX.
TARGETS = {"sm_90": "sm_90", "sm_80": "sm_80", "sm_100": "sm_90"}
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def forward(kind, cols, rms=False, alignment=16, **options):
    more = options.pop("more", {})
    types = {"x": kind, "weight": kind, "y": kind} | more
    types |= {} if rms else {"bias": kind, "mean": "float32"}
    return plan.forward(1000, cols, types | {"rstd": "float32"}, alignment=alignment, rms=rms,
                        return_stats=True, **options)  # fmt: skip


def backward(kind, cols, rms=False, sums=True, more=None, alignment=16, **options):
    found = ("rstd", "dweight") if rms else ("mean", "rstd", "dweight", "dbias")
    found = [name for name in found if sums or name[0] != "d"]
    types = dict.fromkeys(("dy", "x", "weight", "dx"), kind) | dict.fromkeys(found, "float32")
    return plan.backward(32768, cols, types | (more or {}), alignment=alignment, rms=rms,
                         **options)  # fmt: skip


def batch(kind, samples, channels, run, gradients=False):
    """Batch norm in training; `run` elements of a sample and channel, or channels come last."""
    layout = channel_plan.Layout(1, samples, channels, run)
    types = {"x": kind, "weight": "float32", "mean": "float64", "rstd": "float64"}
    if gradients:
        types |= {"dy": kind, "dx": kind, "dweight": "float32", "dbias": "float32"}
        return channel_plan.batch_backward(layout, types, alignment=16, training=True)
    types |= {"bias": "float32", "y": kind}
    return channel_plan.batch(layout, types, alignment=16, training=True)


def group(kind, channels, run):
    """Group norm with channels first."""
    types = dict.fromkeys(("x", "y"), kind) | dict.fromkeys(("weight", "bias"), "float32")
    return plan.forward(1000, channels * run, types, alignment=16, rms=False, run=run,
                        per_row=OWN, alike=True)  # fmt: skip


def residual(kind):
    return {"residual": kind, "sum": kind}


#: Parameters of float32 beside rows of 16 bits, which take twice the registers.
WIDE = {"weight": "float32", "bias": "float32"}
OWN = {"weight": True, "bias": True}


#: Widths of the kinds of layout: lanes of a warp, a warp, a block, the widest in registers.
PLANS = {
    **{f"forward {kind} {cols}": forward(kind, cols)
       for kind, cols in (("bfloat16", 128), ("bfloat16", 1024), ("bfloat16", 4096),
                          ("bfloat16", 16384), ("float16", 8192), ("float32", 1024),
                          ("float32", 8192), ("float32", 65536))},
    "rms forward bfloat16 4096": forward("bfloat16", 4096, rms=True),
    "add and silu bfloat16 4096": forward("bfloat16", 4096, rms=True, activation="silu",
                                          more=residual("bfloat16")),
    **{f"backward {kind} {cols}": backward(kind, cols)
       for kind, cols in (("bfloat16", 128), ("bfloat16", 4096), ("bfloat16", 8192),
                          ("float16", 8192), ("float32", 4096), ("bfloat16", 32768))},
    "rms backward bfloat16 8192": backward("bfloat16", 8192, rms=True),
    "batch of planes bfloat16 3136": batch("bfloat16", 32, 64, 3136),
    "batch of planes backward bfloat16 3136": batch("bfloat16", 32, 64, 3136, gradients=True),
    "batch of columns bfloat16 256": batch("bfloat16", 3136, 256, 1),
    "batch of columns backward bfloat16 256": batch("bfloat16", 3136, 256, 1, gradients=True),
    "groups bfloat16 12544": group("bfloat16", 4, 3136),
    "mixed groups bfloat16 1568": group("bfloat16", 32, 49),
    # Of all kinds of calls on 16 bits, those that filled their registers to the last.
    "wide parameters, forward bfloat16 1024": forward("bfloat16", 1024, more=WIDE),
    "wide parameters, forward bfloat16 1536": forward("bfloat16", 1536, more=WIDE),
    "wide parameters, add bfloat16 4096": forward(
        "bfloat16", 4096, more=WIDE | residual("bfloat16") | {"linear_bias": "float32"},
        round_sum=True),
    "wide parameters, add float16 4096": forward(
        "float16", 4096, more=WIDE | residual("float16") | {"linear_bias": "float32"},
        round_sum=True),
    "wide parameters, adaptive bfloat16 16384": forward(
        "bfloat16", 16384, more=WIDE | residual("bfloat16") | {"gate": "float32"},
        per_row=OWN | {"gate": True}, offset=True, round_sum=True, alike=True),
    "add bfloat16 768": forward("bfloat16", 768, more=residual("bfloat16")),
    "add of a linear layer, rms bfloat16 3072": forward(
        "bfloat16", 3072, rms=True, more=residual("bfloat16") | {"linear_bias": "bfloat16"}),
    "wide parameters, rms add bfloat16 4096": forward(
        "bfloat16", 4096, rms=True, more={"weight": "float32"} | residual("bfloat16"),
        round_sum=True),
    # A sum that is not rounded is held as numbers.
    "wide parameters, add unrounded float16 4096": forward(
        "float16", 4096, more=WIDE | residual("float16") | {"linear_bias": "float32"}),
    "wide parameters, rms add unrounded bfloat16 16384": forward(
        "bfloat16", 16384, rms=True, more={"weight": "float32"} | residual("bfloat16")),
    "adaptive unrounded bfloat16 4096": forward(
        "bfloat16", 4096, more=residual("bfloat16") | {"gate": "bfloat16"},
        per_row=OWN | {"gate": True}, offset=True, alike=True),
    "wide parameters, adaptive unrounded float16 1024": forward(
        "float16", 1024, more=WIDE | residual("float16") | {"gate": "float32"},
        per_row=OWN | {"gate": True}, offset=True, alike=True),
    "adaptive and gelu_tanh unrounded bfloat16 16384": forward(
        "bfloat16", 16384, more=residual("bfloat16") | {"gate": "bfloat16"},
        per_row=OWN | {"gate": True}, offset=True, alike=True, activation="gelu_tanh"),
    # Of a loop that is left as one.
    "gelu float16 16384": forward("float16", 16384, activation="gelu"),
    "gelu not aligned bfloat16 16383": forward("bfloat16", 16383, alignment=2, activation="gelu"),
    "add not aligned float16 4095": forward(
        "float16", 4095, alignment=2, more=residual("float16"), round_sum=True),
    "add of a linear layer, not aligned float16 16383": forward(
        "float16", 16383, alignment=2, more=WIDE | residual("float16") | {"linear_bias": "float32"},
        round_sum=True),
    "add of a linear layer, rms, by 8 bytes float16 4092": forward(
        "float16", 4092, rms=True, alignment=8, round_sum=True,
        more={"weight": "float32"} | residual("float16") | {"linear_bias": "float32"}),
    "wide parameters, forward by 8 bytes bfloat16 4092": forward(
        "bfloat16", 4092, alignment=8, more=WIDE),
    "backward of dx not aligned float16 1001": backward("float16", 1001, sums=False, alignment=2),
    "backward not aligned bfloat16 8191": backward("bfloat16", 8191, alignment=2),
    "add backward not aligned float16 8191": backward(
        "float16", 8191, alignment=2, more={"dsum": "float16"}),
    "rms add backward not aligned bfloat16 8191": backward(
        "bfloat16", 8191, rms=True, alignment=2, more={"dsum": "bfloat16"}),
    "add backward by 4 bytes, wide dy bfloat16 8190": backward(
        "bfloat16", 8190, alignment=4, more={"dy": "float32", "dsum": "bfloat16"}),
    "add backward by 8 bytes, wide dy bfloat16 8188": backward(
        "bfloat16", 8188, alignment=8, more={"dy": "float32", "dsum": "bfloat16"}),
    "wide parameters, backward bfloat16 1024": backward(
        "bfloat16", 1024, more={"weight": "float32"}),
    **{f"wide parameters, add backward float16 {cols}": backward(
        "float16", cols, more={"weight": "float32", "dsum": "float16"})
       for cols in (64, 520, 4096, 8192)},
    "wide parameters, backward of dx bfloat16 1024": backward(
        "bfloat16", 1024, sums=False, more={"weight": "float32"}),
    "wide parameters, add backward bfloat16 4096": backward(
        "bfloat16", 4096, more={"weight": "float32", "dsum": "bfloat16"}),
    "wide parameters, add backward bfloat16 1024": backward(
        "bfloat16", 1024, more={"weight": "float32", "dsum": "bfloat16"}),
    "wide parameters and dy, backward bfloat16 512": backward(
        "bfloat16", 512, more={"weight": "float32", "dy": "float32"}),
    **{f"wide parameters and dy, add backward {kind} 512": backward(
        kind, 512, more={"weight": "float32", "dy": "float32", "dsum": kind})
       for kind in ("bfloat16", "float16")},
    "wide parameters, adaptive backward bfloat16 4096": backward(
        "bfloat16", 4096, more={"weight": "float32"}, per_row=OWN, offset=True,
        groups=(256, 128)),
}  # fmt: skip


def kernels():
    """Each kernel once, by a name."""
    found = {}
    for name, planned in PLANS.items():
        for step in planned.steps:
            if step.spec not in found.values():
                found[f"{name}: {step.spec.kernel}"] = step.spec
    return found


KERNELS = kernels()


def assembled(text, target, folder):
    """Registers and bytes spilled; None where ptxas does not know the target."""
    source = folder / "kernel.ptx"
    source.write_text(text)
    command = [PTXAS, "-v", f"-arch={target}", str(source), "-o", str(folder / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    said = done.stdout + done.stderr
    if "not defined for option 'gpu-name'" in said:
        return None
    assert done.returncode == 0, said
    spills = SPILLS.search(said)
    registers = re.search(r"Used (\d+) registers", said)
    return [int(registers[1]), int(spills[2]) + int(spills[3])]


def named_alike(text):
    """PTX without what Numba counts up from kernel to kernel, and without its target."""
    seen = {}
    text = re.sub(r"^\.target .*$", "", text, flags=re.M)
    return re.sub(
        r"_ZN\w+|_cudapy_smem_\d+", lambda m: seen.setdefault(m[0], f"n{len(seen)}"), text
    )


def accesses(text):
    """How often each kind of access to global memory stands in the PTX."""
    found = re.findall(r"\b((?:ld|st)\.global[\w.:]*)", text)
    return dict(sorted(Counter(found).items()))


@pytest.fixture(scope="module")
def budget():
    found = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    made = {}
    yield found, made
    if os.environ.get("FASTNORM_WRITE_BUDGET"):
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in made.items()]
        BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")


@pytest.mark.skipif(PTXAS is None, reason="no ptxas: the CUDA toolkit is not on PATH")
@pytest.mark.parametrize("name", KERNELS)
def test_registers_and_spills(name, budget, tmp_path):
    spec = KERNELS[name]
    known, made = budget
    text = running.ptx(spec)
    made[name] = {
        target: assembled(text.replace(".target sm_90", f".target {least}"), target, tmp_path)
        for target, least in TARGETS.items()
    }
    made[name]["accesses"] = accesses(text)
    if os.environ.get("FASTNORM_WRITE_BUDGET"):
        return
    assert made[name]["accesses"] == known[name]["accesses"]
    most = 65536 // (spec.threads * spec.rows * plan.resident_blocks(spec))
    for target in TARGETS:
        if made[name][target] is None:
            continue
        registers, spilled = made[name][target]
        assert registers <= min(most, known[name][target][0])
        assert spilled <= known[name][target][1]


@pytest.mark.parametrize("name", ["wide parameters, add float16 4096: forward",
                                  "backward bfloat16 128: backward"])  # fmt: skip
def test_the_text_is_the_same_for_all_targets(name):
    """So it is enough to compile for one of them."""
    one, other = running.ptx(KERNELS[name]), running.ptx(KERNELS[name], (8, 0))
    assert ".target sm_90" in one
    assert ".target sm_80" in other
    assert named_alike(one) == named_alike(other)


@pytest.mark.parametrize("name", KERNELS)
def test_wide_accesses_alone(name):
    """Rows and parameters go by 16 bytes; what is narrower is one a row. No call, no stack."""
    spec, text = KERNELS[name], running.ptx(KERNELS[name])
    assert ".local" not in text
    assert "call" not in re.sub(r"//.*", "", text)
    if spec.kernel in ("reduce", "merge", "merge_sums") or spec.access < 16:
        return
    for access in accesses(text):
        narrow = not access.endswith("v4.b32")
        assert not narrow or access.endswith((".f32", ".b32", ".u32", ".f64"))
        assert not (narrow and "no_allocate" in access)


def test_promised_widths_spill_nothing():
    """What the budget may never allow: forward up to 16,384 and backward up to 8,192 columns."""
    known = json.loads(BUDGET.read_text())
    promised = [name for name in KERNELS if int(re.search(r"\d+(?=:)", name)[0]) <= (
        8192 if "backward" in name else 16384)]  # fmt: skip
    assert len(promised) >= 64
    for name in promised:
        assert [known[name][target][1] for target in TARGETS] == [0, 0, 0]
