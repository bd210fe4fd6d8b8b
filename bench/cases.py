"""What a measured case is: inputs made from a seed, implementations that take them, and a check of their results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dgemma_accel import backends

# DiffusionGemma 26B-A4B (model_figures.json), the shapes that every op meets in it.
VOCAB = 262_144
HIDDEN = 2816
CANVAS = 256
SOFTCAP = 30.0
TEMPERATURE = 0.6

# The backends of a device. Triton's interpreter runs on a CPU too, and its time there says nothing.
ON_DEVICE = {"cpu": ("reference", "cpp"), "cuda": ("reference", "triton", "cuda")}


class BenchError(ValueError):
    """A request that the bench cannot serve; its message is one clear line."""


class Skipped(Exception):
    """A variant that does not take this case; the message says why."""


@dataclass(frozen=True)
class Sizes:
    """What the command line asks for instead of the model's own sizes; None leaves the case its own."""

    rows: int | None = None
    vocab: int | None = None
    batch: int | None = None
    context: tuple[int, ...] | None = None
    quick: bool = False


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    prepare: takes the case's inputs and returns the call to be timed; what it does itself is not timed.
    outputs: turns what the call returned into {name: tensor} for comparison with `Case.expected`; None where
        nothing can be compared (a result drawn with other noise).
    capturable: whether a CUDA graph can hold it; one that waits for the host cannot.
    """

    name: str
    prepare: Callable[[Any], Callable[[], Any]]
    outputs: Callable[[Any], dict[str, Tensor]] | None = None
    capturable: bool = True


@dataclass(frozen=True)
class Case:
    """One row of the table.

    make: (device, seed) -> inputs of the case; every call with another seed is another set of the same kind.
    backends: the implementations of this package that are worth timing.
    check: (result of a backend, inputs) -> violations of the op's error budget, one line each.
    expected: inputs -> {name: tensor} that peers are compared with, loosely.
    bytes: the least traffic with memory that the shapes allow. flops: those of its matrix products.
    memory: bytes that one set of inputs and the check of its result need at most.
    """

    op: str
    label: str
    shape: str
    dtype: torch.dtype
    bytes: int
    flops: int
    memory: int
    make: Callable[[torch.device, int], Any]
    backends: tuple[Variant, ...]
    check: Callable[[Any, Any], list[str]]
    expected: Callable[[Any], dict[str, Tensor]] | None = None
    notes: tuple[str, ...] = field(default=())
    # (result of a backend, inputs) -> numbers that its row of the result file carries under "detail".
    detail: Callable[[Any, Any], dict[str, float]] | None = None

    @property
    def title(self) -> str:
        return f"{self.op} {self.shape} {dtype_name(self.dtype)} {self.label}".rstrip()


def dtype_name(dtype: torch.dtype) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(
        str(dtype).removeprefix("torch."), str(dtype).removeprefix("torch.")
    )


def table_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes of a table of logits: what the reference model keeps, and what this package keeps on a GPU."""
    return (torch.float32,) if device.type == "cpu" else (torch.bfloat16, torch.float32)


def weight_dtype(device: torch.device, quick: bool = False) -> torch.dtype:
    """bf16 as released; fp32 for a quick run on a CPU, most of which have no fast bf16 product."""
    return torch.float32 if quick and device.type == "cpu" else torch.bfloat16


def implementations(op: str, device: torch.device) -> tuple[list[str], list[str]]:
    """(backends of an op that are present for a device, one line for each that is not)."""
    present, lines = [], []
    known = backends.MODULES.get(op, {})
    for name in known:
        if name not in ON_DEVICE[device.type]:
            continue
        implementation, reason = backends.load(op, name)
        if implementation is None:
            lines.append(f"{op}: no {name} backend here: {reason}")
        else:
            present.append(name)
    if set(known) <= {"reference"}:
        lines.append(f"{op}: no kernel exists yet, only the reference and its peers are timed")
    return present or ["reference"], lines


def check_in_chunks(check: Callable[[slice], list[str]], rows: int, chunk: int = 64) -> list[str]:
    """The violations of all rows, a few rows at a time: fp64 truth of a whole table does not fit everywhere."""
    problems = []
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        problems += [f"rows {start}..{stop - 1}: {line}" for line in check(slice(start, stop))]
    return problems


def disagreement(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Where a peer computes something else than the case asks for; loose, since its rounding is its own affair."""
    problems = []
    for name, value in actual.items():
        truth = expected[name]
        if value.numel() != truth.numel():
            problems.append(f"{name}: {value.numel()} values instead of {truth.numel()}")
            continue
        value = value.reshape(truth.shape)
        if truth.dtype.is_floating_point:
            scale = float(truth.double().norm())
            error = float((value.double() - truth.double()).norm()) / max(scale, 1e-30)
            if not error < 0.05:
                problems.append(f"{name}: relative error {error:.3g}")
        else:
            differ = float((value != truth).double().mean())
            if differ > 0.05:
                problems.append(f"{name}: {differ:.0%} of the values differ")
    return problems
