"""When a canvas runs step by step although a graph was asked for, and why. The devices and kernels of a GPU are names
here: nothing is launched."""

import logging
from types import SimpleNamespace

import pytest
import torch
from hf_models import CANVAS, generate, prompt, tiny_model

import dgemma_accel
from dgemma_accel import backends
from dgemma_accel.hf import eager, experts, lookout, patches
from dgemma_accel.hf.call import Call

CUDA = torch.device("cuda", 0)
OPS = ("head_stats", "commit", "soft_embedding", "block_attention")


@pytest.fixture
def model():
    model = dgemma_accel.accelerate(tiny_model(), graph=True)
    # As `from_pretrained` leaves it where torch has a grouped product.
    model.config.text_config._experts_implementation = "grouped_mm"
    return model


class Canvas:
    device, is_cpu, is_cuda, shape = CUDA, False, True, torch.Size((2, CANVAS))


@pytest.fixture
def kernels(monkeypatch):
    """{op: backend} that a GPU's calls take; those of a machine where every op has a kernel."""
    taken = dict.fromkeys((*OPS, "row_stats"), "triton")

    def choose(op, backend, requirements):
        assert requirements["device"] == "cuda" and requirements["compute_capability"] == (9, 0)
        return SimpleNamespace(implementation=SimpleNamespace(backend=taken[op]))

    monkeypatch.setattr(backends, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(eager, "choose", choose)
    monkeypatch.setattr(experts, "kernel_for", lambda *arguments: taken.get("experts"))
    right = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **o: right(*shape, device="cpu", **o))
    taken["experts"] = "triton"
    return taken


def why_not_captured(model):
    return eager.why_not_captured(model, patches.acceleration_of(model), Canvas())


class TestWhatACaptureDoesNotSurvive:
    def test_kernels_do_not_wait(self, model, kernels):
        with torch.no_grad():
            assert why_not_captured(model) is None

    @pytest.mark.parametrize("op", OPS)
    def test_a_reference(self, model, kernels, op):
        kernels[op] = "reference"
        with torch.no_grad():
            assert why_not_captured(model) == f"{op} is the reference, which waits for the device"

    def test_asked_once_in_an_undisturbed_call(self, model, kernels, monkeypatch):
        """What the pass would wait for, ahead of it and for all canvases."""
        asked, right = [], eager._why_waiting

        def waiting(*arguments):
            asked.append(right(*arguments))
            return asked[-1]

        monkeypatch.setattr(eager, "_why_waiting", waiting)
        acceleration, text = patches.acceleration_of(model), model.model.encoder.language_model
        call = Call(undisturbed=True)
        with torch.no_grad():
            for _ in range(2):
                eager.ask_ahead(model, acceleration, call, Canvas())
                assert call.once(eager._why_pass_waits, text, acceleration, on=Canvas()) is None
            assert asked == [None]
            call.disturb()
            kernels["block_attention"] = "reference"
            assert "reference" in call.once(eager._why_pass_waits, text, acceleration, on=Canvas())

    def test_a_machine_without_kernels(self, model, monkeypatch):
        monkeypatch.setattr(backends, "compute_capability", lambda device: (9, 0))
        monkeypatch.setattr(backends, "load", lambda op, name: self.only_reference(op, name))
        assert "is the reference" in why_not_captured(model)

    @staticmethod
    def only_reference(op, name):
        return (
            (SimpleNamespace(backend=name, missing=lambda needs: []), None)
            if name == "reference"
            else (None, "no")
        )

    @pytest.mark.parametrize(
        "implementation, dtype, loops",
        [
            ("eager", torch.bfloat16, True),
            (None, torch.bfloat16, True),
            ("grouped_mm", torch.float32, True),
            ("grouped_mm", torch.bfloat16, False),
            ("batched_mm", torch.float32, False),
        ],
    )
    def test_the_model_s_own_experts(self, model, kernels, implementation, dtype, loops):
        kernels["experts"] = None
        model.to(dtype).config.text_config._experts_implementation = implementation
        with torch.no_grad():
            reason = why_not_captured(model)
        assert reason is None if not loops else "experts" in reason and "device" in reason

    def test_experts_that_the_kernel_does_not_serve(self, model, kernels):
        """Autograd is on, so the original serves them."""
        assert why_not_captured(model.to(torch.float32)) is not None

    def test_fp8_experts_without_a_kernel(self, kernels):
        model = dgemma_accel.accelerate(dgemma_accel.quantize_experts(tiny_model()), graph=True)
        kernels["experts"] = None
        with torch.no_grad():
            assert why_not_captured(model) == "experts is the reference, which waits for the device"


class TestACall:
    @pytest.fixture(autouse=True)
    def uncompiled(self, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    def reason(self, caplog):
        (line,) = [r.getMessage() for r in caplog.records if "without compilation" in r.getMessage()]
        return line

    def test_autocast(self, model, caplog):
        ids, _ = prompt(2, 9)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with caplog.at_level(logging.WARNING, "dgemma_accel"):
                result = generate(model, ids, max_new_tokens=CANVAS).sequences
            assert not patches.acceleration_of(model).compiled and "autocast" in self.reason(caplog)
            dgemma_accel.accelerate(model, graph=False)
            assert torch.equal(generate(model, ids, max_new_tokens=CANVAS).sequences, result)

    def test_autocast_is_the_head_s_too(self):
        """Its logits are rounded as the original's; the first steps of canvases read nothing else that differs."""
        model, (ids, mask) = tiny_model(seed=2), prompt(3, 13, left_padding=(0, 4, 2))
        options = {"max_denoising_steps": 1, "max_new_tokens": 3 * CANVAS}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = generate(model, ids, mask, **options).sequences
            with dgemma_accel.accelerated(model):
                assert torch.equal(generate(model, ids, mask, **options).sequences, expected)

    def test_weights_split_over_ranks(self, model, monkeypatch, caplog):
        monkeypatch.setattr(eager, "crosses_ranks", lambda model: True)
        with caplog.at_level(logging.WARNING, "dgemma_accel"):
            generate(model, prompt(2, 9)[0], max_new_tokens=CANVAS)
        assert not patches.acceleration_of(model).compiled and "split over ranks" in self.reason(caplog)

    def test_what_a_capture_does_not_survive_is_only_asked_of_a_gpu(self, model, monkeypatch):
        monkeypatch.setattr(eager, "why_not_captured", lambda *_: pytest.fail("asked on a CPU"))
        generate(model, prompt(2, 9)[0], max_new_tokens=CANVAS)
        assert patches.acceleration_of(model).compiled


class Copy:
    """Flags of a step that come when the device is so far, and when somebody waits for them."""

    def __init__(self, tensors, ready):
        self.tensors, self.is_ready = tensors, ready

    def ready(self):
        return self.is_ready

    def wait(self):
        return self.tensors


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("in_step", [True, False])
def test_ranks_take_the_same_number_of_steps(monkeypatch, in_step, ahead):
    """One is behind its device and the other is not; the canvas is finished after the fourth step."""
    taken = []
    for ready in (True, False):
        monkeypatch.setattr(lookout, "copy_of", lambda tensors, ready=ready: Copy(tensors, ready))
        watch = lookout.Lookout(None, may_finish=True, ahead=ahead, in_step=in_step)
        steps = 0
        while not watch.is_over():
            watch.note(torch.tensor([steps >= 3]), torch.zeros(1, 2))
            steps += 1
        taken.append(steps)
    assert taken == ([4 + ahead] * 2 if in_step else [4, 4 + ahead])
