"""`doctor --step` on this machine: what compiling and capturing a step takes."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from dgemma_accel import __main__ as program
from dgemma_accel import cuda_graph
from dgemma_accel.cli import doctor_step


@pytest.fixture
def uncompiled(monkeypatch):
    """The compiler's minutes are not this test's."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("uncompiled")
class TestOnACPU:
    def test_text(self, capsys):
        before = torch.get_rng_state()
        assert program.main(["doctor", "--step"]) == 0
        out = capsys.readouterr().out
        assert "a small random model on cpu: compiled in" in out and "\ncapture    no CUDA\n" in out
        assert torch.equal(torch.get_rng_state(), before)

    def test_json(self, capsys):
        assert program.main(["doctor", "--step", "--json"]) == 0
        step = json.loads(capsys.readouterr().out)["step"]
        assert step["device"] == "cpu" and step["error"] is None and step["compile_seconds"] > 0
        assert step["captured"] is False and step["memory_bytes"] == 0 and step["batch"] == 1

    def test_without_it_nothing_is_compiled(self, capsys, monkeypatch):
        monkeypatch.setattr(doctor_step, "examine_step", lambda: pytest.fail("not asked for"))
        assert program.main(["doctor"]) == 0
        assert "capture  " not in capsys.readouterr().out

    def test_no_compiler(self, capsys, monkeypatch):
        def refuses(function, **options):
            raise RuntimeError("no compiler here")

        monkeypatch.setattr(torch, "compile", refuses)
        assert program.main(["doctor", "--step"]) == 0
        assert "runs uncompiled, not compiled: RuntimeError: no compiler here" in capsys.readouterr().out

    def test_a_step_that_fails_is_told(self, capsys, monkeypatch):
        def broken(device):
            raise ValueError("not today")

        monkeypatch.setattr(doctor_step, "_compiled_and_captured", broken)
        assert program.main(["doctor", "--step"]) == 0
        assert "failed: ValueError: not today" in capsys.readouterr().out


def test_captured_memory_is_told():
    found = {"device": "cuda", "error": None, "compiled": True, "captured": True, "compile_seconds": 31.25,
             "capture_seconds": 2.0, "memory_bytes": 3 << 20, "problem": None}  # fmt: skip
    assert doctor_step.lines_of(found) == [
        "step       a small random model on cuda: compiled in 31.2 s with its first run",
        "capture    captured in 2.0 s, 3.0 MiB",
    ]
    found["storing"] = {"captured": True, "capture_seconds": 0.25, "memory_bytes": 1 << 20, "problem": None}
    assert doctor_step.lines_of(found)[2] == "storing    a finished canvas: captured in 0.2 s, 1.0 MiB"
    found["storing"] |= {"captured": False, "problem": "not captured: no"}
    assert doctor_step.lines_of(found)[2] == "storing    a finished canvas: not captured: no"
    assert "cuda" in cuda_graph.RECORDINGS


@pytest.mark.gpu
def test_on_the_gpu():
    found = doctor_step.examine_step()
    assert found["error"] is None
    for capture in (found, found["storing"]):
        assert capture["captured"] and capture["memory_bytes"] > 0
