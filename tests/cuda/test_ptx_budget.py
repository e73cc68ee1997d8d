"""What ptxas makes of the kernels: registers within a committed budget, nothing spilled.

    pytest tests/cuda/test_ptx_budget.py -k registers --write-registers

writes registers.json anew, for a look at what a change costs.
"""

import functools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastnorm.cuda import compiler, plan

if why := compiler.available():
    pytest.skip(why, allow_module_level=True)

BUDGET = Path(__file__).with_name("registers.json")
#: Registers that another version of ptxas may take more.
LEEWAY = 8
CAPABILITIES = ((8, 0), (9, 0))
#: Bytes of a thread that are still spilled, where there should be none.
SPILLED = {"forward bfloat16 1024": 8, "backward bfloat16 1024": 60}


def forward(kind, cols):
    types = {"x": kind, "weight": "float32", "bias": "float32", "y": kind}
    return plan.forward(1024, cols, types, alignment=16, rms=False)


def backward(kind, cols):
    types = {"dy": kind, "x": kind, "weight": "float32", "mean": "float32", "rstd": "float32",
             "dx": kind, "dweight": "float32", "dbias": "float32"}  # fmt: skip
    return plan.backward(1024, cols, types, alignment=16, rms=False)


CASES = {
    f"{make.__name__} {kind} {cols}": (make, kind, cols)
    for make, kind, widths in (
        (forward, "float32", (128, 768, 1024, 4096, 8192, 16_384)),
        (forward, "bfloat16", (128, 1024, 4096, 16_384)),
        (forward, "float16", (16_384,)),
        (backward, "float32", (128, 1024, 4096)),
        (backward, "bfloat16", (1024, 4096, 8192)),
        (backward, "float16", (8192,)),
    )
    for cols in widths
}


@functools.cache
def assembler():
    """ptxas of the CUDA toolkit; skips where there is none."""
    for place in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"):
        found = shutil.which("ptxas", path=f"{place}/bin")
        if found:
            return found
    return shutil.which("ptxas") or pytest.skip("ptxas is not installed")


@functools.cache
def assembled(spec, capability):
    """Of a kernel: its registers, and bytes of stack and of spills."""
    command = [assembler(), "-arch=sm_{}{}".format(*capability), "-v", "-o", os.devnull, "-"]
    text = compiler.ptx_of(spec, capability)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if "Unsupported .version" in done.stderr:
        pytest.skip("this ptxas is older than Numba's compiler")
    assert done.returncode == 0, done.stderr
    numbers = (r"Used (\d+) registers", r"(\d+) bytes stack", r"(\d+) bytes spill stores",
               r"(\d+) bytes spill loads")  # fmt: skip
    return tuple([int(re.search(number, done.stderr)[1]) for number in numbers])


def main_spec(case):
    make, kind, cols = CASES[case]
    return make(kind, cols).steps[0].spec


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: "sm_{}{}".format(*c))
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_spilled(case, capability):
    """Rows stay in registers: arrays that are indexed by a variable would be memory."""
    spec = main_spec(case)
    registers, *spilled = assembled(spec, capability)
    assert max(spilled) <= SPILLED.get(case, 0)
    assert registers * spec.threads * spec.rows * plan.resident_blocks(spec) <= compiler.REGISTERS


def test_registers(request):
    """As many as are committed, at most; fewer registers are more rows at a time."""
    taken = {
        case: {"sm_{}{}".format(*c): assembled(main_spec(case), c)[0] for c in CAPABILITIES}
        for case in CASES
    }
    if request.config.getoption("--write-registers"):
        BUDGET.write_text(json.dumps(taken, indent=1) + "\n")
    budget = json.loads(BUDGET.read_text())
    assert budget.keys() == taken.keys()
    over = {
        (case, arch): (count, budget[case][arch])
        for case, counts in taken.items()
        for arch, count in counts.items()
        if count > budget[case][arch] + LEEWAY
    }
    assert not over, "registers taken, and those in registers.json"


@pytest.mark.parametrize("case", CASES)
def test_rows_are_moved_by_16_bytes(case):
    """Loads and stores of the row operands, in the text."""
    text = compiler.ptx_of(main_spec(case), (9, 0))
    assert re.search(r"ld\.global\.nc\.L1::no_allocate\.v[24]\.b(32|64)", text)
    assert re.search(r"st\.global\.(cs\.)?v[24]\.b(32|64)", text)
    assert "call" not in re.sub(r"//.*", "", text)


@pytest.mark.parametrize("case", CASES)
def test_no_order_is_left_to_chance(case):
    """Sums by atomics would differ from run to run."""
    make, kind, cols = CASES[case]
    for step in make(kind, cols).steps:
        assert not re.search(r"\b(atom|red)\.", compiler.ptx_of(step.spec, (9, 0)))
