"""PyTorch as the reference model's pipeline calls it: the same operators in the same order.

The arithmetic is that of transformers' diffusion_gemma (generation_diffusion_gemma.py, steps 1.c.ii to 1.c.v, and the
end of DiffusionGemmaForBlockDiffusion.forward), said in our own words and with the same operators, so that
passes over memory, temporaries and host waits are those that a user has today.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..cases import Case, Variant

NAME = "torch_chain"


def unavailable(device: torch.device) -> str | None:
    return None


def softcapped(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """The head's fp32 logits: three passes, each writing a table."""
    scores = logits.to(torch.float32)
    scores = scores / softcap
    scores = torch.tanh(scores)
    return scores * softcap


def as_in_a_process_of_its_own(call):
    """The call with the distributions' validation, part of the work, which compiling turns off for a whole process."""
    return _with_validation(call, __debug__)


def as_in_a_process_that_compiles(call):
    """The call without it: torch.compile turns it off, and with it a compiled call is compiled anew, in pieces."""
    return _with_validation(call, False)


def _with_validation(call, on: bool):
    def run(*arguments):
        torch.distributions.Distribution._validate_args = on
        return call(*arguments)

    return run


def sampler_step(logits: torch.Tensor, temperature: float, softcap: float):
    """Proposal, argmax and the two entropies of a step.

    The second distribution belongs to the stopping criterion; both validate their argument, which waits for
    the host.
    """
    scores = softcapped(logits, softcap) / temperature
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32)
    sample = torch.multinomial(probabilities, num_samples=1).squeeze(-1)
    argmax = torch.argmax(scores, dim=-1)
    entropy = torch.distributions.Categorical(logits=scores).entropy()
    stop_entropy = torch.distributions.Categorical(logits=scores).entropy()
    return argmax, sample, entropy, stop_entropy


def decision(inputs):
    """Acceptance by entropy bound, renoising and the stability test, on statistics that are already there."""
    stats, tokens = inputs.stats, inputs.tokens
    entropy = stats.entropy
    ordered, order = torch.sort(entropy, dim=-1, descending=False)
    accept_sorted = torch.cumsum(ordered, dim=-1) - ordered <= inputs.rule.bound
    accepted = torch.scatter(torch.zeros_like(accept_sorted), -1, order, accept_sorted)
    canvas = torch.where(accepted, stats.sample, tokens)
    noise = torch.randint(inputs.write.vocab_size, tokens.shape, device=tokens.device)
    canvas = torch.where(~accepted, noise, canvas)
    stable = (inputs.state.history == stats.argmax[None]).all(-1).all(0)
    history = torch.roll(inputs.state.history, shifts=-1, dims=0)
    history[-1] = stats.argmax
    finished = inputs.state.finished | (stable & (entropy.mean(-1) < inputs.stop.confidence))
    return accepted, canvas, history, finished


def threshold_decision(inputs):
    """Commit by threshold and remask, with the best position always among the committed."""
    confidence = inputs.stats.sample_prob
    accepted = confidence >= inputs.rule.tau
    best = torch.zeros_like(accepted).scatter_(1, confidence.argmax(-1, keepdim=True), True)
    accepted = accepted | best
    return accepted, torch.where(accepted, inputs.stats.sample, inputs.write.mask_id)


def _row_stats(case: Case, inputs) -> list[Variant]:
    def prepare(inputs):
        return as_in_a_process_of_its_own(
            lambda: sampler_step(inputs.logits, inputs.temperature, inputs.softcap)
        )

    def outputs(result):
        return {"argmax": result[0], "entropy": result[2]}

    return [Variant("transformers chain", prepare, outputs, capturable=False)]


def _commit(case: Case, inputs) -> list[Variant]:
    run = decision if inputs.state is not None else threshold_decision
    name = (
        "sort, cumsum, scatter, where, randint" if inputs.state is not None else "threshold, scatter, where"
    )
    return [Variant(name, lambda inputs: lambda: run(inputs), lambda result: {"committed": result[0]})]


def _head_stats(case: Case, inputs) -> list[Variant]:
    def product(inputs):
        return lambda: F.linear(inputs.hidden, inputs.weight)

    def chain(inputs):
        return as_in_a_process_of_its_own(
            lambda: sampler_step(F.linear(inputs.hidden, inputs.weight), inputs.temperature, inputs.softcap)
        )

    def product_then_row_stats(inputs):
        import dgemma_accel

        return lambda: dgemma_accel.row_stats(
            F.linear(inputs.hidden, inputs.weight),
            temperature=inputs.temperature,
            softcap=inputs.softcap,
            uniform=inputs.uniform,
        )

    return [
        Variant("linear alone", product, lambda result: {"logits": result}),
        Variant("linear, then row_stats", product_then_row_stats, lambda result: {"argmax": result.argmax}),
        Variant(
            "linear, then transformers chain", chain, lambda result: {"argmax": result[0]}, capturable=False
        ),
    ]


def _soft_embedding(case: Case, inputs) -> list[Variant]:
    def product(inputs):
        scores = softcapped(inputs.logits, inputs.softcap) / inputs.temperature
        probabilities = torch.softmax(scores, -1).to(inputs.weight.dtype)
        return lambda: probabilities @ inputs.weight

    def with_softmax(inputs):
        # The tempered logits are kept in the weight's dtype between steps.
        kept = (softcapped(inputs.logits, inputs.softcap) / inputs.temperature).to(inputs.weight.dtype)
        return lambda: kept.softmax(dim=-1, dtype=torch.float32).to(inputs.weight.dtype) @ inputs.weight

    def compare(result):
        return {"result": result}

    return [
        Variant("probabilities @ embedding alone", product, compare),
        Variant("fp32 softmax, cast, product", with_softmax, compare),
    ]


VARIANTS = {
    "row_stats": _row_stats,
    "commit": _commit,
    "head_stats": _head_stats,
    "soft_embedding": _soft_embedding,
}


def variants(case: Case, inputs) -> list[Variant]:
    build = VARIANTS.get(case.op)
    return build(case, inputs) if build else []
