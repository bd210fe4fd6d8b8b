"""What is compiled of recorded steps, and of the pass that stores a canvas: one part for all layers of a kind."""

import pytest
import torch
from hf_models import CANVAS, WINDOW, generate, prompt, tiny_model, trace_without_inductor
from recordings import Again, record_on_a_cpu
from torch._dynamo.utils import counters

import dgemma_accel
from dgemma_accel.hf import bank, graph, patches

pytestmark = pytest.mark.usefixtures("one_thread")

EMBED, SLIDING, FULL, CHOOSE, CONDITION = (
    ("embed", None),
    ("layer", "sliding_attention"),
    ("layer", "full_attention"),
    ("choose", None),
    ("condition", None),
)
OPTIONS = {"max_new_tokens": CANVAS, "max_denoising_steps": 2}


class Scaled(torch.nn.Linear):
    """A projection that the ops of this package cannot stand for."""

    factor = 1.0

    def forward(self, x):
        return super().forward(x) * self.factor


def scale_queries(layer, factor):
    scaled = Scaled(layer.self_attn.q_proj.in_features, layer.self_attn.q_proj.out_features, bias=False)
    scaled.weight, scaled.factor = layer.self_attn.q_proj.weight, factor
    layer.self_attn.q_proj = scaled


@pytest.fixture
def traced(monkeypatch):
    """Steps and passes are recorded as on a GPU."""
    right = torch.compile
    record_on_a_cpu(monkeypatch)
    monkeypatch.setattr(torch, "compile", right)
    trace_without_inductor(monkeypatch)
    counters.clear()


def compiled_parts(model, what="step"):
    (parts,) = (one for one in patches.acceleration_of(model).compiled.values() if one.what == what)
    assert parts.failure is None and not counters["graph_break"]
    # By its number is known what is a part of its own.
    kinds = [(part.__name__, kind[0] if isinstance(kind, tuple) else kind) for part, kind in parts.parts]
    return parts, sorted(kinds, key=str)


@pytest.mark.usefixtures("traced")
class TestLayers:
    @pytest.mark.parametrize("experts", [None, "fp8"])
    def test_those_of_a_kind_share_one(self, experts):
        """Also where a layer's experts go through what `accelerate` has put before their forward."""
        model, ids = tiny_model(expert_width=32), prompt(1, 9)[0]
        if experts is not None:
            dgemma_accel.quantize_experts(model, format=experts)
        expected = generate(model, ids, **OPTIONS).sequences
        with dgemma_accel.accelerated(model, graph=True):
            assert torch.equal(generate(model, ids, **OPTIONS).sequences, expected)
            _, names = compiled_parts(model)
        assert names == sorted([EMBED, SLIDING, FULL, CHOOSE, CONDITION], key=str)
        assert counters["stats"]["unique_graphs"] == 5

    @pytest.mark.parametrize("limit", [8, 1])
    def test_one_that_differs_has_its_own(self, limit):
        """Beside the others', or where the compiler takes no more of them, as a part of its own."""
        model, ids = tiny_model(), prompt(1, 9)[0]
        scale_queries(model.model.decoder.layers[1], 1.5)
        expected = generate(model, ids, **OPTIONS).sequences
        with dgemma_accel.accelerated(model, graph=True), torch._dynamo.config.patch(recompile_limit=limit):
            for _ in range(2):
                assert torch.equal(generate(model, ids, **OPTIONS).sequences, expected)
            parts, names = compiled_parts(model)
        assert counters["stats"]["unique_graphs"] == 6 and len(names) == (5 if limit > 1 else 6)
        assert parts.seconds > 0

    def test_one_that_differs_in_every_call(self, caplog):
        """Past the compiler's limit it runs uncompiled, which is said once."""
        model, ids = tiny_model(), prompt(1, 9)[0]
        attention = model.model.decoder.layers[1].self_attn
        scale_queries(model.model.decoder.layers[1], 1.0)

        def results():
            for factor in (1.0, 1.2, 1.4, 1.6):
                attention.q_proj.factor = factor
                yield generate(model, ids, **OPTIONS).sequences

        expected = list(results())
        with dgemma_accel.accelerated(model, graph=True), torch._dynamo.config.patch(recompile_limit=1):
            assert all(map(torch.equal, results(), expected))
            (step,) = patches.acceleration_of(model).compiled.values()
        said = [r.getMessage() for r in caplog.records if "uncompiled" in r.getMessage()]
        assert len(said) == 1 and "FailOnRecompileLimitHit" in said[0]
        assert "FailOnRecompileLimitHit" in step.failure

    def test_weights_that_are_not_aligned(self):
        """The compiler's code for others takes its weights to be aligned as those are."""
        model, ids = tiny_model(), prompt(1, 9)[0]
        expected = generate(model, ids, **OPTIONS).sequences
        weight = model.model.decoder.layers[1].self_attn.q_proj.weight
        weight.data = torch.cat([weight.data.new_zeros(1), weight.data.flatten()])[1:].view(weight.shape)
        with dgemma_accel.accelerated(model, graph=True):
            assert torch.equal(generate(model, ids, **OPTIONS).sequences, expected)
            parts, _ = compiled_parts(model)
        kinds = [kind for part, kind in parts.parts if part is graph.layer]
        assert len(kinds) == 3 and {aligned for _, aligned in kinds} == {True, False}


@pytest.mark.usefixtures("traced")
def test_the_pass_that_stores_a_canvas():
    """Prompts and caches of other lengths compile nothing anew."""
    model, options = tiny_model(), {"max_new_tokens": 3 * CANVAS, "max_denoising_steps": 3}
    prompts = [
        prompt(2, length, seed=length, left_padding=(0, 3)) for length in (9, 2 * WINDOW, bank.SMALLEST)
    ]
    expected = [generate(model, ids, mask, **options).sequences for ids, mask in prompts]
    with dgemma_accel.accelerated(model, graph=True):
        for (ids, mask), wanted in zip(prompts, expected):
            assert torch.equal(generate(model, ids, mask, **options).sequences, wanted)
        assert compiled_parts(model)[1] == sorted([EMBED, SLIDING, FULL, CHOOSE, CONDITION], key=str)
        _, names = compiled_parts(model, "storing")
        reports = [report for report in dgemma_accel.captures(model) if report.what == "storing"]
    assert names == sorted([("begin", None), SLIDING, FULL], key=str)
    assert counters["stats"]["unique_graphs"] == 5 + 3
    assert [recording.replays for recording in Again.stored] == [4, 2]
    assert all(report.compiled and report.captured and report.problem is None for report in reports)
    assert reports[0].capture_seconds >= reports[0].compile_seconds > 0
