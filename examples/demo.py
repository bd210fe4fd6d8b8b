"""The demo: a tiny trained DiffusionGemma answers a handful of prompts, with the reference and accelerated.

python examples/demo.py [--prompts 8] [--backend auto]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dgemma_accel.backends import BACKENDS
from dgemma_accel.cli.generate import compare, load, show_drafts, show_table

FOLDER = Path(__file__).resolve().parent / "tiny-dgemma"
sys.path.insert(0, str(FOLDER))


def show_slowest_canvas(model, tokenizer, pairs, backend: str) -> None:
    """The drafts of one answer that came right after several: most prompts settle in two steps."""
    prompts, expected = zip(*pairs)
    answers = compare(model, tokenizer, prompts, sides=("accelerated",), backend=backend)["accelerated"]
    right = [index for index, answer in enumerate(answers) if answer.text == expected[index]]
    slowest = max(right or range(len(prompts)), key=lambda index: len(set(answers[index].drafts)))
    show_drafts(prompts[slowest], answers[slowest])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    if options.prompts < 1:
        parser.error(f"--prompts: must be at least 1, got {options.prompts}")
    if options.backend not in ("auto", *BACKENDS):
        parser.error(f"--backend: must be auto or one of {', '.join(BACKENDS)}, got {options.backend}")

    from tasks import make_prompts

    print(f"== loading {FOLDER.name}/checkpoint", flush=True)
    model, tokenizer = load(FOLDER / "checkpoint")
    print(
        f"   {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {model.device}",
        flush=True,
    )
    prompts, expected = zip(*make_prompts(options.prompts, seed=0))
    print(f"== {len(prompts)} prompts, one at a time, with the reference and accelerated", flush=True)
    answers = compare(model, tokenizer, prompts, backend=options.backend)
    show_slowest_canvas(model, tokenizer, make_prompts(40, seed=2), options.backend)
    show_table(prompts, answers, expected)


if __name__ == "__main__":
    main()
