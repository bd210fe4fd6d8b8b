"""Specification of `row_stats`: statistics and one sample of each row of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import WORD_SAMPLE, random_words, uniform_from_word


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp32, or fp64 when the input is fp64 (a test that wants truth)."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def apply_softcap(logits: Tensor, softcap: float | None) -> Tensor:
    """c * tanh(logits / c) in the compute dtype; the identity for None."""
    x = logits.to(compute_dtype(logits))
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def leave_out(x: Tensor, logits: Tensor, cutoff: Tensor | None) -> Tensor:
    """`x` [R, V], made of `logits` of R rows, with -inf for the tokens whose logit lies below the row's cutoff [R]."""
    if cutoff is None:
        return x
    return torch.where(logits.reshape(x.shape).to(x.dtype) < cutoff[:, None], float("-inf"), x)


def row_uniform(uniform: Tensor | None, seed: Tensor | None, offset: Tensor, rows: int, device) -> Tensor:
    """The uniforms given, or those of Philox(seed, offset, row), as [rows] fp32."""
    if uniform is not None:
        return uniform.reshape(rows)
    words = random_words(seed, offset, torch.arange(rows, device=device))
    return uniform_from_word(words[WORD_SAMPLE])


def invert_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulated probability exceeds `uniform`, never one of probability 0.

    Args:
        probabilities: [R, V], rows need not be normalised.
        uniform: [R] in [0, 1).

    Returns:
        [R] int64.
    """
    cdf = probabilities.double().cumsum(-1)
    index = (cdf <= uniform.double()[:, None] * cdf[:, -1:]).sum(-1)
    positions = torch.arange(probabilities.shape[-1], device=probabilities.device)
    last = torch.where(probabilities > 0, positions, -1).amax(-1)
    return torch.minimum(index, last).clamp_min(0)


def row_stats(
    logits: Tensor,
    temperature: Tensor,
    stats_temperature: Tensor | None,
    uniform: Tensor | None,
    seed: Tensor | None,
    offset: Tensor,
    softcap: float | None,
    statistics: bool = True,
    cutoff: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Argmax, sample, entropy, logsumexp and probabilities of each row.

    With x = softcap * tanh(logits / softcap) (or x = logits), in fp32:

    - p = softmax(x / stats_temperature); entropy = -sum p ln p in nats; logsumexp is that of
      x / stats_temperature; top1_prob and top2_prob are the two largest p, counting a tie twice;
    - argmax is the lowest index that holds the maximum;
    - the sample is the first token, in vocabulary order, at which the cumulated probability of
      softmax(x / temperature) exceeds the row's uniform; at temperature 0 it is the argmax;
    - sample_prob is p[sample].

    Tokens whose logit lies below the row's cutoff have x = -inf, whatever the softcap.

    A row that has no distribution (all x -inf, or NaN or +inf anywhere) yields argmax = sample = 0,
    entropy = +inf, logsumexp = NaN and probabilities 0, so that no rule prefers it. With a softcap c infinite
    logits are c and -c, and only NaN and a cutoff leave a row without one.

    Args:
        logits: [N0, N1, V] bf16, fp16, fp32 or fp64. -inf is allowed.
        temperature: 0-d or [N0 * N1] fp32, >= 0.
        stats_temperature: 0-d or [N0 * N1] fp32, > 0, or None: the row's temperature, or 1 where that is 0.
        uniform: [N0 * N1] fp32 in [0, 1), or None.
        seed: 0-d int64, used when `uniform` is None.
        offset: 0-d int64.
        softcap: c > 0, or None.
        statistics: False leaves NaN in the fp32 results, except that entropy is +inf for a row without a distribution.
        cutoff: [N0 * N1] fp32, or None. A NaN leaves out nothing.

    Returns:
        (argmax, sample) int64 and (entropy, logsumexp, top1_prob, top2_prob, sample_prob) fp32,
        all [N0, N1].

    Source: steps 1.c.ii and 1.c.iii of transformers' generation_diffusion_gemma.py (softcap: the end of
    DiffusionGemmaForBlockDiffusion.forward); confidence as in LLaDA's generate.py.
    """
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    x = leave_out(apply_softcap(logits, softcap).reshape(-1, vocab), logits, cutoff)
    rows = x.shape[0]
    temperature = temperature.to(x.device, x.dtype).expand(rows)
    greedy = temperature == 0
    sampling_temperature = torch.where(greedy, 1.0, temperature)
    if stats_temperature is None:
        stats_temperature = sampling_temperature
    stats_temperature = stats_temperature.to(x.device, x.dtype).expand(rows)

    logsumexp = torch.logsumexp(x / stats_temperature[:, None], -1)
    valid = torch.isfinite(logsumexp)

    positions = torch.arange(vocab, device=x.device)
    x = torch.where(valid[:, None], x, 0.0)
    highest = x.amax(-1, keepdim=True)
    argmax = torch.where(x == highest, positions, vocab).amin(-1)
    # Not exp(y - logsumexp): at the lowest temperatures the last place of both exceeds their difference.
    p = torch.softmax((x - highest) / stats_temperature[:, None], -1)
    top = p.topk(min(2, vocab), dim=-1).values

    uniform = row_uniform(uniform, seed, offset, rows, x.device)
    # From the maximum down, so that no temperature is too low for fp32: the least ones draw the argmax.
    sample = invert_cdf(torch.softmax((x - highest) / sampling_temperature[:, None], -1), uniform)
    sample = torch.where(greedy, argmax, sample)

    def finish(values: Tensor, otherwise: float) -> Tensor:
        if not statistics and values.is_floating_point():
            values = torch.full_like(values, float("nan"))
            otherwise = otherwise if otherwise == float("inf") else float("nan")
        return torch.where(valid, values, otherwise).reshape(shape)

    top2 = top[:, 1] if vocab > 1 else torch.zeros_like(top[:, 0])
    return (
        finish(argmax, 0),
        finish(sample, 0),
        finish(torch.special.entr(p).sum(-1), float("inf")),
        finish(logsumexp, float("nan")),
        finish(top[:, 0], 0.0),
        finish(top2, 0.0),
        finish(p.gather(-1, sample[:, None])[:, 0], 0.0),
    )
