"""The drop-in's experts: which calls go through the op, and that they give the original's tokens."""

from types import SimpleNamespace

import pytest
import torch
from hf_models import CANVAS, generate, prompt, tiny_model, transformers

import dgemma_accel
from dgemma_accel import backends
from dgemma_accel.hf import experts as hf_experts
from dgemma_accel.hf import layer as hf_layer
from dgemma_accel.hf import patches
from dgemma_accel.hf.products import side_by_side

triton_experts = pytest.importorskip("dgemma_accel.triton_kernels.experts")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernel = pytest.mark.skipif(
    triton_experts.unavailable() is not None, reason=str(triton_experts.unavailable())
)


@pytest.fixture(scope="module")
def model():
    return tiny_model().to(DEVICE)


@pytest.fixture
def calls(monkeypatch):
    """The backends that the op was called with, and the rows of each call."""
    seen, right = [], hf_experts.experts

    def recorded(hidden, *args, backend, **kwargs):
        seen.append((backend, len(hidden)))
        return right(hidden, *args, backend=backend, **kwargs)

    monkeypatch.setattr(hf_experts, "experts", recorded)
    return seen


def layers_of(model):
    return [*model.model.encoder.language_model.layers, *model.model.decoder.layers]


def run_layer(experts, seed=0):
    """One call of a layer's experts as its layer makes it."""
    weight = experts.gate_up_proj
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(10, weight.shape[-1], generator=generator).to(weight.device, weight.dtype)
    index = torch.rand(10, weight.shape[0], generator=generator).topk(2).indices.to(weight.device)
    weights = torch.rand(10, 2, generator=generator).to(weight.device)
    with torch.no_grad():
        return experts(hidden, index, weights)


@needs_kernel
def test_same_tokens_through_the_kernels(model, calls):
    ids = prompt(1, 9)[0].to(DEVICE)
    expected = generate(model, ids, max_new_tokens=CANVAS)
    with dgemma_accel.accelerated(model, backend="triton", graph=False):
        output = generate(model, ids, max_new_tokens=CANVAS)
    assert torch.equal(output.sequences, expected.sequences)
    assert {backend for backend, _ in calls} == {"triton"}
    # Prompt and canvas: encoder and decoder layers alike.
    assert {rows for _, rows in calls} >= {9, CANVAS}


class TestSideBySide:
    """A compiled step's dense MLP, router and experts as one op."""

    @pytest.fixture
    def made(self, monkeypatch):
        """The rows of each call of `feed_forward`; steps are not compiled."""
        seen, right = [], hf_layer.feed_forward

        def recorded(call, backend):
            seen.append((backend, len(call.dense)))
            return right(call, backend)

        monkeypatch.setattr(hf_layer, "feed_forward", recorded)
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        return seen

    @staticmethod
    def assert_same(model):
        """Of every layer, against its own modules."""
        hidden, layers = torch.randn(2, CANVAS, 64).to(DEVICE), model.model.decoder.layers
        with torch.no_grad():
            rows = hidden.flatten(0, 1)
            expected = [
                (layer.mlp(layer.pre_feedforward_layernorm(hidden)), layer.experts(
                    layer.pre_feedforward_layernorm_2(rows), *reversed(layer.router(rows)[1:])))
                for layer in layers
            ]  # fmt: skip
            with dgemma_accel.accelerated(model, backend="triton"):
                how = side_by_side(model.model.decoder.layers, "triton", torch.float32)
                results = [hf_layer._feed_forward(*each) for each in zip(layers, [hidden] * len(layers), how)]
        for result, truth in zip(results, expected, strict=True):
            for ours, theirs in zip(result, truth):
                assert ours.shape == hidden.shape
                assert torch.allclose(ours, theirs.view_as(ours), rtol=1e-4, atol=1e-5)

    @needs_kernel
    def test_same_tokens(self, made):
        model, ids = tiny_model().to(DEVICE), prompt(1, 9)[0].to(DEVICE)
        options = {"max_new_tokens": CANVAS, "max_denoising_steps": 2}
        expected = generate(model, ids, **options)
        with dgemma_accel.accelerated(model, backend="triton", graph=True):
            output = generate(model, ids, **options)
            assert patches.acceleration_of(model).compiled
        assert torch.equal(output.sequences, expected.sequences)
        assert made == [("triton", CANVAS)] * 2 * len(model.model.decoder.layers)

    @needs_kernel
    @pytest.mark.parametrize("form", ["fp8", "nvfp4"])
    def test_quantised_experts(self, made, form):
        model = tiny_model(expert_width=32).to(DEVICE)
        dgemma_accel.quantize_experts(model, format=form)
        self.assert_same(model)
        assert len(made) == len(model.model.decoder.layers)

    @needs_kernel
    @pytest.mark.parametrize("kind", [None, "router", "router_weight", "mlp", "activation", "down"])
    def test_a_layer_that_is_another_s(self, made, kind):
        """Its own modules are called; the other layers' are not."""
        model, seen = tiny_model().to(DEVICE), []
        layer = model.model.decoder.layers[1]
        own = {
            "router": layer.router,
            "router_weight": layer.router.proj,
            "mlp": layer.mlp,
            "down": layer.mlp.down_proj,
        }

        def watch(forward):
            def noted(self, *arguments):
                seen.append(1)
                return forward(self, *arguments)

            return noted

        if kind == "activation":
            layer.mlp.act_fn = torch.nn.ReLU()
        elif kind is not None:
            module = own[kind]
            module.__class__ = type("Own", (type(module),), {"forward": watch(type(module).forward)})
        self.assert_same(model)
        assert len(seen) == (2 if kind in own else 0)
        assert len(made) == len(model.model.decoder.layers) - (kind is not None)


