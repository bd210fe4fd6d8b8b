"""Cases of `top_k_top_p`: the filters that published samplers name, on rows of which half are settled."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import dgemma_accel
from dgemma_accel.reference import top_k_top_p as reference
from dgemma_accel.reference.budget import check_top_k_top_p

from . import planted
from .cases import CANVAS, VOCAB, Case, Sizes, Variant, check_in_chunks, implementations, table_dtypes

# label -> (temperature, top_k, top_p). At a low temperature few tokens are kept, at 1 a third of the vocabulary.
FILTERS = {
    "top-p 0.95, T = 0.2": (0.2, None, 0.95),
    "top-k 50": (1.0, 50, None),
    "top-p 0.95": (1.0, None, 0.95),
}
QUICK = ("top-p 0.95, T = 0.2",)


class Inputs(NamedTuple):
    """logits [R, V]; the rest are numbers."""

    logits: Tensor
    temperature: float
    top_k: int | None
    top_p: float | None


def variant(backend: str) -> Variant:
    def prepare(inputs: Inputs):
        return lambda: dgemma_accel.top_k_top_p(
            inputs.logits,
            top_k=inputs.top_k,
            top_p=inputs.top_p,
            temperature=inputs.temperature,
            backend=backend,
        )

    return Variant(backend, prepare, capturable=backend != "reference")


def check(cutoff: Tensor, inputs: Inputs) -> list[str]:
    def rows(span: slice) -> list[str]:
        return check_top_k_top_p(
            cutoff[span],
            inputs.logits[span],
            temperature=inputs.temperature,
            top_k=inputs.top_k or 0,
            top_p=1.0 if inputs.top_p is None else inputs.top_p,
            top_k_first=False,
            softcap=None,
        )

    return check_in_chunks(rows, inputs.logits.shape[0])


def expected(inputs: Inputs) -> dict[str, Tensor]:
    """How many tokens of each row are kept; published code cuts ties as its sort gave them."""
    cutoff = reference(
        inputs.logits[None],
        torch.tensor(inputs.temperature),
        inputs.top_k or 0,
        1.0 if inputs.top_p is None else inputs.top_p,
        False,
        None,
    )[0]
    return {"kept": (inputs.logits >= cutoff[:, None]).sum(-1).float()}


def cases(device: torch.device, sizes: Sizes) -> tuple[list[Case], list[str]]:
    rows = sizes.rows or (32 if sizes.quick else CANVAS)
    vocab = sizes.vocab or VOCAB
    present, lines = implementations("top_k_top_p", device)
    found = []
    for dtype in table_dtypes(device):
        table = rows * vocab * dtype.itemsize
        for label in QUICK if sizes.quick else FILTERS:

            def make(device: torch.device, seed: int, dtype=dtype, filters=FILTERS[label]) -> Inputs:
                return Inputs(planted.logits(rows, vocab, 0.5, dtype, device, seed), *filters)

            found.append(
                Case(
                    op="top_k_top_p",
                    label=label,
                    shape=f"[{rows}, {vocab}]",
                    dtype=dtype,
                    bytes=table + rows * 4,
                    flops=0,
                    # A sort holds values and places, a sum and a mask of the table.
                    memory=table + rows * vocab * (2 * 4 + 8 + 8 + 2),
                    make=make,
                    backends=tuple(variant(name) for name in present),
                    check=check,
                    expected=expected,
                )
            )
    return found, lines
