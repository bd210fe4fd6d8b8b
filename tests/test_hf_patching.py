"""What accelerate touches, that restore puts it back, and what they refuse."""

import copy
import functools
import pickle
import subprocess
import sys

import pytest
import torch
from hf_models import CANVAS, generate, prompt, tiny_model, transformers

import dgemma_accel
from dgemma_accel.backends import BackendError
from dgemma_accel.hf import patches

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    return tiny_model()


def attributes(model):
    """Every attribute of every module that is neither parameter, buffer nor submodule, and the configs' content."""
    own = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if not key.startswith(("_parameters", "_buffers", "_modules"))
    }
    config = model.config.to_dict(), model.generation_config.to_dict()
    return own, config, [layer.config._attn_implementation for layer in model.model.decoder.layers]


def assert_untouched(model, before):
    own, *rest = attributes(model)
    assert own.keys() == before[0].keys()
    assert all(own[key] is before[0][key] or own[key] == before[0][key] for key in own)
    assert rest == list(before[1:])


def test_restore_puts_back_exactly_what_was_there(model):
    def users_own(*args, **kwargs):
        raise AssertionError("not called")

    attention = model.model.decoder.layers[1].self_attn
    attention.__dict__["forward"] = functools.partial(type(attention).forward, attention)
    model.__dict__["generate"] = users_own
    before = attributes(model)
    assert dgemma_accel.accelerate(model) is model
    assert attributes(model)[0].keys() != before[0].keys()
    assert dgemma_accel.restore(model) is model
    assert_untouched(model, before)
    assert model.generate is users_own


def test_only_this_instance_changes(model):
    other = tiny_model()
    before = attributes(other)
    classes = [transformers.DiffusionGemmaForBlockDiffusion, type(model.model.decoder)]
    methods = [dict(vars(cls)) for cls in classes]
    with dgemma_accel.accelerated(model):
        assert [dict(vars(cls)) for cls in classes] == methods
        assert_untouched(other, before)


@pytest.mark.parametrize("again", ["auto", "reference"])
def test_twice_and_one_restore(model, again):
    before = attributes(model)
    ids, _ = prompt(2, 6)
    expected = generate(model, ids).sequences
    dgemma_accel.accelerate(model)
    dgemma_accel.accelerate(model, backend=again)
    assert patches.acceleration_of(model).backend == again
    assert torch.equal(generate(model, ids).sequences, expected)
    dgemma_accel.restore(model)
    assert_untouched(model, before)


def test_restore_without_accelerate(model):
    before = attributes(model)
    assert dgemma_accel.restore(model) is model
    assert_untouched(model, before)


def test_exception_inside_generate(model):
    class Broken:
        def put(self, value):
            pass

        def put_draft(self, value):
            raise KeyboardInterrupt

        def end(self):
            pass

    before = attributes(model)
    ids, _ = prompt(2, 6)
    expected = generate(model, ids).sequences
    with pytest.raises(KeyboardInterrupt), dgemma_accel.accelerated(model):
        generate(model, ids, streamer=Broken())
    assert_untouched(model, before)
    dgemma_accel.accelerate(model)
    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, streamer=Broken())
    assert torch.equal(generate(model, ids).sequences, expected), "the next call is not correct"
    dgemma_accel.restore(model)
    assert_untouched(model, before)


def test_nested_blocks(model):
    before = attributes(model)
    dgemma_accel.accelerate(model, backend="reference")
    with dgemma_accel.accelerated(model, backend="auto"):
        assert patches.acceleration_of(model).backend == "auto"
    assert patches.acceleration_of(model).backend == "reference"
    dgemma_accel.restore(model)
    assert_untouched(model, before)


