"""Exact match of ``model.generate`` on held-out prompts.

    python evaluate.py --checkpoint checkpoint --prompts 500

The reference sampler of transformers draws random canvases, so the seed matters a little.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from tasks import make_prompts, task_of
from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion


@torch.no_grad()
def answers(model, tokenizer, prompts: list[str], batch_size: int = 50, **generate_kwargs) -> list[str]:
    """The text ``model.generate`` writes after each prompt, up to the end-of-sequence token."""
    texts = []
    for start in range(0, len(prompts), batch_size):
        inputs = tokenizer(prompts[start : start + batch_size], padding=True, return_tensors="pt")
        inputs = inputs.to(model.device)
        output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, **generate_kwargs)
        for row in output.sequences[:, inputs.input_ids.shape[1] :].tolist():
            if tokenizer.eos_token_id in row:
                row = row[: row.index(tokenizer.eos_token_id)]
            # Special tokens are kept: one in the middle of an answer is a mistake and must show.
            texts.append(tokenizer.decode(row))
    return texts


def exact_match(model, tokenizer, pairs: list[tuple[str, str]], **kwargs) -> dict[str, list[bool]]:
    """For each task, whether each answer was right."""
    matches = defaultdict(list)
    given = answers(model, tokenizer, [prompt for prompt, _ in pairs], **kwargs)
    for (prompt, expected), text in zip(pairs, given, strict=True):
        matches[task_of(prompt)].append(text == expected)
    return dict(matches)


def report(matches: dict[str, list[bool]], joiner: str = "\n") -> str:
    everything = [match for task in matches.values() for match in task]
    return joiner.join(
        f"{task:8s} {sum(results)}/{len(results)}"
        for task, results in [*matches.items(), ("all", everything)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("test", "train"), default="test")
    parser.add_argument("--show-errors", action="store_true")
    args = parser.parse_args()
    if args.prompts < 1:
        parser.error(f"--prompts: must be at least 1, got {args.prompts}")

    torch.manual_seed(args.seed)
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(args.checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    pairs = make_prompts(args.prompts, args.seed, split=args.split)
    if args.show_errors:
        given = answers(model, tokenizer, [prompt for prompt, _ in pairs], args.batch_size)
        for (prompt, expected), text in zip(pairs, given, strict=True):
            if text != expected:
                print(f"{prompt!r}: expected {expected!r}, got {text!r}")
    else:
        print(report(exact_match(model, tokenizer, pairs, batch_size=args.batch_size)))


if __name__ == "__main__":
    main()
