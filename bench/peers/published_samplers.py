"""One step of each published sampler as its own code computes it: the same operators, in the same order and dtype.

The arithmetic is that of LLaDA's generate.py, Fast-dLLM's generate.py, dInfer's parallel_strategy.py, Dream's
generation_utils.py, SDAR's generate.py and SGLang's dllm algorithms, said in our own words; passes over memory,
temporaries, loops over rows and host waits are those that a user has today.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..cases import Case, Variant
from .traffic import passes

NAME = "published_samplers"


def unavailable(device: torch.device) -> str | None:
    return None


def noised(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Gumbel noise as LLaDA adds it: exp(l) / (-ln u)^T in fp64, an argmax of which is a draw."""
    if temperature == 0:
        return logits
    logits = logits.to(torch.float64)
    noise = torch.rand_like(logits, dtype=torch.float64)
    return logits.exp() / (-torch.log(noise)) ** temperature


def proposal(inputs, dtype: torch.dtype):
    """(x0, confidence where masked and -inf elsewhere, mask)."""
    mask = inputs.tokens == inputs.mask_id
    x0 = torch.argmax(noised(inputs.logits, inputs.temperature), dim=-1)
    p = F.softmax(inputs.logits.to(dtype), dim=-1)
    x0_p = torch.gather(p, -1, x0.unsqueeze(-1)).squeeze(-1)
    x0 = torch.where(mask, x0, inputs.tokens)
    return x0, torch.where(mask, x0_p, -torch.inf), mask


def written(inputs, x0, transfer):
    return torch.where(transfer, x0, inputs.tokens)


def top_k(inputs, x0, confidence, counts):
    transfer = torch.zeros_like(x0, dtype=torch.bool)
    for j in range(confidence.shape[0]):
        _, index = torch.topk(confidence[j], k=int(counts[j]))
        transfer[j, index] = True
    return written(inputs, x0, transfer)


