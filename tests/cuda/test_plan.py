"""Plans of every width: which kernel, how rows lie over threads, how many blocks."""

import itertools

import pytest

from fastnorm.cuda import channel_plan, plan

SIZES = plan.SIZES
#: All up to 4,096; then what is near a change of kernels, and some of what lies between.
EVERY_WIDTH = sorted(
    {*range(1, 4097), *range(4097, 70001, 37)}
    | {width for at in range(4096, 70001, 512) for width in range(at - 8, at + 9)}
)
FORWARD = ("x", "weight", "bias", "y")
BACKWARD = ("dy", "x", "weight", "dx")


def forward(rows, cols, kind, alignment=16, **options):
    stats = "float64" if kind == "float64" else "float32"
    types = dict.fromkeys(FORWARD, kind) | {"mean": stats, "rstd": stats} | options.pop("more", {})
    return plan.forward(rows, cols, types, alignment=alignment, rms=False, return_stats=True,
                        **options)  # fmt: skip


def backward(rows, cols, kind, alignment=16, sums=("dweight", "dbias"), **options):
    stats = "float64" if kind == "float64" else "float32"
    types = dict.fromkeys(BACKWARD, kind) | dict.fromkeys(("mean", "rstd", *sums), stats)
    return plan.backward(rows, cols, types, alignment=alignment, rms=False, **options)


def alignment_of(cols, kind):
    """Of rows that lie one after the other from an aligned address on."""
    size = cols * SIZES[kind]
    return min(16, size & -size)


def assert_launches(step):
    """What any device can launch, and what kernels take for granted."""
    spec = step.spec
    assert 1 <= step.block == spec.threads * spec.rows <= 1024
    assert 1 <= step.grid < 2**31
    assert spec.threads & (spec.threads - 1) == 0
    assert step.block % 32 == 0 or spec.threads < 32
    assert len(step.arguments) == len(plan.arguments(spec)) == len(plan.layout(spec))
    assert 65536 // (step.block * plan.resident_blocks(spec)) >= 64
    hash(spec)


def assert_covers(spec, cols):
    """Each element belongs to one chunk of one thread, all of it or nothing."""
    assert cols % spec.elements == 0
    assert spec.threads * spec.vectors * spec.elements >= cols
    assert (spec.vectors - 1) * spec.elements * spec.threads < 1.5 * cols


@pytest.mark.parametrize("kind", SIZES)
def test_forward_of_every_width(kind):
    specs, rows = set(), 1000
    for cols in EVERY_WIDTH:
        alignment = alignment_of(cols, kind)
        (step,) = forward(rows, cols, kind, alignment).steps
        spec = step.spec
        assert_launches(step)
        assert spec.elements * SIZES[kind] == min(16, alignment)
        assert step.grid * spec.rows >= rows > (step.grid - 1) * spec.rows
        if spec.kernel == "forward":
            assert_covers(spec, cols)
            most = 32 if kind != "float64" else 16
            assert spec.vectors * spec.elements <= most
        else:
            assert spec.kernel == "forward_wide"
            assert cols * SIZES[kind] > 65536 or alignment < 16
        specs.add(spec)
    # Compiling one takes a second or two.
    assert len(specs) <= 110
    aligned = {spec for spec in specs if spec.access == 16}
    assert len(aligned) <= 30


