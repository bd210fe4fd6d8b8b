"""Prompts, answers and tokens of the tiny masked model: the tasks of ../tiny-dgemma that fit 12 tokens.

The answer is followed by end tokens up to the canvas, as LLaDA is trained: the model says itself where it ends.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# The two examples share their tasks and characters.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tiny-dgemma"))

from tasks import TASKS, make_prompts, split_of, task_of
from tokenizer import BOS, EOS, PAD, VOCAB_SIZE, build_tokenizer

CANVAS = 12
LONGEST_PROMPT = 18
TASK_NAMES = ("count", "reverse", "sort", "copy")
MASK = VOCAB_SIZE
MASK_TOKEN = "<mask>"

__all__ = [
    "BOS",
    "CANVAS",
    "EOS",
    "MASK",
    "PAD",
    "masked_tokenizer",
    "pairs_of",
    "task_of",
    "training_batches",
]


def masked_tokenizer():
    """The characters of ../tiny-dgemma and, as token 103, the mask."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    assert tokenizer.mask_token_id == MASK
    return tokenizer


def fits(prompt: str, answer: str) -> bool:
    return len(answer) < CANVAS and len(prompt) <= LONGEST_PROMPT


def pairs_of(n: int, seed: int, split: str = "test") -> list[tuple[str, str]]:
    """``n`` pairs of prompt and answer that fit, held out from training unless ``split`` says otherwise."""
    # A long answer does not fit, so ask for more than is wanted.
    pairs = [pair for pair in make_prompts(6 * n, seed, split=split, tasks=TASK_NAMES) if fits(*pair)]
    return pairs[:n]


def training_batches(tokenizer, batch_size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches without end: (tokens [B, L + CANVAS], padded on the left, and False where padded)."""
    rng = random.Random(seed)
    tasks = [TASKS[name] for name in TASK_NAMES]
    while True:
        rows = []
        while len(rows) < batch_size:
            prompt, answer = rng.choice(tasks)(rng)
            if split_of(prompt) != "train" or not fits(prompt, answer):
                continue
            target = tokenizer(answer, add_special_tokens=False).input_ids
            rows.append(tokenizer(prompt).input_ids + target + [EOS] * (CANVAS - len(target)))
        length = max(map(len, rows))
        tokens = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
        yield tokens, tokens != PAD
