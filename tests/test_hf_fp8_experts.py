"""The drop-in with transformers' FP8 experts: served by the kernels, and nearer the truth than their budget asks."""

import copy

import pytest
import torch
from hf_models import CANVAS, generate, prompt, tiny_config, tiny_model
from test_experts import uneven_fp8

import dgemma_accel
from dgemma_accel.hf import experts as hf_experts
from dgemma_accel.hf.quantize import layers_of
from dgemma_accel.reference.budget_experts import check_experts
from dgemma_accel.reference.quantization import dequantize

triton_experts = pytest.importorskip("dgemma_accel.triton_kernels.experts")
finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH = 96
if triton_experts.unavailable() is not None:
    pytest.skip(str(triton_experts.unavailable()), allow_module_level=True)


def fp8_experts(config, plain=None):
    """An `FP8Experts` with the weights of `plain`, or random ones."""
    experts = finegrained.FP8Experts(config, block_size=(128, 128))
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            weight, scale = getattr(experts, name), getattr(experts, f"{name}_scale_inv")
            full = (
                torch.randn(weight.shape) * weight.shape[-1] ** -0.5
                if plain is None
                else getattr(plain, name)
            )
            quantised, scales = uneven_fp8(full.float().cpu())
            weight.copy_(quantised)
            if scale.dtype == torch.float32 and scale.shape == scales.shape:
                scale.copy_(scales)
    return experts.requires_grad_(False).to(DEVICE)


def wide_model():
    """Experts of more than one block: the up projection begins inside the first."""
    return tiny_model(expert_width=WIDTH).to(DEVICE)


@pytest.fixture
def pair():
    """(a model with FP8 experts, the same with their values in fp32)."""
    quantised, plain = wide_model(), wide_model()
    made = {}
    for theirs, ours in zip(layers_of(plain), layers_of(quantised)):
        # Layers of the encoder and the decoder share their weights.
        shared = theirs.experts.gate_up_proj.data_ptr()
        if shared not in made:
            made[shared] = fp8_experts(quantised.config.text_config, theirs.experts)
        ours.experts = copy.deepcopy(made[shared])
    for theirs, ours in zip(layers_of(plain), layers_of(quantised)):
        with torch.no_grad():
            for name in ("gate_up_proj", "down_proj"):
                scale = getattr(ours.experts, f"{name}_scale_inv")
                getattr(theirs.experts, name).copy_(
                    dequantize(getattr(ours.experts, name), scale, torch.float32)
                )
    return quantised, plain


@pytest.fixture
def calls(monkeypatch):
    seen, right = [], hf_experts.experts

    def recorded(hidden, *args, **kwargs):
        seen.append(kwargs)
        return right(hidden, *args, **kwargs)

    monkeypatch.setattr(hf_experts, "experts", recorded)
    return seen


def inputs_of(experts, dtype, seed=0):
    noise = torch.Generator().manual_seed(seed)
    hidden = torch.randn(10, experts.hidden_dim, generator=noise)
    index = torch.rand(10, experts.num_experts, generator=noise).topk(2).indices
    weights = torch.rand(10, 2, generator=noise)
    return hidden.to(DEVICE, dtype), index.to(DEVICE), weights.to(DEVICE)


def accelerated_layer(monkeypatch, experts):
    """A model whose first decoder layer has these experts, the calls of its original, and a call of that layer."""
    model, originals = tiny_model().to(DEVICE), []

    def original(self, hidden_states, top_k_index, top_k_weights):
        originals.append(hidden_states.shape)
        return hidden_states * 2

    model.model.decoder.layers[0].experts = experts
    dgemma_accel.accelerate(model, backend="triton")
    # Afterwards: before, it would be code of the caller's own, which is never left out.
    monkeypatch.setattr(type(experts), "forward", original)
    return model, originals


