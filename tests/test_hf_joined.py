"""Weights that lie together: the same model, parameters and files, and one product where there were three."""

import copy
import pickle

import pytest
import torch
from hf_models import CANVAS, generate, prompt, tiny_model, transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dgemma_accel
from dgemma_accel.hf import compiled, patches
from dgemma_accel.hf.joined import join, joined_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def linears(*sizes, dtype=torch.float32):
    torch.manual_seed(3)
    return [nn.Linear(8, size, bias=False, dtype=dtype) for size in sizes]


def values_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_values(model, values):
    state = model.state_dict()
    assert list(state) == list(values) and all(torch.equal(state[name], values[name]) for name in values)


class TestJoin:
    def test_values_stay_and_memory_is_shared(self):
        modules = linears(4, 6, 1)
        before = [module.weight.detach().clone() for module in modules]
        parameters = [module.weight for module in modules]
        whole = join(modules)
        assert torch.equal(whole, torch.cat(before)) and not whole.requires_grad
        assert all(a is b.weight and a.requires_grad for a, b in zip(parameters, modules))
        assert all(torch.equal(a, b.weight) for a, b in zip(before, modules))
        with torch.no_grad():
            modules[1].weight.fill_(7.0)
        assert (whole[4:10] == 7.0).all() and torch.equal(whole[:4], before[0])

    def test_what_lies_together_is_left_there(self):
        modules = linears(4, 6)
        first, second = join(modules), join(modules)
        assert first.data_ptr() == second.data_ptr() == modules[0].weight.data_ptr()
        # One behind the other, but not in the order that was asked for.
        turned = join(modules[::-1])
        assert torch.equal(turned, torch.cat([module.weight.detach() for module in modules[::-1]]))

    def test_a_module_that_moved_is_brought_back(self):
        modules = linears(4, 6)
        join(modules)
        for change in (
            lambda m: m.double(),
            lambda m: m.load_state_dict(linears(6)[0].state_dict(), assign=True),
        ):
            for module in modules:
                change(module) if module.weight.shape[0] == 6 else module.double().float()
            if modules[0].weight.dtype != modules[1].weight.dtype:
                assert join(modules) is None
                continue
            assert torch.equal(join(modules), torch.cat([module.weight.detach() for module in modules]))

    @pytest.mark.parametrize(
        "kind", ["bias", "subclass", "hook", "forward", "dtype", "width", "tied", "weight"]
    )
    def test_what_cannot_be_joined(self, kind):
        modules = linears(4, 4)
        last = modules[1]
        if kind == "bias":
            modules[1] = nn.Linear(8, 4)
        elif kind == "subclass":
            modules[1] = type("Other", (nn.Linear,), {})(8, 4, bias=False)
        elif kind == "hook":
            last.register_forward_hook(lambda *_: None)
        elif kind == "forward":
            last.forward = lambda x: x
        elif kind == "dtype":
            last.double()
        elif kind == "width":
            modules[1] = nn.Linear(9, 4, bias=False)
        elif kind == "tied":
            last.weight = modules[0].weight
        elif kind == "weight":
            last.weight = type("Special", (nn.Parameter,), {})(last.weight.detach())
        places = [module.weight.data_ptr() for module in modules]
        assert join(modules) is None and places == [module.weight.data_ptr() for module in modules]

    def test_in_inference_mode(self):
        modules = linears(4, 6)
        with torch.inference_mode():
            whole = join(modules)
            assert join(modules).data_ptr() == whole.data_ptr()
            made_here = [module.requires_grad_(False) for module in linears(4, 6)]
            assert join(made_here) is None
        assert torch.equal(join(modules), torch.cat([module.weight.detach() for module in modules]))
        assert join(made_here) is None
        modules[0](torch.ones(2, 8)).sum().backward()

    def test_no_room(self, monkeypatch):
        modules = linears(4, 6)
        before = [module.weight.data_ptr() for module in modules]

        def full(*_):
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(torch, "cat", full)
        assert join(modules) is None and before == [module.weight.data_ptr() for module in modules]


@pytest.fixture(scope="module")
def joined():
    """(a model whose weights lie together, its values before)."""
    model = tiny_model()
    values = values_of(model)
    with dgemma_accel.accelerated(model):
        found = joined_weights(model.model.decoder, "auto")
    assert all(one.projections is not None for one in found)
    return model, values


