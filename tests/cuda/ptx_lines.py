"""Small PTX kernels for tests of the interpreter: a few lines for each thread."""

import re

import numpy as np

from .ptx import Kernel, Memory, launch

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"
REGISTERS = """
    .reg .pred %p<20>; .reg .b16 %h<40>; .reg .b32 %r<40>; .reg .b64 %d<40>;
    .reg .f32 %f<40>; .reg .f64 %g<40>;
"""
LETTERS = "abcdefgh"
# Registers of each type, to be named in a line: $a is the first input, $z the first result.
FAMILY = {"f32": "%f", "f64": "%g", "pred": "%p"}


def family(known):
    """The registers that hold a type."""
    bits = 32 if known.endswith("x2") else int(re.sub(r"\D", "", known) or 1)
    return FAMILY.get(known) or {8: "%h", 16: "%h", 32: "%r", 64: "%d"}[bits]


def dtype_of(known):
    """How an array holds a type; halves of bfloat16, packed and untyped ones as unsigned."""
    if known in ("f16", "f32", "f64"):
        return np.dtype(f"f{int(known[1:]) // 8}")
    if known.startswith("s"):
        return np.dtype(f"i{int(known[1:]) // 8}")
    size = 4 if known.endswith("x2") else int(re.sub(r"\D", "", known)) // 8
    return np.dtype(f"u{size}")


def entry(body, parameters=(), head="", shared=""):
    """A kernel text. Parameters are names; each is loaded into the register %d of its place."""
    listed = ", ".join(f".param .u64 {name}" for name in parameters)
    loads = "".join(
        f"    ld.param.u64 %d{place}, [{name}];\n" for place, name in enumerate(parameters)
    )
    text = f"{HEAD}{shared}{head}\n.visible .entry kernel({listed})\n{{{REGISTERS}{loads}{body}"
    return f"{text}\n    ret;\n}}\n"


def lines(text, inputs, outputs):
    """A kernel of one thread an element: loads $a, $b ..., runs `text`, stores $z, $y ..."""
    names = {}
    body = ["mov.u32 %r30, %ctaid.x;", "mov.u32 %r31, %ntid.x;", "mov.u32 %r32, %tid.x;"]
    body.append("mad.lo.u32 %r30, %r30, %r31, %r32;")
    stores = []
    for place, known in enumerate((*inputs, *outputs)):
        size = dtype_of(known).itemsize
        is_input = place < len(inputs)
        name = LETTERS[place] if is_input else "zyxw"[place - len(inputs)]
        names[name] = f"{family(known)}{place + 20}"
        body.append(f"mad.wide.u32 %d{place + 10}, %r30, {size}, %d{place};")
        move = f"global.b{8 * size} "
        if is_input:
            body.append(f"ld.{move}{names[name]}, [%d{place + 10}];")
        else:
            stores.append(f"st.{move}[%d{place + 10}], {names[name]};")
    middle = re.sub(r"\$([a-z])", lambda found: names[found.group(1)], text)
    parameters = [f"p{place}" for place in range(len(inputs) + len(outputs))]
    return entry("\n    ".join([*body, middle, *stores]), parameters)


def compute(text, arrays, inputs, *outputs, **options):
    """The results of `lines` on arrays: one array, or several if there are several types."""
    arrays = [np.ascontiguousarray(a, dtype_of(k)) for a, k in zip(arrays, inputs, strict=True)]
    size = arrays[0].size if arrays else 64
    results = [np.zeros(size, dtype_of(known)) for known in outputs]
    memory = Memory(
        [*arrays, *results], unwritten=map(str, range(len(arrays), len(arrays) + len(results)))
    )
    block = next(t for t in (128, 64, 32, *range(31, 0, -1)) if size % t == 0)
    addresses = [memory[place].address for place in range(len(arrays) + len(results))]
    launch(Kernel(lines(text, inputs, outputs)), size // block, block, addresses, memory, **options)
    memory.back()
    return results[0] if len(results) == 1 else results


def run(text, arrays=None, grid=1, block=32, unwritten=(), misalign=0, **options):
    """Launch a kernel text on named arrays, given by address; returns its statistics."""
    memory = Memory(arrays or {}, misalign=misalign, unwritten=unwritten)
    addresses = [memory[name].address for name in memory.arrays]
    stats = launch(Kernel(text), grid, block, addresses, memory, **options)
    memory.back()
    return stats
