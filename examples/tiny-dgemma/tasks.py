"""Prompts with exactly one correct answer, for training and checking the tiny DiffusionGemma.

Five tasks, all over printable characters:

    count 8 to 12          ->  8 9 10 11 12
    reverse kmwa           ->  awmk
    sort 4271              ->  1247
    add 38 7               ->  45
    copy qzvxkj            ->  qzvxkj

A long ``count`` does not fit one canvas of 32 tokens, and a long ``copy`` makes a prompt longer than
the sliding window, so both the block-autoregressive loop and the windowed cache are exercised.

Every prompt belongs to one split, decided by a checksum of its text alone. A test prompt is therefore
never seen in training, whatever seeds are used.
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable

TEST_SHARE = 8  # one prompt in eight is held out


def count(rng: random.Random) -> tuple[str, str]:
    length = rng.randint(2, 16)
    first = rng.randint(0, 100 - length)
    numbers = range(first, first + length)
    return f"count {numbers[0]} to {numbers[-1]}", " ".join(map(str, numbers))


def reverse(rng: random.Random) -> tuple[str, str]:
    text = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 10)))
    return f"reverse {text}", text[::-1]


def sort(rng: random.Random) -> tuple[str, str]:
    digits = "".join(rng.choices(string.digits, k=rng.randint(3, 8)))
    return f"sort {digits}", "".join(sorted(digits))


def add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 99), rng.randint(0, 9)
    return f"add {a} {b}", str(a + b)


def copy(rng: random.Random) -> tuple[str, str]:
    text = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(4, 20)))
    return f"copy {text}", text


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    task.__name__: task for task in (count, reverse, sort, add, copy)
}


def split_of(prompt: str) -> str:
    """``"test"`` for one prompt in eight, ``"train"`` for the others."""
    return "test" if zlib.crc32(prompt.encode()) % TEST_SHARE == 0 else "train"


def make_prompts(
    n: int, seed: int, *, split: str = "test", tasks: tuple[str, ...] = tuple(TASKS)
) -> list[tuple[str, str]]:
    """``n`` pairs of prompt text and answer text, the tasks taking turns.

    Pairs are drawn independently, so a small task such as ``add`` may repeat one.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    rng = random.Random(f"{split}-{seed}")
    pairs = []
    while len(pairs) < n:
        task = TASKS[tasks[len(pairs) % len(tasks)]]
        prompt, answer = task(rng)
        if split_of(prompt) == split:
            pairs.append((prompt, answer))
    return pairs


def task_of(prompt: str) -> str:
    """The name of the task a prompt asks for."""
    return prompt.split(" ", 1)[0]
