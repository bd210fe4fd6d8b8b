"""The tiny model end to end through the Triton kernels (Triton's interpreter where there is no GPU)."""

import sys
from pathlib import Path

import pytest
import torch

import dgemma_accel
from dgemma_accel.backends import MODULES, load

transformers = pytest.importorskip("transformers")
FOLDER = Path(__file__).resolve().parent.parent / "examples" / "tiny-dgemma"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("transformers.models.diffusion_gemma")
    return (
        transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(FOLDER / "checkpoint").to(DEVICE).eval()
    )


def test_same_tokens_as_the_reference_backend(model, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from tasks import make_prompts

    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER / "checkpoint")
    # A short and a long prompt in one padded batch; the count needs a second canvas. The interpreter is slow.
    pairs = [*make_prompts(1, seed=3, tasks=("sort",)), ("count 57 to 72", " ".join(map(str, range(57, 73))))]
    inputs = tokenizer([prompt for prompt, _ in pairs], padding=True, return_tensors="pt").to(DEVICE)
    sequences, ran = {}, set()
    for name in ("reference", "triton"):
        for op in ("block_attention", "row_stats", "commit"):
            implementation, reason = load(op, name)
            assert implementation is not None, reason
        with dgemma_accel.accelerated(model, backend=name):
            torch.manual_seed(1)
            output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask)
        sequences[name] = output.sequences
        ran.update(module for module in sys.modules if module.startswith("dgemma_accel.triton_kernels."))
    assert {MODULES[op]["triton"] for op in ("block_attention", "row_stats", "commit")} <= ran
    assert torch.equal(sequences["triton"], sequences["reference"])
    texts = tokenizer.batch_decode(
        sequences["triton"][:, inputs.input_ids.shape[1] :], skip_special_tokens=True
    )
    assert sum(text.strip() == answer for text, (_, answer) in zip(texts, pairs)) >= 1