def test_a_later_replacement_is_left_alone(model, caplog):
    dgemma_accel.accelerate(model)

    def theirs(*args, **kwargs):
        raise AssertionError("not called")

    model.__dict__["generate"] = theirs
    dgemma_accel.restore(model)
    assert model.generate is theirs and "replaced again" in caplog.text
    assert "_denoising_step" not in model.__dict__


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_are_accelerated_and_independent(model, duplicate):
    before = attributes(model)
    ids, mask = prompt(2, 20, left_padding=(0, 3))
    expected = generate(model, ids, mask).sequences
    dgemma_accel.accelerate(model)
    twin = duplicate(model)
    dgemma_accel.restore(model)
    assert_untouched(model, before)
    state = patches.acceleration_of(twin)
    owners = {id(module) for module in twin.modules()}
    assert state is not None and all(id(patch.owner) in owners for patch in state.patches)
    assert torch.equal(generate(twin, ids, mask).sequences, expected)
    with torch.no_grad():
        twin.model.decoder.norm.weight.mul_(0.5)
    assert not torch.equal(generate(twin, ids, mask).sequences, expected), (
        "the copy runs with the first model's weights"
    )
    dgemma_accel.restore(twin)
    assert patches.ATTRIBUTE not in vars(twin) and "forward" not in vars(
        twin.model.decoder.layers[0].self_attn
    )


class TestAShallowCopy:
    """It shares every module with the first model, and has its own attributes."""

    @pytest.fixture
    def both(self, model):
        dgemma_accel.accelerate(model)
        return model, copy.copy(model)

    def test_is_not_accelerated(self, both):
        model, other = both
        assert patches.acceleration_of(other) is None and dgemma_accel.captures(other) == []
        other.generation_config = copy.deepcopy(model.generation_config)
        other.generation_config.max_new_tokens = CANVAS
        ids, mask = prompt(2, 20, left_padding=(0, 3))
        assert generate(other, ids, mask).sequences.shape == (2, 20 + CANVAS)
        assert generate(model, ids, mask).sequences.shape == (2, 20 + 2 * CANVAS)

    def test_gives_the_original_s_tokens(self, both):
        model, other = both
        ids, mask = prompt(2, 20, left_padding=(0, 3))
        assert torch.equal(generate(other, ids, mask).sequences, generate(model, ids, mask).sequences)

    def test_restore_leaves_the_first_alone(self, both):
        model, other = both
        before = attributes(model)
        dgemma_accel.restore(other)
        assert_untouched(model, before)
        assert patches.acceleration_of(model) is not None

    def test_a_copy_of_the_dictionary_leaves_the_first_alone(self, both):
        """As `DataParallel` makes its replicas."""
        model, other = both
        before = attributes(model)
        other.__dict__.update(model.__dict__)
        dgemma_accel.restore(other)
        assert_untouched(model, before)

    def test_accelerating_it_restores_the_first(self, both):
        model, other = both
        before = attributes(model)
        with pytest.raises(ValueError, match="model: "):
            dgemma_accel.quantize_experts(other)
        assert_untouched(model, before)
        dgemma_accel.accelerate(other)
        assert patches.acceleration_of(model) is None and "generate" not in vars(model)
        ids, mask = prompt(2, 20, left_padding=(0, 3))
        assert torch.equal(generate(other, ids, mask).sequences, generate(model, ids, mask).sequences)
        dgemma_accel.restore(other)
        assert patches.patch_of(model.model.decoder.self_conditioning) is None

    def test_a_copied_part_that_came_accelerated(self, model):
        """Its patches hold a copy of the whole model, of which the caller knows nothing."""
        other = tiny_model()
        dgemma_accel.accelerate(model)
        other.model = copy.deepcopy(model.model)
        dgemma_accel.accelerate(other)
        assert patches.acceleration_of(other) is not None and patches.acceleration_of(model) is not None

    def test_what_stood_there_before_accelerate(self, model):
        def users_own(*args, **kwargs):
            raise AssertionError("not called")

        model.__dict__["generate"] = users_own
        dgemma_accel.accelerate(model)
        assert copy.copy(model).generate is users_own


def test_save_pretrained(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    with dgemma_accel.accelerated(model):
        model.save_pretrained(tmp_path / "fast")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "fast" / name).read_text() == (tmp_path / "plain" / name).read_text()
    loaded = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path / "fast").eval()
    ids, _ = prompt(2, 6)
    with dgemma_accel.accelerated(loaded):
        assert torch.equal(generate(loaded, ids).sequences, generate(model, ids).sequences)


def test_two_threads(model):
    """Two generations at once with one model do not see each other's step."""
    from concurrent.futures import ThreadPoolExecutor

    prompts = [prompt(2, length)[0] for length in (6, 21)]
    canvases = [prompt(2, CANVAS, seed=length)[0] for length in (6, 21)]

    def run(index):
        # One step of one canvas: greedy enough to need no seed, and every soft embedding has to be its own.
        torch.manual_seed(0)
        return model.generate(
            prompts[index], decoder_input_ids=canvases[index], max_denoising_steps=1, max_new_tokens=CANVAS
        ).sequences

    with dgemma_accel.accelerated(model):
        alone = [run(0), run(1)]
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(run, [0, 1] * 4))
    assert all(torch.equal(result, alone[index % 2]) for index, result in enumerate(together))


