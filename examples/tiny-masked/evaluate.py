"""Exact match and evaluations per answer of the tiny masked model, for each strategy.

    python evaluate.py --checkpoint checkpoint --prompts 200

An evaluation is one run of the model over an answer of 12 tokens; a model that wrote one token at a time
would need 12.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from data import CANVAS, EOS, MASK, PAD, pairs_of
from transformers import AutoTokenizer, ModernBertForMaskedLM

from dgemma_accel.samplers import (
    CreditThreshold,
    DInferThreshold,
    Entropy,
    EntropyBound,
    Factor,
    Hierarchy,
    HierarchyWithRemask,
    JointThresholdEdit,
    LowConfidence,
    LowConfidenceDynamic,
    Margin,
    MaskedDiffusionSampler,
    MaskgitPlus,
    MinimalTopK,
    Origin,
    Random,
    Sequential,
    SequentialWindow,
    SGLangLowConfidence,
    Threshold,
    TopkMargin,
)

# name -> (strategy, evaluations allowed; None where the strategy finds its own)
STRATEGIES = {
    "LowConfidence(), 12 steps": (LowConfidence(), 12),
    "LowConfidence(), 4 steps": (LowConfidence(), 4),
    "LowConfidence(), 2 steps": (LowConfidence(), 2),
    "Random(), 4 steps": (Random(), 4),
    "Margin(), 4 steps": (Margin(), 4),
    "Sequential(), 4 steps": (Sequential(), 4),
    "SequentialWindow(), 4 steps": (SequentialWindow(), 4),
    "Threshold(0.9)": (Threshold(0.9), None),
    "Threshold(0.5)": (Threshold(0.5), None),
    "Factor(1.0)": (Factor(1.0), None),
    "EntropyBound(0.1)": (EntropyBound(0.1), None),
    "EntropyBound(0.35, inclusive=True)": (EntropyBound(0.35, inclusive=True), None),
    "DInferThreshold(0.9)": (DInferThreshold(0.9), None),
    "MinimalTopK(2, 0.9)": (MinimalTopK(2, 0.9), None),
    "CreditThreshold(0.9)": (CreditThreshold(0.9), None),
    "Hierarchy(0.9, 0.4)": (Hierarchy(0.9, 0.4), None),
    "HierarchyWithRemask(0.9, 0.4, 0.4)": (HierarchyWithRemask(0.9, 0.4, 0.4), None),
    "LowConfidenceDynamic(0.85), 4 steps": (LowConfidenceDynamic(0.85), 4),
    "SGLangLowConfidence(0.95)": (SGLangLowConfidence(0.95), None),
    "JointThresholdEdit(0.7, 0.9)": (JointThresholdEdit(0.7, 0.9), None),
    "Origin(), 12 steps": (Origin(), 12),
    "MaskgitPlus(), 4 steps": (MaskgitPlus(), 4),
    "TopkMargin(), 4 steps": (TopkMargin(), 4),
    "Entropy(), 4 steps": (Entropy(), 4),
}


class Score(NamedTuple):
    """right of total answers, evaluations per answer, answers that a strategy could not finish."""

    right: int
    total: int
    evaluations: float
    stuck: int


def load(checkpoint: Path):
    """(model, tokenizer)"""
    return ModernBertForMaskedLM.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)


def sampler_of(strategy, steps: int | None, **options) -> MaskedDiffusionSampler:
    return MaskedDiffusionSampler(
        strategy, mask_id=MASK, block_length=CANVAS, steps=steps, eos_id=EOS, pad_id=PAD, **options
    )


def answer_of(tokenizer, tokens: list[int]) -> str:
    """What stands before the end token; special tokens are kept, since one in the middle is a mistake."""
    return tokenizer.decode(tokens[: tokens.index(EOS)] if EOS in tokens else tokens)


def score(
    model, tokenizer, pairs: list[tuple[str, str]], sampler, batch_size: int = 100, seed: int = 0
) -> Score:
    right, evaluations, stuck = 0, 0, 0
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        prompts = [tokenizer(prompt).input_ids for prompt, _ in part]
        result = sampler.generate(model, prompts, CANVAS, seed=seed)
        texts = [answer_of(tokenizer, row) for row in result.new_tokens.tolist()]
        right += sum(text == answer for text, (_, answer) in zip(texts, part))
        evaluations += int(result.nfe.sum())
        stuck += int(result.stuck.sum())
    return Score(right, len(pairs), evaluations / len(pairs), stuck)


def table(model, tokenizer, pairs: list[tuple[str, str]], **options):
    """(name, Score) of every strategy, as they are done."""
    for name, (strategy, steps) in STRATEGIES.items():
        if isinstance(strategy, JointThresholdEdit) and options.get("temperature"):
            continue  # greedy only
        yield name, score(model, tokenizer, pairs, sampler_of(strategy, steps, **options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    if args.prompts < 1:
        parser.error(f"--prompts: must be at least 1, got {args.prompts}")

    model, tokenizer = load(args.checkpoint)
    pairs = pairs_of(args.prompts, args.seed)
    print(f"{'strategy':36s}  exact match  evaluations")
    for name, result in table(model, tokenizer, pairs, temperature=args.temperature):
        stuck = f"  ({result.stuck} not finished)" if result.stuck else ""
        print(
            f"{name:36s}  {result.right:5d}/{result.total:<5d}  {result.evaluations:11.2f}{stuck}", flush=True
        )


if __name__ == "__main__":
    main()
