"""Cases of the samplers: one step of each strategy, at DiffusionGemma's canvas and at LLaDA's block and vocabulary."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from dgemma_accel.samplers import (
    CreditThreshold,
    DInferThreshold,
    Entropy,
    Factor,
    Hierarchy,
    LowConfidence,
    LowConfidenceDynamic,
    MaskedDiffusionSampler,
    MaskgitPlus,
    MinimalTopK,
    Random,
    SGLangLowConfidence,
    Threshold,
    TopkMargin,
    recorded,
)

from . import planted
from .cases import CANVAS, VOCAB, BenchError, Case, Sizes, Variant, implementations, table_dtypes

LLADA_BLOCK, LLADA_VOCAB, LLADA_MASK = 32, 126_464, 126_336
STEPS = 8
# Rows that a check by the reference reads; its fp64 table of all rows would take gigabytes.
CHECKED_ROWS = 16

# kind -> (strategy, temperature, top_k, top_p, confidence). Greedy as published by default; LLaDA, Dream and SDAR
# are sampled as well.
KINDS = {
    "LLaDA low_confidence": (LowConfidence(), 0.0, None, None, "untempered"),
    "Fast-dLLM low_confidence": (LowConfidence(), 0.0, None, None, "untempered"),
    "Fast-dLLM low_confidence, T = 1": (LowConfidence(), 1.0, None, None, "untempered"),
    "LLaDA random": (Random(), 0.0, None, None, "untempered"),
    "Fast-dLLM threshold": (Threshold(0.9), 0.0, None, None, "untempered"),
    "Fast-dLLM factor": (Factor(1.0), 0.0, None, None, "untempered"),
    "dInfer threshold": (DInferThreshold(0.9), 0.0, None, None, "untempered"),
    "dInfer minimal top-k": (MinimalTopK(4, 0.9), 0.0, None, None, "untempered"),
    "dInfer credit": (CreditThreshold(0.9), 0.0, None, None, "untempered"),
    "dInfer hierarchy": (Hierarchy(0.9, 0.4), 0.0, None, None, "untempered"),
    "SGLang LowConfidence": (SGLangLowConfidence(0.95), 0.0, None, None, "untempered"),
    "SDAR low_confidence_dynamic": (LowConfidenceDynamic(0.85), 0.0, None, None, "proposal"),
    "SDAR low_confidence_dynamic, T = 1, top-k 50": (LowConfidenceDynamic(0.85), 1.0, 50, None, "proposal"),
    "Dream maskgit_plus": (MaskgitPlus(), 0.0, None, None, "proposal"),
    "Dream topk_margin": (TopkMargin(), 0.0, None, None, "proposal"),
    "Dream entropy": (Entropy(), 0.0, None, None, "proposal"),
    "Dream entropy, T = 0.2, top-p 0.95": (Entropy(), 0.2, None, 0.95, "proposal"),
}
QUICK = ("Fast-dLLM low_confidence", "Fast-dLLM threshold", "dInfer threshold", "Dream entropy")


class Inputs(NamedTuple):
    """logits [1, C, V] and tokens [1, C], all masked but one in eight; kind names the published code."""

    kind: str
    logits: Tensor
    tokens: Tensor
    mask_id: int
    strategy: object
    steps: int
    temperature: float
    top_k: int | None
    top_p: float | None
    confidence: str


def make_inputs(
    kind: str, rows: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Inputs:
    strategy, temperature, top_k, top_p, confidence = KINDS[kind]
    logits = planted.logits(rows, vocab, 0.5, dtype, device, seed)
    mask_id = LLADA_MASK if vocab == LLADA_VOCAB else vocab - 1
    logits[:, mask_id] = -30.0
    # A settled row at every confidence, not only at certainty: the published rules differ in between.
    noise = planted.generator(device, seed + 1)
    settled = torch.rand(rows, generator=noise, device=device) * 8 + 10
    logits = torch.where(logits > 20, settled[:, None].to(dtype), logits)
    tokens = torch.full((1, rows), mask_id, device=device)
    tokens[:, ::8] = 1
    return Inputs(
        kind.split(",")[0],
        logits[None],
        tokens,
        mask_id,
        strategy,
        STEPS,
        temperature,
        top_k,
        top_p,
        confidence,
    )


def sampler(inputs: Inputs, backend: str, graph: bool = True) -> MaskedDiffusionSampler:
    return MaskedDiffusionSampler(
        inputs.strategy,
        mask_id=inputs.mask_id,
        block_length=inputs.tokens.shape[1],
        steps=inputs.steps,
        temperature=inputs.temperature,
        top_k=inputs.top_k,
        top_p=inputs.top_p,
        top_k_first=inputs.kind.startswith("SDAR"),
        schedule="block" if inputs.kind.startswith("SDAR") else "masked",
        confidence=inputs.confidence,
        backend=backend,
        graph=graph,
    )


def variant(backend: str, graph: bool = True) -> Variant:
    """A step as `MaskedDiffusionSampler` takes it; without `graph` also on a GPU launch by launch."""

    def prepare(inputs: Inputs):
        ours = sampler(inputs, backend, graph)
        first = ours.start(inputs.tokens, seed=7)

        def call():
            # A step moves its state, and every call is to be the same step. What a block starts with is done once a
            # block, in published code as here, and is not timed.
            state = copy.copy(first)
            state.memory = dict(first.memory)
            return ours.step(inputs.logits, inputs.tokens, state)

        if inputs.logits.is_cuda and graph:
            # From then on it is replayed, where it can be.
            for _ in range(recorded.PATIENCE + 1):
                call()
        return call

    return Variant(backend if graph else f"{backend}, launched", prepare, capturable=False)


def variants(present: list[str], table: int, device: torch.device) -> tuple[Variant, ...]:
    names = [name for name in present if name != "reference" or len(present) == 1]
    # What a recording is worth, where there can be one.
    both = device.type == "cuda" and table <= recorded.LARGEST
    return tuple(variant(name, graph) for name in names for graph in ((True, False) if both else (True,)))


def check(tokens: Tensor, inputs: Inputs) -> list[str]:
    """The tokens of the first rows, decided alone, equal the reference's; all tokens are proposals or unchanged."""
    rows = slice(0, min(CHECKED_ROWS, inputs.tokens.shape[1]))
    few = inputs._replace(logits=inputs.logits[:, rows], tokens=inputs.tokens[:, rows])
    truth = variant("reference", graph=False).prepare(few)()
    chosen = [name for name in implementations("row_stats", inputs.logits.device)[0] if name != "reference"]
    problems = []
    for name in chosen:
        ours = variant(name).prepare(few)()
        if not torch.equal(ours, truth):
            problems.append(
                f"{name}: {int((ours != truth).sum())} of {truth.numel()} tokens differ from the reference"
            )
    kept = tokens == inputs.tokens
    given = inputs.tokens != inputs.mask_id
    if not bool(kept[given].all()):
        problems.append("given tokens changed")
    # Of a few rows a strategy may rightly commit none, as the reference above does then.
    if len(kept[0]) > CHECKED_ROWS and not bool((~kept).any()):
        problems.append("nothing was committed")
    if inputs.temperature == 0:
        wrong = ~kept & (tokens != inputs.logits.argmax(-1))
        if bool(wrong.any()):
            problems.append(f"{int(wrong.sum())} committed tokens are not the argmax")
    return problems