class TestBadInput:
    @pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), "google/diffusiongemma", None])
    def test_model_of_another_class(self, thing):
        with pytest.raises(TypeError, match=r"model: .*DiffusionGemmaForBlockDiffusion expected, got .*"):
            dgemma_accel.accelerate(thing)
        with pytest.raises(TypeError, match="model"), dgemma_accel.accelerated(thing):
            pass

    def test_a_wrapped_model_is_asked_for(self, model):
        class Wrapper(torch.nn.Module):
            def get_base_model(self):
                return model

        with pytest.raises(TypeError, match=r"got .*Wrapper; pass model.get_base_model\(\)"):
            dgemma_accel.accelerate(Wrapper())

    def test_inner_model(self, model):
        with pytest.raises(TypeError, match="DiffusionGemmaModel"):
            dgemma_accel.accelerate(model.model)

    def test_restore_of_something_else(self):
        with pytest.raises(TypeError, match="model: .* got str"):
            dgemma_accel.restore("model")

    @pytest.mark.parametrize("version", ["5.16.3", "4.57.0", "5.9.1.dev0"])
    def test_old_transformers(self, model, monkeypatch, version):
        monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
        with pytest.raises(ImportError, match=rf"transformers >= 5.17, got {version}"):
            dgemma_accel.accelerate(model)
        assert patches.acceleration_of(model) is None

    @pytest.mark.parametrize(
        "change, message",
        [
            (
                lambda self, hidden_states, index, weights: None,
                "takes index, weights and no longer takes top_k_index",
            ),
            (lambda self, hidden_states, top_k_index, top_k_weights, scale: None, "forward takes scale"),
            (lambda self, hidden_states, top_k_index: None, "forward no longer takes top_k_weights"),
            (None, "forward is gone"),
        ],
    )
    def test_a_later_transformers_with_other_arguments(self, model, monkeypatch, change, message):
        experts = type(model.model.decoder.layers[0].experts)
        if change is None:
            monkeypatch.setattr(experts, "forward", None)
        else:
            change.__module__ = experts.__module__
            monkeypatch.setattr(experts, "forward", change)
        with pytest.raises(ImportError, match=f"is newer than .*DiffusionGemmaTextExperts.*{message}"):
            dgemma_accel.accelerate(model)
        assert patches.acceleration_of(model) is None
        assert "forward" not in model.model.decoder.layers[0].experts.__dict__

    def test_arguments_of_the_caller_s_own_class(self, model, monkeypatch):
        class Own(type(model.model.decoder.layers[0].experts)):
            def forward(self, *args, **kwargs):
                return super().forward(*args, **kwargs)

        model.model.decoder.layers[0].experts.__class__ = Own
        with dgemma_accel.accelerated(model):
            pass

    def test_without_transformers(self, model, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match=r"dgemma-accel\[hf\]"):
            dgemma_accel.accelerate(model)

    def test_unknown_backend(self, model):
        with pytest.raises(ValueError, match=r"backend: must be one of .*'cuda'.*, got 'cudnn'"):
            dgemma_accel.accelerate(model, backend="cudnn")
        with pytest.raises(TypeError, match="backend: a string expected, got int"):
            dgemma_accel.accelerate(model, backend=3)
        assert patches.acceleration_of(model) is None

    def test_backend_that_cannot_run_here(self, model, monkeypatch):
        # The package's attribute of that name is the function.
        module = sys.modules["dgemma_accel.hf.accelerate"]
        monkeypatch.setattr(module, "load", lambda op, name: (None, "no such device"))
        with pytest.raises(
            BackendError, match="'cuda' cannot accelerate a model here: .*no such device"
        ) as told:
            dgemma_accel.accelerate(model, backend="cuda")
        assert str(told.value).count("no such device") == 1 and "row_stats, commit" in str(told.value)
        assert patches.acceleration_of(model) is None


def test_importing_the_package_does_not_import_transformers():
    code = "import dgemma_accel, sys; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