class Wrapped(torch.nn.Module):
    """What stands for a module and has none of its attributes, as an adapter's wrapper does."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *arguments):
        self.calls += 1
        return self.inner(*arguments)


@pytest.mark.parametrize("name", ["mlp", "router", "experts", "mlp.gate_proj", "router.proj"])
def test_a_module_that_has_another_s_attributes(name, monkeypatch):
    """Before `accelerate`: the compiled step calls it, whatever the backend."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model, ids = tiny_model().to(DEVICE), prompt(1, 9)[0].to(DEVICE)
    options = {"max_new_tokens": CANVAS, "max_denoising_steps": 2}
    expected = generate(model, ids, **options)
    layer = model.model.decoder.layers[1]
    wrapped = Wrapped(layer.get_submodule(name))
    owner, _, attribute = name.rpartition(".")
    setattr(layer.get_submodule(owner), attribute, wrapped)
    backend = "auto" if triton_experts.unavailable() is not None else "triton"
    with dgemma_accel.accelerated(model, backend=backend, graph=True):
        output = generate(model, ids, **options)
        assert patches.acceleration_of(model).compiled
    assert torch.equal(output.sequences, expected.sequences) and wrapped.calls == 2


@needs_kernel
@pytest.mark.parametrize("name", ["proj", "per_expert_scale"])
def test_a_router_of_another_size(name):
    """Of more experts than there are: the model's own code says what it thinks of that."""
    model = tiny_model().to(DEVICE)
    router = model.model.decoder.layers[1].router
    if name == "proj":
        router.proj.weight = torch.nn.Parameter(router.proj.weight.repeat(2, 1))
    else:
        router.per_expert_scale = torch.nn.Parameter(router.per_expert_scale[:-1].clone())
    with dgemma_accel.accelerated(model, backend="triton"), torch.no_grad():
        how = side_by_side(model.model.decoder.layers, "triton", torch.float32)
    assert [one.experts_backend for one in how] == ["triton", None, "triton"]


@needs_kernel
def test_every_layer_goes_through_the_op_and_restore_undoes_it(model, calls):
    expected = [run_layer(layer.experts) for layer in layers_of(model)]
    dgemma_accel.accelerate(model, backend="triton")
    results = [run_layer(layer.experts) for layer in layers_of(model)]
    assert len(calls) == len(results) == 6
    assert all(torch.allclose(result, truth, atol=1e-5) for result, truth in zip(results, expected))
    dgemma_accel.restore(model)
    again = [run_layer(layer.experts) for layer in layers_of(model)]
    assert len(calls) == 6 and all(torch.equal(a, b) for a, b in zip(again, expected))
    assert not any("forward" in layer.experts.__dict__ for layer in layers_of(model))