def low_confidence(inputs, dtype=torch.float64):
    x0, confidence, mask = proposal(inputs, dtype)
    return top_k(inputs, x0, confidence, mask.sum(-1) // inputs.steps)


def random_remasking(inputs):
    mask = inputs.tokens == inputs.mask_id
    x0 = torch.argmax(noised(inputs.logits, inputs.temperature), dim=-1)
    confidence = torch.where(mask, torch.rand(x0.shape, device=x0.device), -torch.inf)
    return top_k(inputs, torch.where(mask, x0, inputs.tokens), confidence, mask.sum(-1) // inputs.steps)


def threshold(inputs, minimum=1, dtype=torch.float64):
    x0, confidence, mask = proposal(inputs, dtype)
    transfer = torch.zeros_like(x0, dtype=torch.bool)
    counts = mask.sum(-1)
    for j in range(confidence.shape[0]):
        _, index = torch.topk(confidence[j], k=int(counts[j]))
        transfer[j, index] = True
        for rank in range(minimum, int(counts[j])):
            if confidence[j, index[rank]] < inputs.strategy.tau:
                transfer[j, index[rank]] = False
    return written(inputs, x0, transfer)


def factor(inputs):
    x0, confidence, mask = proposal(inputs, torch.float64)
    transfer = torch.zeros_like(x0, dtype=torch.bool)
    counts = mask.sum(-1)
    for j in range(confidence.shape[0]):
        limits = [1 - inputs.strategy.f / (n + 1) for n in range(1, int(counts[j]) + 1)]
        limits[0] = -1
        ordered = torch.sort(confidence[j][mask[j]], dim=-1, descending=True)[0]
        taken = 0
        while taken < len(limits) and ordered[taken] >= limits[taken]:
            taken += 1
        _, index = torch.topk(confidence[j], k=taken)
        transfer[j, index] = True
    return written(inputs, x0, transfer)


def dinfer_threshold(inputs, logits=None):
    logits = inputs.logits if logits is None else logits
    mask = inputs.tokens == inputs.mask_id
    x0 = torch.argmax(noised(logits, inputs.temperature), dim=-1)
    p = F.softmax(logits.to(torch.float32), dim=-1)
    x0_p = torch.gather(p, -1, x0.unsqueeze(-1)).squeeze(-1)
    mask = mask & (x0 != inputs.mask_id)
    confidence = torch.where(mask, x0_p, -torch.inf)
    limit = (confidence.amax(1) - 1e-5).clamp(-1000, inputs.strategy.tau).unsqueeze(-1)
    return written(inputs, x0, confidence >= limit)


def credit(inputs, table):
    """`table` [B, C, V] fp32 is what earlier steps left; it is zero here, at the cost of any other."""
    strategy = inputs.strategy
    mask = inputs.tokens == inputs.mask_id
    table.zero_()
    table.mul_(strategy.beta)
    probs = F.softmax(inputs.logits.to(torch.float32), dim=-1)
    top, index = torch.max(probs, dim=-1)
    gain = top.pow(strategy.gamma) * mask
    table.scatter_add_(2, index.unsqueeze(-1), gain.unsqueeze(-1))
    return dinfer_threshold(inputs, inputs.logits + strategy.alpha * torch.log(table + 1))


def hierarchy(inputs):
    mask = inputs.tokens == inputs.mask_id
    x0 = torch.argmax(noised(inputs.logits, inputs.temperature), dim=-1)
    x0_p = F.log_softmax(inputs.logits, dim=-1).gather(-1, x0.unsqueeze(-1)).squeeze(-1).exp()
    least = torch.finfo(x0_p.dtype).min
    confidence = torch.where(mask, x0_p, least)
    starts = mask & ~F.pad(mask[:, :-1], (1, 0))
    run = torch.where(mask, starts.long().cumsum(-1) - 1, 0)
    best = torch.full_like(confidence, least).scatter_reduce(1, run, confidence, "amax", include_self=True)
    transfer = (confidence == best.gather(1, run)) & (confidence > inputs.strategy.low)
    transfer = transfer | (confidence > inputs.strategy.tau)
    transfer = transfer | F.one_hot(confidence.argmax(-1), mask.shape[1]).bool()
    return written(inputs, x0, transfer & mask)


def sglang(inputs):
    tokens, best = inputs.tokens.clone(), torch.argmax(inputs.logits, dim=-1)
    p = torch.gather(F.softmax(inputs.logits, dim=-1), -1, best.unsqueeze(-1)).squeeze(-1)
    for row in range(tokens.shape[0]):
        mask = tokens[row] == inputs.mask_id
        confidence = torch.where(mask, p[row], -torch.inf)
        transfer = confidence > inputs.strategy.tau
        if not transfer.any():
            transfer[torch.topk(confidence, k=1)[1]] = True
        tokens[row] = torch.where(transfer, best[row], tokens[row])
    return tokens


def filtered(logits, temperature, top_p, top_k):
    if temperature > 0:
        logits = logits / temperature
    if top_p is not None and top_p < 1:
        ordered, order = torch.sort(logits, descending=True)
        removed = torch.cumsum(F.softmax(ordered, dim=-1), dim=-1) > top_p
        removed[..., 1:] = removed[..., :-1].clone()
        removed[..., 0] = False
        mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, removed)
        logits = logits.masked_fill(mask, torch.finfo(logits.dtype).min)
    if top_k:
        least = torch.topk(logits, top_k)[0][..., -1, None]
        logits = logits.masked_fill(logits < least, torch.finfo(logits.dtype).min)
    return logits


def dream(inputs, measure):
    """sample_tokens and the choice of `_sample`; the masked rows are copied out first."""
    mask = inputs.tokens == inputs.mask_id
    logits = filtered(inputs.logits[mask], inputs.temperature, inputs.top_p, inputs.top_k)
    probs = torch.softmax(logits, dim=-1)
    if inputs.temperature > 0:
        x0 = torch.distributions.Categorical(probs=probs).sample()
        confidence = torch.gather(probs, -1, x0.unsqueeze(-1)).squeeze(-1)
    else:
        confidence, x0 = probs.max(dim=-1)
    if measure == "margin":
        ordered, _ = torch.sort(probs, dim=-1, descending=True)
        confidence = ordered[:, 0] - ordered[:, 1]
    if measure == "entropy":
        confidence = torch.sum(probs * torch.log(probs + 1e-10), dim=-1)
    times = torch.linspace(1, 1e-3, inputs.steps + 1, device=mask.device)
    count = int(mask.sum() / mask.shape[0] * (1 - times[1] / times[0]))
    whole = torch.full(inputs.tokens.shape, -torch.inf, device=mask.device, dtype=logits.dtype)
    whole[mask] = confidence
    proposed = torch.full_like(inputs.tokens, inputs.mask_id)
    proposed[mask] = x0
    transfer = torch.zeros_like(mask)
    if count > 0:
        transfer.scatter_(1, torch.topk(whole, count)[1], True)
    return written(inputs, proposed, transfer)


def sdar_dynamic(inputs):
    probs = F.softmax(filtered(inputs.logits.flatten(0, 1), inputs.temperature, None, inputs.top_k), dim=-1)
    x0 = probs.argmax(-1, keepdim=True) if inputs.temperature == 0 else torch.multinomial(probs, 1)
    x0_p = torch.gather(probs, -1, x0).view(inputs.tokens.shape)
    x0 = x0.view(inputs.tokens.shape)
    mask = inputs.tokens == inputs.mask_id
    confidence = torch.where(mask, x0_p, -torch.inf)
    transfer = torch.zeros_like(mask)
    count = inputs.tokens.shape[1] // inputs.steps
    for j in range(mask.shape[0]):
        high = confidence[j] > inputs.strategy.tau
        if high.sum() >= count:
            transfer[j] = high
        else:
            transfer[j, torch.topk(confidence[j], count)[1]] = True
    return written(inputs, x0, transfer)


STEPS = {
    "LLaDA low_confidence": lambda inputs: low_confidence(inputs, inputs.logits.dtype),
    "Fast-dLLM low_confidence": low_confidence,
    "LLaDA random": random_remasking,
    "Fast-dLLM threshold": threshold,
    "Fast-dLLM factor": factor,
    "dInfer threshold": dinfer_threshold,
    "dInfer minimal top-k": lambda inputs: threshold(inputs, inputs.strategy.m, torch.float32),
    "dInfer hierarchy": hierarchy,
    "SGLang LowConfidence": sglang,
    "SDAR low_confidence_dynamic": sdar_dynamic,
    "Dream maskgit_plus": lambda inputs: dream(inputs, "confidence"),
    "Dream topk_margin": lambda inputs: dream(inputs, "margin"),
    "Dream entropy": lambda inputs: dream(inputs, "entropy"),
}


def prepare(inputs):
    if inputs.kind == "dInfer credit":
        table = torch.zeros(inputs.logits.shape, dtype=torch.float32, device=inputs.logits.device)
        return lambda: credit(inputs, table)
    step = STEPS[inputs.kind]
    return lambda: step(inputs)


def table_passes(inputs) -> float:
    """How often the published code passes over the logits, counted on a corner of them.

    One pass is what this package reads. Where both are bound by memory, no ratio of times can exceed this number.
    """
    corner = inputs._replace(logits=inputs.logits[:, :32, :8192].clone(), tokens=inputs.tokens[:, :32])
    return passes(prepare(corner), corner.logits)


def _filters(case: Case, inputs) -> list[Variant]:
    def prepare(inputs):
        return lambda: filtered(inputs.logits, inputs.temperature, inputs.top_p, inputs.top_k)

    def outputs(logits):
        return {"kept": (logits > torch.finfo(logits.dtype).min).sum(-1).float()}

    return [
        Variant("sort, softmax, cumsum, scatter" if inputs.top_p else "topk, masked_fill", prepare, outputs)
    ]


def variants(case: Case, inputs) -> list[Variant]:
    if case.op == "top_k_top_p":
        return _filters(case, inputs)
    if case.op != "samplers":
        return []

    name = f"published code, {table_passes(inputs):.1f} passes over the table"

    def outputs(tokens):
        return {"tokens": tokens}

    # What is drawn with other noise cannot be compared.
    comparable = inputs.temperature == 0 and inputs.kind != "LLaDA random"
    return [Variant(name, prepare, outputs if comparable else None, capturable=False)]