def test_same_tokens_as_the_dequantised_model(pair, calls, caplog):
    quantised, plain = pair
    ids = prompt(1, 9)[0].to(DEVICE)
    expected = generate(plain, ids, max_new_tokens=CANVAS)
    with dgemma_accel.accelerated(quantised, backend="triton", graph=False), caplog.at_level("WARNING"):
        output = generate(quantised, ids, max_new_tokens=CANVAS)
    assert torch.equal(output.sequences, expected.sequences)
    assert not [record for record in caplog.records if record.getMessage().startswith("experts:")]
    assert calls and all(call["gate_up_scale"].shape == (4, 2, 1) for call in calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden_size, width", [(64, 96), (150, 101), (256, 192)])
def test_within_the_budget_of_weights_in_fp8(monkeypatch, calls, dtype, hidden_size, width):
    config = tiny_config().text_config
    config.hidden_size, config.moe_intermediate_size = hidden_size, width
    experts = fp8_experts(config)
    _, originals = accelerated_layer(monkeypatch, experts)
    inputs = inputs_of(experts, dtype)
    with torch.no_grad():
        result = experts(*inputs)
    assert len(calls) == 1 and not originals
    scales = {"gate_up_scale": experts.gate_up_proj_scale_inv, "down_scale": experts.down_proj_scale_inv}
    assert not check_experts(result, *inputs, experts.gate_up_proj, experts.down_proj, **scales)
    # What the original adds, rows rounded to FP8 (by row and 128 columns), is more than the budget allows.
    hidden = inputs[0].float()
    scale = hidden.abs().amax(-1, True) / 448
    rounded = ((hidden / scale).to(torch.float8_e4m3fn).float() * scale).to(dtype)
    with torch.no_grad():
        theirs = experts(rounded, *inputs[1:])
    assert check_experts(theirs, *inputs, experts.gate_up_proj, experts.down_proj, **scales)


def test_a_weight_that_stayed_in_the_models_dtype(monkeypatch, calls):
    """transformers quantises no matrix with a side that 128 does not divide: `down` of DiffusionGemma, I = 704."""
    experts = fp8_experts(tiny_config(WIDTH).text_config)
    experts.down_proj = torch.nn.Parameter(
        torch.randn(experts.down_proj.shape, device=DEVICE), requires_grad=False
    )
    accelerated_layer(monkeypatch, experts)
    inputs = inputs_of(experts, torch.float32)
    with torch.no_grad():
        result = experts(*inputs)
    assert "down_scale" not in calls[0]
    scale = experts.gate_up_proj_scale_inv
    assert not check_experts(result, *inputs, experts.gate_up_proj, experts.down_proj, gate_up_scale=scale)


def _narrow_scale(experts):
    experts.gate_up_proj_scale_inv.data = experts.gate_up_proj_scale_inv.data[:, :1]


def _other_scale_dtype(experts):
    experts.down_proj_scale_inv.data = experts.down_proj_scale_inv.data.half()


def _set(**attributes):
    return lambda experts: [setattr(experts, name, value) for name, value in attributes.items()]


@pytest.mark.parametrize(
    "change, reason",
    [
        (_set(block_size=(64, 128)), "the FP8 experts have block_size (64, 128)"),
        (_set(block_size=None), "the FP8 experts have block_size None"),
        (_set(activation_scheme="static"), "the FP8 experts have activation_scheme static"),
        (_set(limit=7.0), "the FP8 experts have limit 7.0"),
        (_set(swiglu_alpha=1.7), "the FP8 experts have swiglu_alpha 1.7"),
        (_set(gate_softcap=4.0), "the FP8 experts have gate_softcap 4.0"),
        (_narrow_scale, "gate_up_proj_scale_inv has (1, 1) scales by expert for (2, 1) blocks"),
        (_other_scale_dtype, "down_proj_scale_inv is a Parameter of torch.float16"),
    ],
)
def test_other_fp8_experts_are_served_by_the_original_and_said_once(
    monkeypatch, calls, caplog, change, reason
):
    experts = fp8_experts(tiny_config(WIDTH).text_config)
    change(experts)
    inputs = inputs_of(experts, torch.float32)
    with caplog.at_level("WARNING", logger="dgemma_accel"), torch.no_grad():
        _, originals = accelerated_layer(monkeypatch, experts)
        for _ in range(2):
            assert torch.equal(experts(*inputs), inputs[0] * 2)
    assert not calls and len(originals) == 2
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("experts:")]
    assert len(lines) == 1 and reason in lines[0]


def test_scales_of_more_rows_than_blocks_are_left_to_the_original(monkeypatch, calls):
    """Up to 2 * I = 128 the original has two rows of scales, of which it reads one."""
    experts = fp8_experts(tiny_config().text_config)
    assert experts.gate_up_proj_scale_inv.shape[1] == 2 and experts.gate_up_proj.shape[1] == 48
    _, originals = accelerated_layer(monkeypatch, experts)
    with torch.no_grad():
        experts(*inputs_of(experts, torch.float32))
    assert originals and not calls


def test_without_a_kernel_the_original_stays(monkeypatch, calls):
    experts = fp8_experts(tiny_config(WIDTH).text_config)
    model, originals = accelerated_layer(monkeypatch, experts)
    dgemma_accel.accelerate(model, backend="reference")
    with torch.no_grad():
        experts(*inputs_of(experts, torch.float32))
    assert originals and not calls
    dgemma_accel.restore(model)
    assert "forward" not in experts.__dict__