@pytest.mark.parametrize("name", ["auto", "cpp", "reference"])
def test_without_a_kernel_the_models_own_experts_stay(model, calls, caplog, name):
    if DEVICE == "cuda" and name != "reference":
        pytest.skip("auto and cpp take the kernel on a GPU")
    layer = model.model.decoder.layers[0]
    expected = run_layer(layer.experts)
    with dgemma_accel.accelerated(model, backend=name), caplog.at_level("WARNING", logger="dgemma_accel"):
        assert torch.equal(run_layer(layer.experts), expected)
    assert not calls and not caplog.records


def test_what_auto_takes_on_a_gpu(monkeypatch):
    """A backend that has no experts of its own, or none for a call, takes what auto takes, also by environment."""
    monkeypatch.setattr(hf_experts, "compute_capability", lambda device: (12, 0))
    features = {"triton": {}, "cuda": {"dtype": {torch.bfloat16}, "width": {32}}}
    present = {
        name: (backends.Implementation("experts", name, lambda *a: None, SimpleNamespace(FEATURES=own)), None)
        for name, own in features.items()
    }
    monkeypatch.setattr(hf_experts, "load", lambda op, name: present.get(name, (None, "missing")))
    device, sizes, right = torch.device("cuda"), (4, 32, 64), backends.auto_table

    def taken(backend, dtype=torch.bfloat16, sizes=sizes):
        return hf_experts.kernel_for(backend, device, dtype, sizes)

    for name in ("auto", "cpp", "triton"):
        assert taken(name) == "triton"
    assert taken("cuda") == "cuda" and taken("reference") is None
    assert taken("cuda", torch.float32) == taken("cuda", sizes=(4, 40, 64)) == "triton"
    # Each op by its own order.
    table = {
        op: {"default": {"order": [name], "basis": ""}}
        for op, name in (("experts", "cuda"), ("feed_forward", "triton"))
    }
    monkeypatch.setattr(backends, "auto_table", lambda: table)
    assert [hf_experts.kernel_for("auto", device, torch.bfloat16, sizes, op) for op in table] == [
        "cuda",
        "triton",
    ]
    monkeypatch.setattr(backends, "auto_table", right)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "cuda")
    assert taken("auto") == "cuda"
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE)
    del present["triton"]
    assert taken("auto") == "cuda" and taken("auto", torch.float32) is None
    del present["cuda"]
    assert taken("auto") is None


def test_a_gpu_without_the_kernel_is_worth_a_word(monkeypatch):
    reasons = {"triton": (None, "a compiler is missing"), "cuda": (None, "built without CUDA")}
    monkeypatch.setattr(hf_experts, "compute_capability", lambda device: (12, 0))
    monkeypatch.setattr(hf_experts, "load", lambda op, name: reasons[name])
    device, sizes = torch.device("cuda"), (4, 40, 64)

    def why(backend, device=device):
        return hf_experts.why_no_kernel(backend, device, torch.bfloat16, sizes)

    for name in ("auto", "cuda"):
        assert why(name) == "no kernel: triton: a compiler is missing; cuda: built without CUDA"
    module = SimpleNamespace(FEATURES={"width": {32}})
    reasons["cuda"] = backends.Implementation("experts", "cuda", lambda *a: None, module), None
    assert why("auto") == "no kernel: triton: a compiler is missing; cuda: width: required 40, supported {32}"
    # Nothing is missing: what a kernel does not have nobody expects.
    reasons["triton"] = reasons["cuda"]
    assert why("auto") is None
    # Asked for, or a device that has none.
    assert why("reference") is None and why("auto", torch.device("cpu")) is None


def test_torch_marks_a_constant_as_the_choice_of_a_kernel_is_marked():
    marked = vars(torch.compiler.assume_constant_result(lambda: None))
    assert marked and marked.items() <= vars(hf_experts.kernel_for).items()


class Subclassed(torch.nn.Parameter):
    """What quantised and sharded weights look like."""