def expected(inputs: Inputs) -> dict[str, Tensor]:
    """The tokens that published code is compared with, where it draws nothing."""
    present = implementations("row_stats", inputs.logits.device)[0]
    return {"tokens": variant(present[-1]).prepare(inputs)()}


def cases(device: torch.device, sizes: Sizes) -> tuple[list[Case], list[str]]:
    if sizes.vocab == 1:
        raise BenchError("--vocab: must be at least 2 here, got 1: one token is the mask")
    present, lines = implementations("row_stats", device)
    shapes = [(CANVAS, VOCAB), (LLADA_BLOCK, LLADA_VOCAB)]
    if sizes.rows or sizes.vocab:
        shapes = [(sizes.rows or CANVAS, sizes.vocab or VOCAB)]
    elif sizes.quick:
        shapes = [(LLADA_BLOCK, LLADA_VOCAB)]
    found = []
    for rows, vocab in shapes:
        # A step over LLaDA's block is short enough for a CPU to take it in the dtype of published weights too.
        both = device.type == "cpu" and vocab == LLADA_VOCAB
        for dtype in (torch.float32, torch.bfloat16) if both else table_dtypes(device):
            table = rows * vocab * dtype.itemsize
            for kind in QUICK if sizes.quick else KINDS:
                found.append(
                    Case(
                        op="samplers",
                        label=kind,
                        shape=f"[{rows}, {vocab}]",
                        dtype=dtype,
                        bytes=table + rows * 16,
                        flops=0,
                        # Published code holds several fp64 tables at once.
                        memory=table + 5 * rows * vocab * 8,
                        make=lambda device, seed, kind=kind, rows=rows, vocab=vocab, dtype=dtype: make_inputs(
                            kind, rows, vocab, dtype, device, seed
                        ),
                        backends=variants(present, table, device),
                        check=check,
                        expected=expected,
                    )
                )
    return found, lines
