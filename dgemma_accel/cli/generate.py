"""`generate`: one or more prompts through a DiffusionGemma checkpoint, reference and accelerated side by side."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from ..backends import BackendError

SIDES = ("reference", "accelerated")


@dataclass
class Answer:
    """What one side made of one prompt."""

    text: str
    steps: int
    tokens_per_step: float
    seconds: float
    drafts: list[str] = field(default_factory=list)


class DraftRecorder:
    """A streamer that keeps the drafts of every denoising step."""

    def __init__(self) -> None:
        self.drafts: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        """Prompt and finished canvases: not needed, the result holds them."""

    def put_draft(self, value: torch.Tensor) -> None:
        self.drafts.append(value[0].clone())

    def end(self) -> None:
        """Nothing to flush."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "generate", help="generate with the reference and with the accelerated model"
    )
    parser.add_argument("--model", required=True, help="folder (or hub name) of a DiffusionGemma checkpoint")
    parser.add_argument(
        "--prompt", required=True, action="append", help="the prompt; may be given several times"
    )
    parser.add_argument("--max-new-tokens", type=int, help="default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto", help="auto, reference, cpp, triton or cuda")
    parser.add_argument("--only", choices=SIDES, help="run one side")
    parser.add_argument(
        "--experts", choices=("fp8", "nvfp4"), help="round the experts' weights to this format, on both sides"
    )
    parser.add_argument(
        "--linears",
        choices=("fp8",),
        help="round attention projections and dense MLPs to this format, on both sides",
    )
    parser.add_argument("--no-drafts", action="store_true", help="do not show the canvas settling")
    parser.set_defaults(run=run)


def run(options) -> int:
    if hasattr(sys.stdout, "reconfigure"):
        # Where the terminal's encoding lacks a character, better an escape than no answer.
        sys.stdout.reconfigure(errors="backslashreplace")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        print(f"--max-new-tokens: must be at least 1, got {options.max_new_tokens}")
        return 2
    if not -(2**63) <= options.seed < 2**64:
        print(f"--seed: must have at most 64 bits, got {options.seed}")
        return 2
    sides = (options.only,) if options.only else SIDES
    if "accelerated" in sides:
        from ..hf.accelerate import check_backend

        # Before a model is read, and the reference has answered.
        try:
            check_backend(options.backend)
        except (BackendError, ValueError) as error:
            print(f"generate: {error}")
            return 2
    try:
        model, tokenizer = load(options.model, experts=options.experts, linears=options.linears)
    except (OSError, ImportError, TypeError, ValueError, RuntimeError) as error:
        print(f"--model {options.model}: {error}")
        return 2
    try:
        answers = compare(
            model, tokenizer, options.prompt, sides=sides, backend=options.backend, seed=options.seed,
            max_new_tokens=options.max_new_tokens,
        )  # fmt: skip
    except UnicodeError:
        # A ValueError, but of no argument: of what PyTorch's compiler read, for one.
        raise
    except (BackendError, ValueError) as error:
        print(f"generate: {error}")
        return 2
    if not options.no_drafts:
        show_drafts(options.prompt[0], answers[sides[-1]][0])
    show_table(options.prompt, answers)
    return 0