class TestModel:
    def test_layers(self, joined):
        model, values = joined
        for layer, one in zip(model.model.decoder.layers, joined_weights(model.model.decoder, "auto")):
            attention = layer.self_attn
            parts = [attention.q_proj, attention.k_proj]
            # Global layers have no projection of their own for values.
            parts += [] if attention.v_proj is None else [attention.v_proj]
            assert torch.equal(one.projections, torch.cat([part.weight for part in parts]))
            assert one.projections.data_ptr() == attention.q_proj.weight.data_ptr()
            # Nothing wants them together where no kernel serves the experts.
            assert one.gate_up is None and one.experts_backend is None
        assert_same_values(model, values)

    def test_encoder_and_decoder_still_share(self, joined):
        model, _ = joined
        for theirs, ours in zip(model.model.encoder.language_model.layers, model.model.decoder.layers):
            assert theirs.self_attn.q_proj.weight.data_ptr() == ours.self_attn.q_proj.weight.data_ptr()

    def test_copies_and_files(self, joined, tmp_path):
        model, values = joined
        assert_same_values(copy.deepcopy(model), values)
        assert_same_values(pickle.loads(pickle.dumps(model)), values)
        model.save_pretrained(tmp_path)
        fresh = tiny_model()
        fresh.save_pretrained(tmp_path / "fresh")
        ours, theirs = (folder / "model.safetensors" for folder in (tmp_path, tmp_path / "fresh"))
        assert ours.read_bytes() == theirs.read_bytes()
        again = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path)
        assert_same_values(again, values)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        loaded = torch.load(tmp_path / "state.pt")
        assert all(torch.equal(loaded[name], value) for name, value in values.items())

    def test_a_step_multiplies_once(self, monkeypatch):
        """Products of a step, joined or not: two less a sliding layer, one less a global one."""
        model, ids = tiny_model(), prompt(1, 5)[0]

        class Products(TorchDispatchMode):
            count = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                Products.count += func._opname in ("mm", "addmm", "bmm")
                return func(*args, **(kwargs or {}))

        def products(steps):
            Products.count = 0
            with dgemma_accel.accelerated(model, graph=True), Products():
                generate(model, ids, max_new_tokens=CANVAS, max_steps=steps, confidence_threshold=1e-9)
            return Products.count

        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        now = products(2) - products(1)
        with monkeypatch.context() as patch:
            apart = [one._replace(projections=None) for one in joined_weights(model.model.decoder, "auto")]
            patch.setattr(compiled, "joined_weights", lambda *_: apart)
            before = products(2) - products(1)
        kinds = [layer.self_attn.v_proj is None for layer in model.model.decoder.layers]
        assert before - now == 2 * kinds.count(False) + kinds.count(True)

    def test_a_projection_of_another_kind(self, monkeypatch):
        """What stands in one layer's projection is called there, and the others stay joined."""

        class Louder(nn.Linear):
            def forward(self, x):
                return super().forward(x) * 1.5

        model, ids = tiny_model(), prompt(1, 5)[0]
        for name in ("k_proj", "up_proj"):
            owner = model.model.decoder.layers[1]
            owner = owner.self_attn if name == "k_proj" else owner.mlp
            other = Louder(*getattr(owner, name).weight.shape[::-1], bias=False)
            other.weight = getattr(owner, name).weight
            setattr(owner, name, other)
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        expected = generate(model, ids).sequences
        with dgemma_accel.accelerated(model, graph=True):
            assert torch.equal(generate(model, ids).sequences, expected)
            assert patches.acceleration_of(model).compiled
            found = joined_weights(model.model.decoder, "auto")
        assert [one.projections is None for one in found] == [False, True, False]

    def test_weights_written_moved_and_replaced(self, monkeypatch):
        """Each is seen by the next call."""
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        model, ids = tiny_model(), prompt(1, 5)[0]

        def write(projection):
            projection.weight.data.mul_(-1.5)

        def replace(projection):
            projection.weight = nn.Parameter(projection.weight.detach() * 0.5)

        def move(projection):
            model.double().float()

        with dgemma_accel.accelerated(model, graph=True):
            for change in (write, replace, move, write):
                with torch.no_grad():
                    for layer in model.model.decoder.layers:
                        change(layer.self_attn.k_proj)
                        change(layer.mlp.up_proj)
                result = generate(model, ids).sequences
                with torch.no_grad():
                    fresh = copy.deepcopy(model)
                dgemma_accel.restore(fresh)
                assert torch.equal(result, generate(fresh, ids).sequences)
