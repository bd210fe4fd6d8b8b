"""A step and the pass that stores a canvas as PyTorch's compiler writes their parts for a GPU, carried out on the host.

With `make ptx-tests`: inductor's kernels and this package's are compiled for an architecture and what came out is run.
Products are those of the CPU.
"""

import functools
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import PTX
from hf_models import CANVAS, tiny_model
from torch.utils._pytree import tree_leaves

import dgemma_accel
from dgemma_accel.hf import graph, products, storing
from dgemma_accel.hf.linear import QuantizedLinear

pytestmark = [
    pytest.mark.source_tree,
    pytest.mark.skipif(PTX is None, reason="nothing is carried out here; see `make ptx-tests`"),
    pytest.mark.skipif(PTX not in ("9.0", "12.0"), reason="for the GPUs that tools/step_launches.py knows"),
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="needs a PyTorch that was built without CUDA"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))


def arguments_of_step(model, dtype):
    """Of `decide` behind the model: a canvas behind fourteen slots of a cache."""

    def noise(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    generator = torch.Generator().manual_seed(4)
    keys, values, prefixes = [], [], {}
    for layer in model.model.decoder.layers:
        attention = layer.self_attn
        heads = attention.k_proj.out_features // attention.head_dim
        for buffers in (keys, values):
            buffers.append(noise(1, heads, 40, attention.head_dim))
            # Slots that nobody sees.
            buffers[-1][:, :, :3], buffers[-1][:, :, 17:] = float("nan"), float("nan")
            torch._dynamo.maybe_mark_dynamic(buffers[-1], 2)
        angle = noise(1, CANVAS, attention.head_dim).float()
        bounds = (torch.full((1,), slot, dtype=torch.int32) for slot in (3, 17))
        prefixes[attention.layer_type] = graph.Prefix(*bounds, angle.cos().to(dtype), angle.sin().to(dtype))
    vocab = model.config.text_config.vocab_size
    canvas = torch.randint(8, vocab, (1, CANVAS), generator=generator)
    state = graph.State(
        canvas=canvas,
        draft=canvas.clone(),
        history=torch.full((1, 1, CANVAS), -1),
        finished=torch.zeros(1, dtype=torch.bool),
        soft=noise(1, CANVAS, model.config.text_config.hidden_size),
        confidence=torch.zeros(1, CANVAS),
        entropy=torch.zeros(1, CANVAS),
        steps=torch.zeros(1, dtype=torch.int64),
    )
    numbers = graph.Numbers(*map(torch.tensor, (5, 2, 0.7, 0.5, 0.3)))
    settings = graph.Settings(30.0, vocab, 1, False, ("triton",) * 4)
    how = products.side_by_side(model.model.decoder.layers, "triton", dtype)
    rounded = type(model.model.decoder.layers[0].self_attn.q_proj) is QuantizedLinear
    assert how == [products.SideBySide(True, "triton", "triton", rounded)] * len(how)
    return state, graph.InPlace(keys, values, how), prefixes, numbers, None, settings


def trace(dtype, linears=None):
    """Of each part of a step and of the pass that stores a canvas, by its name and its kind of layer: its graph, its
    inputs, what it returns when its operators run one by one."""
    # What other tests compiled counts towards the limit on variants of a function.
    torch._dynamo.reset()
    model, seen, parts, found = tiny_model(dtype).requires_grad_(False), [], {}, {}
    if linears is not None:
        dgemma_accel.quantize_linears(model, format=linears)

    def keep(module, inputs):
        seen.append((module, inputs))
        return module.forward

    def run(what, part, module, *arguments):
        kind = getattr(getattr(module, "self_attn", None), "layer_type", None)
        key = what, part.__name__, kind
        if key not in parts:
            parts[key] = torch.compile(part, backend=keep, fullgraph=True, dynamic=False)
        result = parts[key](module, *arguments)
        if key not in found:
            found[key] = (*seen[-1], result)
        return result

    with dgemma_accel.accelerated(model, backend="triton"), torch.no_grad():
        state, in_place, prefixes, numbers, pinned, settings = arguments_of_step(model, dtype)
        step, storing_pass = (functools.partial(run, what) for what in ("step", "storing"))
        decision = graph.decide(model, state, in_place, prefixes, numbers, pinned, settings, step)
        others = numbers.temperature, pinned, settings
        step(graph.condition, model, decision, state.finished, state.soft, *others)
        slots = torch.arange(17, 17 + CANVAS)
        inputs = storing.Inputs(
            state.soft, {kind: storing.Place(prefix, slots) for kind, prefix in prefixes.items()}
        )
        storing.store(model.model.encoder.language_model, inputs, in_place, "triton", storing_pass)
    # Layers of one kind are one graph.
    assert len(seen) == len(found)
    return found


@pytest.fixture
def carry_out():
    """From (graph, inputs) to what inductor's code for it returns, and the names of the kernels that ran."""
    import step_launches
    from ptx import inductor

    step_launches.load_guard()

    def run(module, inputs, place=0, change=lambda code: code, **options):
        code = change(inductor.code_for(module, inputs, PTX, **options))
        return inductor.carried_out(code, inputs, PTX, lambda configs: configs[place])

    return run


@pytest.mark.parametrize(
    "dtype, place, options, linears",
    [
        (torch.float32, 0, {}, None),
        (torch.float32, -1, {"combo_kernels": True}, None),
        (torch.bfloat16, -1, {}, "fp8"),
    ],
    ids=["fp32", "fp32-combo_kernels", "bf16, FP8 linears"],
)
def test_parts_are_what_their_operators_make_one_by_one(carry_out, dtype, place, options, linears):
    """By the first or the last of the tile shapes among which inductor would choose by timing."""
    launched, half = {}, dtype == torch.bfloat16
    for key, (module, inputs, expected) in trace(dtype, linears).items():
        results, ran = carry_out(module, inputs, place, **options)
        launched[key] = len(ran)
        leaves = [leaf for leaf in tree_leaves(expected) if leaf is not None]
        for number, (result, wanted) in enumerate(zip(results, leaves, strict=True)):
            assert result.dtype == wanted.dtype and result.shape == wanted.shape
            if not result.is_floating_point():
                # Rounding between operators, which fused kernels do without, moves bf16 logits.
                assert half or torch.equal(result, wanted), (key, number)
            else:
                error = (result.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-6)
                assert error < (0.05 if half else 1e-4), (key, number)
    sliding, full, choose = (3, 3, 2) if options else (5, 4, 3)
    if linears is not None:
        # Rows are rounded by the kernel that makes them, but for those that attention makes.
        sliding, full = sliding + 1, full + 1
    assert launched == {
        ("step", "embed", None): 3,
        ("step", "layer", "sliding_attention"): sliding,
        ("step", "layer", "full_attention"): full,
        ("step", "choose", None): choose,
        ("step", "condition", None): 1,
        ("storing", "begin", None): 1,
        ("storing", "layer", "sliding_attention"): sliding,
        ("storing", "layer", "full_attention"): full,
    }


def test_a_wrong_kernel_is_seen(carry_out):
    """Norms with another epsilon."""
    module, inputs, (expected, *_) = trace(torch.float32)["step", "layer", "sliding_attention"]
    changed = []

    def change(code):
        changed.append(code.count("1e-06"))
        return code.replace("1e-06", "1.0")

    (hidden, *_), _ = carry_out(module, inputs, change=change)
    assert changed[0] and (hidden - expected).norm() > 0.1 * expected.norm()
