"""Cases of `commit`: DiffusionGemma's sampler step and a masked model's, for 1 to 16 canvases."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import dgemma_accel
from dgemma_accel.samplers import CanvasState, EntropyBound, Remask, Renoise, StableAndConfident, Threshold

from . import planted
from .cases import CANVAS, VOCAB, Case, Sizes, Variant, implementations

ENTROPY_BOUND = 0.1


class Inputs(NamedTuple):
    """tokens [B, C]; stats with fields [B, C]; the rule, the write and the state of the canvases."""

    tokens: Tensor
    stats: dgemma_accel.RowStats
    rule: object
    write: object
    state: CanvasState | None
    stop: StableAndConfident | None


def make_stats(batch: int, length: int, vocab: int, device: torch.device, seed: int) -> dgemma_accel.RowStats:
    """Statistics as a half settled canvas has them: consistent with each other, no table of logits behind them."""
    noise = planted.generator(device, seed)
    shape = (batch, length)
    top1 = torch.rand(shape, generator=noise, device=device)
    settled = torch.rand(shape, generator=noise, device=device) < 0.5
    top1 = torch.where(settled, 1 - 1e-4 * top1, top1 * 0.5)
    argmax = torch.randint(vocab, shape, generator=noise, device=device)
    other = torch.randint(vocab, shape, generator=noise, device=device)
    took_top = torch.rand(shape, generator=noise, device=device) < top1
    rest = 1 - top1
    # Half of what the best token leaves goes to the second, the rest to the other tokens alike.
    entropy = torch.special.entr(top1) + torch.special.entr(rest) + rest * 8.0
    top2 = rest * 0.5
    return dgemma_accel.RowStats(
        argmax=argmax,
        sample=torch.where(took_top, argmax, other),
        entropy=entropy,
        logsumexp=torch.randn(shape, generator=noise, device=device),
        top1_prob=top1,
        top2_prob=top2,
        sample_prob=torch.where(took_top, top1, top2),
    )


def make_inputs(kind: str, batch: int, device: torch.device, seed: int) -> Inputs:
    stats = make_stats(batch, CANVAS, VOCAB, device, seed)
    noise = planted.generator(device, seed + 1)
    tokens = torch.randint(VOCAB, (batch, CANVAS), generator=noise, device=device)
    if kind == "threshold, remask":
        return Inputs(tokens, stats, Threshold(0.9), Remask(0), None, None)
    stop = StableAndConfident()
    return Inputs(
        tokens, stats, EntropyBound(ENTROPY_BOUND), Renoise(VOCAB), CanvasState.start(tokens, stop), stop
    )


def variant(backend: str) -> Variant:
    def prepare(inputs: Inputs):
        device = inputs.tokens.device
        # Tensors on the device, as a captured loop passes them.
        seed = torch.tensor(7, device=device)
        offset = torch.tensor(3, device=device)

        return lambda: dgemma_accel.commit(
            inputs.tokens,
            inputs.stats,
            inputs.rule,
            inputs.write,
            seed=seed,
            offset=offset,
            state=inputs.state,
            stop=inputs.stop,
            backend=backend,
        )

    return Variant(backend, prepare, capturable=backend != "reference")


def _fields(result) -> dict[str, Tensor]:
    fields = {"tokens": result.tokens, "committed": result.committed, "num_committed": result.num_committed}
    if result.state is not None:
        fields |= {name: getattr(result.state, name) for name in ("draft", "history", "finished")}
    return fields


def check(result, inputs: Inputs) -> list[str]:
    """Every output equals the reference's."""
    truth = _fields(variant("reference").prepare(inputs)())
    problems = []
    for name, value in _fields(result).items():
        if value.shape != truth[name].shape or value.dtype != truth[name].dtype:
            problems.append(
                f"{name}: {tuple(value.shape)} {value.dtype} instead of {tuple(truth[name].shape)}"
            )
        elif not torch.equal(value, truth[name]):
            problems.append(f"{name}: {int((value != truth[name]).sum())} of {value.numel()} values differ")
    return problems


def expected(inputs: Inputs) -> dict[str, Tensor]:
    """The positions that are committed; what the others receive is drawn with other noise by peers."""
    return {"committed": variant("reference").prepare(inputs)().committed}


def traffic(batch: int, with_state: bool) -> int:
    """Bytes: token, argmax, sample and four fp32 statistics in; tokens and flags out; draft and history both ways."""
    position = 3 * 8 + 4 * 4 + 8 + 1
    if with_state:
        position += 2 * 8 + 2 * 8
    return batch * (CANVAS * position + 16)


def cases(device: torch.device, sizes: Sizes) -> tuple[list[Case], list[str]]:
    present, lines = implementations("commit", device)
    batches = [sizes.batch] if sizes.batch else ([1, 16] if sizes.quick else [1, 4, 16])
    found = []
    for kind in ("entropy bound, renoise", "threshold, remask"):
        for batch in batches:
            found.append(
                Case(
                    op="commit",
                    label=kind,
                    shape=f"[{batch}, {CANVAS}]",
                    dtype=torch.int64,
                    bytes=traffic(batch, kind.startswith("entropy")),
                    flops=0,
                    memory=batch * CANVAS * 1024,
                    make=lambda device, seed, kind=kind, batch=batch: make_inputs(kind, batch, device, seed),
                    backends=tuple(variant(name) for name in present),
                    check=check,
                    expected=expected,
                )
            )
    return found, lines
