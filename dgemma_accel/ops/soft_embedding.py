"""`soft_embedding`: the expected embedding under the distribution of each row of logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import pick, requirements
from . import checks
from .head_stats import check_weight
from .registration import operator
from .row_stats import RowStats, rows_view


@operator("soft_embedding")
def _soft_embedding(
    logits: Tensor,
    argmax: Tensor,
    top1_prob: Tensor,
    weight: Tensor,
    temperature: Tensor,
    softcap: float | None,
    tolerance: float,
    exact: bool,
    check: bool,
    backend: str,
) -> Tensor:
    checks.values_in("temperature", temperature, 0.0, math.inf, low_open=True, high_open=True, force=check)
    run = pick("soft_embedding", backend, requirements(logits, dtype=weight.dtype))
    return run(logits, argmax, top1_prob, weight, temperature, softcap, tolerance, exact)


@_soft_embedding.register_fake
def _(logits, argmax, top1_prob, weight, temperature, softcap, tolerance, exact, check, backend):
    return weight.new_empty(*logits.shape[:-1], weight.shape[1])


def soft_embedding(
    logits: Tensor,
    stats: RowStats,
    weight: Tensor,
    *,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    tolerance: float = 0.0,
    exact: bool = False,
    check: bool = False,
    backend: str = "auto",
) -> Tensor:
    """softmax(softcap(logits) / temperature) @ weight, in one more read of the logits.

    A tile of rows x vocabulary in which no row holds more probability than `tolerance` is not computed. The default
    0.0 leaves out only what would add exactly nothing. For a tolerance t, a row loses at most t per tile left out,
    so each element of the result is off by at most t * (tiles left out) * max |weight|. Backends "reference" and
    "cuda" compute every tile.

    Args:
        logits: [..., V] in the dtype of `weight`, as `head_stats` returns them.
        stats: `RowStats` of these logits with the same softcap and with stats_temperature = `temperature`;
            argmax and top1_prob are read. A row without a distribution (top1_prob 0) yields zeros.
        weight: [V, E] bf16, fp16 or fp32, the embedding, without embed_scale.
        softcap: in [1e-30, 1e30], or None.
        temperature: > 0; a number, a 0-d tensor or one value per row [...].
        tolerance: in [0, 1], a probability.
        exact: repeat the reference model's roundings (tempered logits and probabilities in the dtype of
            `weight`), for parity tests; takes three passes over the logits in slices.
        check: read temperatures on the device too. Waits for the device.
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        [..., E] in the dtype of `weight`.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value.
        backends.BackendError: the backend named cannot run this call.

    Source: the soft_embeddings of DiffusionGemmaDecoderModel.forward in transformers' modeling_diffusion_gemma.py.
    """
    checks.is_table_of_logits(logits)
    check_weight(weight, logits, "logits")
    if weight.shape[0] != logits.shape[-1]:
        raise ValueError(
            f"weight: shape must be [{logits.shape[-1]}, E] like logits, got {tuple(weight.shape)}"
        )
    if not isinstance(stats, RowStats):
        raise TypeError(f"stats: RowStats expected, got {type(stats).__name__}")
    shape, device = tuple(logits.shape[:-1]), logits.device
    for name, dtype in (("argmax", torch.int64), ("top1_prob", torch.float32)):
        field = checks.is_tensor(f"stats.{name}", getattr(stats, name))
        checks.has_shape(f"stats.{name}", field, shape, "one value per row of logits")
        checks.has_dtype(f"stats.{name}", field, (dtype,))
        checks.on_device(f"stats.{name}", field, device, "logits")
    temperature = checks.number_or_rows(
        "temperature", temperature, shape, device, low_open=True, keep=checks.may_keep_numbers(logits)
    )
    number = checks.plain_number(tolerance, integer=False)
    if number is None:
        raise TypeError(f"tolerance: a number expected, got {type(tolerance).__name__}")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"tolerance: must be in [0, 1], got {tolerance}")
    checks.is_bool("exact", exact)
    checks.is_bool("check", check)
    checks.is_string("backend", backend)
    rows = rows_view(logits)
    result = _soft_embedding(
        rows,
        stats.argmax.reshape(rows.shape[:-1]),
        stats.top1_prob.reshape(rows.shape[:-1]),
        weight,
        temperature,
        checks.softcap_value(softcap),
        float(number),
        exact,
        check,
        backend,
    )
    return result.reshape(*shape, weight.shape[1])