@pytest.mark.parametrize("kind", SIZES)
def test_backward_of_every_width(kind):
    specs, rows = set(), 4096
    for cols in EVERY_WIDTH:
        alignment = alignment_of(cols, kind)
        planned = backward(rows, cols, kind, alignment)
        for step in planned.steps:
            assert_launches(step)
            specs.add(step.spec)
        main = planned.steps[0].spec
        if main.kernel == "backward":
            assert_covers(main, cols)
        fused = "sums" in main.flags
        if cols * SIZES[kind] <= 8192 * 2 and alignment == 16:
            assert fused
        assert fused == ("backward_columns" not in [step.spec.kernel for step in planned.steps])
        # What the workspace holds is what blocks write and the second stage reads.
        sizes = {name: count for name, count, _ in planned.workspace}
        strips = 1 if fused else -(-cols // (plan.COLUMN_CHUNKS * main.elements))
        if planned.steps[-1].spec.kernel == "reduce":
            assert sizes["dweight_partials"] * strips == planned.steps[-2].grid * cols
        else:
            assert planned.steps[-1].grid == strips
        assert fused or sizes["shift"] == rows
    assert len(specs) <= 120


@pytest.mark.parametrize("kind", SIZES)
def test_a_rows_sums_do_not_depend_on_how_many_rows_there_are(kind):
    for cols, rows in itertools.product((1, 100, 128, 4096, 40000), (1, 2, 1000, 2**31)):
        spec, other = (
            forward(n, cols, kind, alignment_of(cols, kind)).steps[0].spec for n in (rows, 7)
        )
        assert spec == other


def test_sums_over_rows_do_not_depend_on_the_device():
    """Blocks follow from the rows and columns, up to what fills an H200."""
    blocks = [backward(rows, 4096, "float32").steps[0].grid for rows in (1, 2, 100, 10**4, 10**6)]
    assert blocks == [1, 1, 50, 132, 132]


@pytest.mark.parametrize("cols", [64, 4096, 16384])
def test_one_slice_of_rows_is_the_result(cols):
    planned = backward(3, cols, "float32")
    assert all(step.spec.kernel != "reduce" for step in planned.steps)
    assert {"dweight", "dbias"} <= set(planned.steps[-1].arguments)
    assert all(not name.endswith("_partials") for name, *_ in planned.workspace)


def test_groups_of_rows():
    """Gradients of parameters that rows share by row // div % mod."""
    planned = backward(4096, 256, "float32", groups=(128, 32), per_row={"weight": True})
    main, second = planned.steps
    assert main.grid % 32 == 0
    assert {"dweight_div", "dweight_mod", "weight_div", "weight_mod"} <= set(main.arguments)
    assert planned.workspace[0][1] == main.grid * 256
    assert second.spec.kernel == "reduce"
    (each,) = backward(24, 256, "float32", groups=(1, 24), per_row={"weight": True}).steps
    assert each.grid == 24


@pytest.mark.parametrize("asked", [*itertools.product([False, True], repeat=3)])
def test_gradients_that_are_asked_for(asked):
    dx, *sums = asked
    wanted = [name for name, ask in zip(("dweight", "dbias"), sums, strict=True) if ask]
    for cols in (256, 40000):
        types = dict.fromkeys(("dy", "x", "weight", "mean", "rstd"), "float32")
        types |= dict.fromkeys((["dx"] if dx else []) + wanted, "float32")
        planned = plan.backward(500, cols, types, alignment=16, rms=False)
        given = {name for step in planned.steps for name in step.arguments}
        assert ("dx" in given) == dx
        assert all((name in given) == (name in wanted) for name in ("dweight", "dbias"))
        # A column's sum of dy needs no pass over rows.
        if cols > 8192 and not dx:
            kernels = [step.spec.kernel for step in planned.steps]
            assert ("backward_wide" in kernels) == ("dweight" in wanted)


def test_alignment():
    """Narrower accesses where addresses, distances or odd widths ask for them."""
    for alignment, elements in ((16, 8), (8, 4), (4, 2), (2, 1)):
        spec = forward(4, 4096, "bfloat16", alignment).steps[0].spec
        assert (spec.elements, spec.access) == (elements, alignment)
    assert forward(1, 1001, "float32").steps[0].spec.elements == 1
    mixed = forward(4, 4096, "bfloat16", more={"y": "float32", "weight": "float64"})
    assert mixed.steps[0].spec.elements == 8
    assert mixed.steps[0].spec.access == 16


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_no_elements(shape):
    """Statistics of rows of nothing, and gradients summed over no rows, are written."""
    rows, cols = shape
    filled = {step.arguments[0]: step.spec.flags for step in forward(*shape, "float32").steps}
    assert filled == ({"mean": ("zero",), "rstd": ("nan",)} if rows else {})
    filled = [step.arguments for step in backward(*shape, "float32").steps]
    assert filled == ([("dweight",), ("dbias",)] if cols else [])


def test_layouts():
    spec = (
        forward(4, 256, "float64", offset=True, per_row={"weight": True, "x": True}).steps[0].spec
    )
    names = plan.arguments(spec)
    letters = dict(zip(names, plan.layout(spec), strict=True))
    assert [letters[name] for name in ("x", "x_stride", "weight_div", "eps", "offset")] == list(
        "aqqdd"
    )
    assert "x_div" not in names
    assert "bias_div" not in names
    assert eval(repr(spec), vars(plan)) == spec


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "float64"])
def test_norms_of_channels(kind):
    """Every launch is one that a device can make; blocks are enough, and no more than needed."""
    compute = "float64" if kind == "float64" else "float32"
    types = dict.fromkeys(("x", "weight", "bias", "y"), kind)
    types |= dict.fromkeys(("mean", "rstd"), "float64")
    gradients = dict.fromkeys(("dweight", "dbias"), compute)
    backward = dict.fromkeys(("dy", "x", "weight", "dx"), kind) | gradients
    backward |= dict.fromkeys(("mean", "rstd"), "float64")
    runs, widths = (1, 2, 7, 49, 196, 1024, 10**5, 2**24), (1, 3, 8, 64, 1000, 4096)
    for outer, rows, width, run in itertools.product((1, 3), (1, 2, 130, 10**5), widths, runs):
        if (outer > 1 and run > 1) or width * run >= 2**31 or rows * width * run > 2**40:
            continue  # which there are not, or which are refused
        layout = channel_plan.Layout(outer, rows, width, run)
        groups = 1 if outer > 1 else 0
        alignment = alignment_of(width * run, kind)
        plans = [
            channel_plan.batch(layout, types, alignment=alignment, training=True, groups=groups),
            channel_plan.batch_backward(layout, backward, alignment=alignment, training=True,
                                        groups=groups),
        ]  # fmt: skip
        for planned in plans:
            for step in planned.steps:
                assert_launches(step)
            spec, step = planned.steps[-1].spec, planned.steps[-1]
            if "apply" in spec.kernel:
                at_once = spec.threads * spec.rows * spec.vectors * spec.elements
                assert step.grid * at_once >= layout.size


@pytest.mark.parametrize("run", [2, 3, 7, 49, 1000, 4097, 65536, 2**30 + 1, 2**31 - 1])
def test_numbers_of_runs(run):
    """A product and a shift instead of a division, exact for every column."""
    numbers = plan.run_numbers(run)
    for column in (0, 1, run - 1, run, run + 1, 2 * run - 1, 2 * run, 10**6, 2**31 - 2, 2**31 - 1):
        if column < 2**31:
            assert column * numbers["factor"] < 2**63
            assert column * numbers["factor"] >> numbers["places"] == column // run
