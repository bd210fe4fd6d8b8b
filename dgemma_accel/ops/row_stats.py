"""`row_stats`: argmax, one sample and the statistics of each row of logits, in one read of the logits."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import pick, requirements
from . import checks
from .registration import operator


class RowStats(NamedTuple):
    """Statistics of rows of logits; every field has the shape of the logits without the vocabulary.

    argmax, sample: int64. entropy (nats), logsumexp, top1_prob, top2_prob, sample_prob: fp32.
    See `row_stats` for what each one is.
    """

    argmax: Tensor
    sample: Tensor
    entropy: Tensor
    logsumexp: Tensor
    top1_prob: Tensor
    top2_prob: Tensor
    sample_prob: Tensor


@operator("row_stats")
def _row_stats(
    logits: Tensor,
    temperature: Tensor,
    stats_temperature: Tensor | None,
    uniform: Tensor | None,
    seed: Tensor | None,
    offset: Tensor,
    softcap: float | None,
    check: bool,
    backend: str,
    statistics: bool = True,
    cutoff: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.values_in("temperature", temperature, 0.0, math.inf, high_open=True, force=check)
    checks.values_in(
        "stats_temperature", stats_temperature, 0.0, math.inf, low_open=True, high_open=True, force=check
    )
    checks.values_in("uniform", uniform, 0.0, 1.0, high_open=True, force=check)
    run = pick("row_stats", backend, requirements(logits, dtype=logits.dtype, vocab=logits.shape[-1]))
    arguments = (logits, temperature, stats_temperature, uniform, seed, offset, softcap)
    options = {} if cutoff is None else {"cutoff": cutoff}
    if not statistics and _may_leave_out_statistics(run):
        options["statistics"] = False
    return run(*arguments, **options)


@functools.cache
def _may_leave_out_statistics(run) -> bool:
    return "statistics" in inspect.signature(run).parameters


@_row_stats.register_fake
def _(
    logits, temperature, stats_temperature, uniform, seed, offset, softcap, check, backend, statistics=True,
    cutoff=None,
):  # fmt: skip
    shape = logits.shape[:-1]
    integers = [logits.new_empty(shape, dtype=torch.int64) for _ in range(2)]
    floats = [logits.new_empty(shape, dtype=torch.float32) for _ in range(5)]
    return (*integers, *floats)


def rows_view(logits: Tensor) -> Tensor:
    """Logits of any rank as [N0, N1, V] with a unit last stride; copies only if the strides leave no choice."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if logits.ndim == 1:
        return logits[None, None]
    if logits.ndim == 2:
        return logits[None]
    return logits if logits.ndim == 3 else logits.flatten(0, -3)


def fields_of_shape(fields: Sequence[Tensor], shape: tuple[int, ...]) -> Sequence[Tensor]:
    """Statistics [N0, N1] in the shape of the logits without the vocabulary, which they often have already."""
    came = fields[0].shape
    if came == shape:
        return fields
    if came == (1, *shape):
        return [field.squeeze(0) for field in fields]
    return [field.reshape(shape) for field in fields]


def raise_for_rows_without_a_distribution(stats: RowStats) -> None:
    """Raise ValueError if a row was all -inf or left out, or had NaN or +inf; waits for the device."""
    broken = stats.logsumexp.isnan()
    if bool(broken.any()):
        first = tuple(broken.nonzero()[0].tolist())
        raise ValueError(
            f"logits: {int(broken.sum())} rows have no distribution (all -inf or left out, or NaN or +inf), "
            f"first at {first}"
        )


def row_stats(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    stats_temperature: float | Tensor | None = None,
    softcap: float | None = None,
    uniform: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    statistics: bool = True,
    cutoff: Tensor | None = None,
    check: bool = False,
    backend: str = "auto",
) -> RowStats:
    """Argmax, one sample, entropy, logsumexp and probabilities of each row of logits.

    With x = softcap * tanh(logits / softcap), or x = logits, in fp32:

    - the sample is drawn from softmax(x / temperature) by inverting its cumulated distribution, in
      vocabulary order, at the row's uniform; temperature 0 is greedy: the sample is the argmax;
    - entropy (nats), logsumexp, top1_prob, top2_prob and sample_prob are those of
      softmax(x / stats_temperature), which defaults to the temperature, or to 1 where that is 0;
    - argmax is the lowest index that holds the maximum; a tie at the top gives top2_prob = top1_prob.

    A row without a distribution (all -inf or below its cutoff, or NaN or +inf anywhere) yields argmax = sample = 0,
    entropy = +inf, logsumexp = NaN and probabilities 0; no rule of `commit` prefers such a row.

    A softcap c makes infinities finite: -inf becomes -c and +inf becomes c, so that only NaN and a cutoff leave a row
    without a distribution, and a token that logits of -inf were to rule out can be drawn. transformers caps its logits
    before it rules any out, in the same way; what is ruled out afterwards comes here without softcap, or by a cutoff.

    Args:
        logits: [..., V] bf16, fp16 or fp32, -inf allowed (but see softcap). Any strides; a last stride other than 1 is
            copied.
        temperature: >= 0; a number, a 0-d tensor or one value per row [...].
        stats_temperature: > 0; the same forms, or None.
        softcap: in [1e-30, 1e30], or None.
        uniform: [...] fp32 in [0, 1), one per row; drawn from Philox(seed, offset, row) when None.
        seed: int or 0-d int64 tensor; None draws one from torch's default generator, so that
            `torch.manual_seed` makes a run repeatable.
        offset: int or 0-d int64 tensor, e.g. the number of the step.
        statistics: False where argmax and sample are all that is read: the five other fields then hold NaN, or
            what they are where a backend has them anyway. Entropy is +inf for a row without a distribution, and for
            no other, in any case. On the CPU a greedy row is then one search for its maximum.
        cutoff: [...] fp32, one per row, or None. Tokens whose logit, before softcap, lies below it are left out of the
            row: they have probability 0, with a softcap too, and are never drawn, largest or second largest. Logits
            equal to it stay, and so do NaN; a NaN leaves out nothing.
        check: read values on the device too: raise for a row without a distribution (needs `statistics`) and for
            temperatures or uniforms out of range. Waits for the device.
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        `RowStats`, every field of shape [...].

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value.
        backends.BackendError: the backend named cannot run this call.

    Source: steps 1.c.ii and 1.c.iii of transformers' generation_diffusion_gemma.py.
    """
    checks.is_table_of_logits(logits)
    shape = tuple(logits.shape[:-1])
    device = logits.device
    keep = checks.may_keep_numbers(logits)
    temperature = checks.number_or_rows("temperature", temperature, shape, device, keep=keep)
    if stats_temperature is not None:
        stats_temperature = checks.number_or_rows(
            "stats_temperature", stats_temperature, shape, device, low_open=True, keep=keep
        )
    softcap = checks.softcap_value(softcap)
    checks.is_bool("statistics", statistics)
    checks.is_bool("check", check)
    checks.is_string("backend", backend)
    if check and not statistics:
        raise ValueError("check: needs statistics=True, since they say which rows have no distribution")
    uniform, seed, offset = checks.uniform_or_seed(uniform, seed, offset, shape, device, keep=keep)
    if cutoff is not None:
        cutoff = checks.floats_of_rows("cutoff", cutoff, shape, device)

    out = _row_stats(
        rows_view(logits), temperature, stats_temperature, uniform, seed, offset, softcap, check, backend,
        statistics, cutoff,
    )  # fmt: skip
    stats = RowStats(*fields_of_shape(out, shape))
    if check:
        raise_for_rows_without_a_distribution(stats)
    return stats