def load(path: str | Path, *, experts: str | None = None, linears: str | None = None):
    """(model, tokenizer) of a checkpoint, on the GPU when there is one.

    With a format for the experts, of `quantize_experts`, or for the other products of layers, of `quantize_linears`,
    they are rounded as they are read, each layer on that device where `accelerate` is installed, which transformers
    needs for that.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            f"transformers >= 5.17 is needed: pip install 'dgemma-accel[hf]' ({error})"
        ) from error
    if find_spec("rich") is None:
        # Better before the answers are generated than after.
        raise ImportError("rich is needed for the table of answers: pip install 'dgemma-accel[hf]'")
    from ..hf import from_pretrained

    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = {"device_map": device} if find_spec("accelerate") else {}
    model = from_pretrained(path, experts=experts, linears=linears, dtype="auto", **where)
    return model.to(device), AutoTokenizer.from_pretrained(path)


def encode(tokenizer, prompt: str, device) -> torch.Tensor:
    """[1, L] int64, through the chat template where the tokenizer has one."""
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return ids["input_ids"].to(device)
    return tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)


def compare(
    model, tokenizer, prompts: Sequence[str], *, sides: Sequence[str] = SIDES, backend: str = "auto", seed: int = 0,
    max_new_tokens: int | None = None,
) -> dict[str, list[Answer]]:  # fmt: skip
    """Generate each prompt by itself with each side; the model comes back as it was."""
    from ..hf import accelerated

    def one_by_one() -> list[Answer]:
        # A side's first call pays for imports, and on a GPU for compiling: no second of it belongs to an answer.
        _generate(model, tokenizer, prompts[0], seed, max_new_tokens)
        return [_generate(model, tokenizer, prompt, seed, max_new_tokens) for prompt in prompts]

    answers = {}
    for side in sides:
        if side == "accelerated":
            with accelerated(model, backend=backend):
                answers[side] = one_by_one()
        else:
            answers[side] = one_by_one()
    return answers


def _generate(model, tokenizer, prompt: str, seed: int, max_new_tokens: int | None) -> Answer:
    ids = encode(tokenizer, prompt, model.device)
    recorder = DraftRecorder()
    limits = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    torch.manual_seed(seed)
    begin = time.perf_counter()
    output = model.generate(ids, streamer=recorder, **limits)
    tokens = output.sequences[0, ids.shape[1] :].tolist()
    seconds = time.perf_counter() - begin
    return Answer(
        text=decode(tokenizer, tokens),
        steps=len(recorder.drafts),
        tokens_per_step=float(output.tokens_per_forward[0]),
        seconds=seconds,
        drafts=[decode(tokenizer, draft.tolist(), skip_special_tokens=False) for draft in recorder.drafts],
    )


def decode(tokenizer, tokens: list[int], skip_special_tokens: bool = True) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens).strip()


def show_drafts(prompt: str, answer: Answer) -> None:
    """Every draft of the canvas on a line of its own."""
    print(f"\nThe canvas settling on: {prompt!r}")
    width = len(str(len(answer.drafts)))
    for step, draft in enumerate(answer.drafts, start=1):
        print(f"  step {step:>{width}}  {draft!r}")
    print()


def show_table(
    prompts: Sequence[str], answers: dict[str, list[Answer]], expected: Sequence[str] | None = None
) -> None:
    """Answers of each side, and a row of totals: exact match, steps, tokens per step, seconds."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_footer=True)
    table.add_column("prompt", "total")
    if expected is not None:
        table.add_column("expected")
    for side, rows in answers.items():
        match = ""
        if expected is not None:
            right = sum(row.text == want for row, want in zip(rows, expected))
            match = f"exact match {right}/{len(rows)}"
        tokens = sum(row.tokens_per_step * row.steps for row in rows)
        steps = sum(row.steps for row in rows)
        table.add_column(side, match)
        table.add_column("steps", str(steps), justify="right")
        table.add_column("tokens/step", f"{tokens / max(steps, 1):.2f}", justify="right")
        table.add_column("seconds", f"{sum(row.seconds for row in rows):.2f}", justify="right")
    for index, prompt in enumerate(prompts):
        # What is in brackets in a string would be rich's markup.
        cells = [Text(prompt)] + ([Text(expected[index])] if expected is not None else [])
        for rows in answers.values():
            row = rows[index]
            cells += [Text(row.text), str(row.steps), f"{row.tokens_per_step:.2f}", f"{row.seconds:.2f}"]
        table.add_row(*cells)
    Console(width=None if Console().is_terminal else 150).print(table)
