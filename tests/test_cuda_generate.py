"""A tiny model end to end through the CUDA kernels, all ops of a step: what a machine without Triton runs."""

import pytest
import torch
from conftest import DEVICES
from hf_models import CANVAS, generate, prompt, tiny_model

import dgemma_accel
from dgemma_accel.hf import experts as hf_experts
from dgemma_accel.native.params import extension

# Launching functions of the extension, at least one for each op.
LAUNCHES = (
    "block_attention_cuda", "row_stats_cuda", "commit_cuda", "experts_cuda", "soft_embedding_probabilities_cuda",
    "soft_embedding_sum_cuda",
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.ptx
def test_tokens_of_the_reference_backend(monkeypatch):
    """In a padded batch and over two canvases. Where two tokens are as likely rounding decides, and what follows is
    another text: so most have to be the same, not all, and far from all are without the experts."""
    model = tiny_model(torch.bfloat16, peak=32.0, expert_width=32, head_dims=(64, 128)).to(DEVICES["cuda"])
    ids, mask = (tensor.to(DEVICES["cuda"]) for tensor in prompt(2, 21, left_padding=(0, 6)))
    native, launched, served = extension(), set(), set()
    for name in LAUNCHES:
        right = getattr(native, name)
        monkeypatch.setattr(
            native,
            name,
            lambda *arguments, name=name, right=right: (launched.add(name), right(*arguments))[1],
        )
    op = hf_experts.experts
    monkeypatch.setattr(
        hf_experts,
        "experts",
        lambda *arguments, **options: (served.add(options["backend"]), op(*arguments, **options))[1],
    )

    def tokens(backend):
        with dgemma_accel.accelerated(model, backend=backend, graph=False):
            options = {"attention_mask": mask, "max_new_tokens": 2 * CANVAS, "max_denoising_steps": 2}
            return generate(model, ids, **options).sequences[:, ids.shape[1] :]

    expected, result = tokens("reference"), tokens("cuda")
    assert result.shape == expected.shape == (2, 2 * CANVAS)
    assert (result == expected).float().mean() > 0.8
    assert launched == set(LAUNCHES) and served == {"cuda"}
    monkeypatch.setattr(hf_experts, "experts", lambda rows, *arguments, **options: torch.zeros_like(rows))
    assert (tokens("cuda") == expected).float().mean() < 0.7
