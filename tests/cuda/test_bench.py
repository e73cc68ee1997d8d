"""``bench --device cuda``: what it compares computes the same; where it cannot run, it says so."""

import contextlib
import io

import pytest

from fastnorm import cli, timing

pytest.importorskip("rich", reason="rich is not installed")
from fastnorm.cuda import bench


def refused(*words):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert cli.main(["bench", "--device", "cuda", *words]) == 2
    return said.getvalue()


@pytest.mark.parametrize(("words", "reason"), [
    (["--op", "moments"], "--op: got moments, wanted one of layer_norm, "),
    (["--plot", "x.png"], "--plot"),
])  # fmt: skip
def test_what_it_does_not_do(words, reason):
    assert refused(*words).startswith(f"bench --device cuda: {reason}")


def test_what_is_missing():
    torch = None
    with contextlib.suppress(ImportError):
        import torch
    if torch is None:
        assert "torch" in refused()
    elif not torch.cuda.is_available():
        assert "CUDA" in refused()


class Clock:
    """A clock that counts."""

    def __init__(self):
        self.counts = []

    def seconds(self, call, count):
        self.counts.append(count)
        call()
        return 1e-3

    def wait(self):
        pass

    def replayed(self, call):
        return 5e-4


@pytest.mark.parametrize("dtype", bench.DTYPES)
@pytest.mark.parametrize("op", bench.OPS)
def test_all_contenders_compute_the_same(op, dtype, monkeypatch, capsys, tmp_path):
    """On the CPU, whose tensors take the same calls."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = bench.Case(op, (37, 64), dtype, device="cpu")
    results = bench.measure(case, Clock(), 3)
    names = [result.provider for result in results]
    assert names[0] == "fastnorm"
    assert {"torch", "torch.compile", "copy"} <= set(names)
    allowed = {"float32": 2e-6, "float64": 1e-13, "float16": 4e-3, "bfloat16": 4e-2}[dtype]
    for result in results:
        assert (result.error is None) == (result.provider == "copy")
        assert result.error is None or result.error <= allowed, result.provider
        assert result.ratio == 1
    bench.show(results)
    assert "torch.compile" in capsys.readouterr().out
    timing.write_json(bench.machine(), results, str(tmp_path / "results.json"))
    assert "of_copy" in (tmp_path / "results.json").read_text()
