"""Logits and hidden states with a planted confidence: a canvas as it looks early, half way and at its end."""

from __future__ import annotations

import torch
from torch import Tensor

# Which fraction of the rows is settled: one token holds nearly all of the probability.
MIXES = {"fresh noise": 0.0, "half settled": 0.5, "settled": 1.0}
# A logit far in the softcap's saturation, as a trained head gives a token it is sure of.
SETTLED_LOGIT = 60.0


def generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def settled_rows(rows: int, fraction: float, device: torch.device) -> Tensor:
    """[rows] bool, the settled ones spread evenly."""
    position = torch.arange(rows, device=device)
    return ((position + 1) * fraction).floor() > (position * fraction).floor()


def logits(
    rows: int, vocab: int, fraction: float, dtype: torch.dtype, device: torch.device, seed: int
) -> Tensor:
    """[rows, vocab] before softcap and temperature."""
    noise = generator(device, seed)
    table = torch.empty(rows, vocab, dtype=dtype, device=device).normal_(0.0, 2.0, generator=noise)
    token = torch.randint(vocab, (rows,), generator=noise, device=device)
    chosen = settled_rows(rows, fraction, device).nonzero()[:, 0]
    table[chosen, token[chosen]] = SETTLED_LOGIT
    return table


def head(vocab: int, hidden: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """[vocab, hidden], rows of unit expected length."""
    weight = torch.empty(vocab, hidden, dtype=dtype, device=device)
    return weight.normal_(0.0, hidden**-0.5, generator=generator(device, seed))


def hidden_states(weight: Tensor, rows: int, fraction: float, seed: int) -> Tensor:
    """[rows, hidden] whose product with `weight` has the planted confidence: logits of deviation 2."""
    vocab, hidden = weight.shape
    noise = generator(weight.device, seed)
    states = torch.empty(rows, hidden, dtype=torch.float32, device=weight.device)
    states.normal_(0.0, 2.0, generator=noise)
    token = torch.randint(vocab, (rows,), generator=noise, device=weight.device)
    settled = settled_rows(rows, fraction, weight.device)
    aligned = weight[token].float()
    aligned = aligned * (SETTLED_LOGIT / aligned.square().sum(-1, keepdim=True))
    # What is left of the noise keeps the other logits of a settled row alive.
    return torch.where(settled[:, None], aligned + states, states).to(weight.dtype)