def _other_activation(experts):
    experts.act_fn = transformers.activations.ACT2FN["relu"]


def _sharded(experts):
    experts._is_expert_parallel = True


def _quantised(experts):
    experts.down_proj.__class__ = Subclassed


def _own_gate(experts):
    experts._apply_gate = lambda joint: joint.chunk(2, -1)[0]


def _own_class(experts):
    experts.__class__ = type("OtherExperts", (type(experts),), {})


def _own_forward_in_a_class_of_that_name(experts):
    def doubled(self, *args):
        return type(self).__mro__[1].forward(self, *args) * 2

    experts.__class__ = type(type(experts).__name__, (type(experts),), {"forward": doubled})


def _offloaded(experts):
    experts._hf_hook = object()


def _replaced(experts):
    experts.__dict__["forward"] = lambda hidden, index, weights: hidden * 2


@needs_kernel
@pytest.mark.parametrize(
    "change, reason",
    [
        (_other_activation, "the activation is ReLU"),
        (_sharded, "the experts are sharded"),
        (_quantised, "down_proj is a Subclassed"),
        (_own_gate, "with arithmetic of its own"),
        (_own_class, "the experts are a OtherExperts"),
        (_own_forward_in_a_class_of_that_name, "the experts' forward is not transformers' own"),
        (_offloaded, "forward was replaced before"),
        (_replaced, "forward was replaced before"),
    ],
)
def test_other_experts_are_served_by_the_original_and_said_once(calls, caplog, change, reason):
    model = tiny_model().to(DEVICE)
    experts = model.model.decoder.layers[1].experts
    change(experts)
    expected = run_layer(experts)
    with caplog.at_level("WARNING", logger="dgemma_accel"):
        dgemma_accel.accelerate(model, backend="triton")
        for _ in range(2):
            assert torch.equal(run_layer(experts), expected)
    assert not calls
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("experts:")]
    assert len(lines) == 1 and reason in lines[0]
    run_layer(model.model.decoder.layers[0].experts)
    assert calls


@needs_kernel
def test_training_and_mixed_dtypes_are_served_by_the_original(model, calls, caplog):
    experts = model.model.decoder.layers[0].experts
    hidden, index = (
        torch.randn(3, experts.hidden_dim, device=DEVICE),
        torch.tensor([[0], [1], [2]], device=DEVICE),
    )
    ones = torch.ones(3, 1, device=DEVICE)
    with dgemma_accel.accelerated(model, backend="triton"), caplog.at_level("WARNING", logger="dgemma_accel"):
        assert experts(hidden, index, ones).requires_grad
        assert "autograd is on" in caplog.text
        with torch.no_grad():
            experts(hidden.bfloat16(), index, ones)
        assert "dtypes torch.bfloat16 and torch.float32 of rows and weights" in caplog.text
    assert not calls


@needs_kernel
def test_hooks_still_run(model, calls):
    experts, seen = model.model.decoder.layers[0].experts, []
    handle = experts.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    try:
        with dgemma_accel.accelerated(model, backend="triton"):
            run_layer(experts)
    finally:
        handle.remove()
    assert len(seen) == len(calls) == 1


@needs_kernel
@pytest.mark.parametrize("name, nodes", [("triton", 1), ("reference", 0)])
def test_traces_whole(model, name, nodes):
    """The drop-in's compiled step: one graph, in which a kernel of the experts is one opaque node."""
    layer = model.model.decoder.layers[0]
    hidden = torch.randn(1, 12, 64, device=DEVICE)

    def moe(hidden):
        rows = hidden.reshape(-1, hidden.shape[-1])
        _, weights, index = layer.router(rows)
        return layer.experts(layer.pre_feedforward_layernorm_2(rows), index, weights)

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad(), dgemma_accel.accelerated(model, backend=name):
        expected = moe(hidden)
        torch._dynamo.reset()
        result = torch.compile(moe, backend=keep, fullgraph=True)(hidden)
        torch._dynamo.reset()
    assert torch.allclose(result, expected, atol=1e-5)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert len(graphs) == 1 and sum(target.startswith("dgemma.experts") for target in targets) == nodes
