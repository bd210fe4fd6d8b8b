"""Error budgets: is a kernel's result as near the truth as its arithmetic allows?

Truth is the reference in fp64. A floating result may be off by at most twice the error of the same computation
in plain PyTorch at the kernel's precision, plus an ulp term. An integer may differ from the truth only
where the two candidates are tied within the precision. Tests and the bench judge by these functions, and
the tests show that zeros, a wrong temperature and a dropped tile fail them.

Every check returns a list of violations, one line each; an empty list means within the budget.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import block_attention as attention_reference
from . import commit as commit_reference
from . import row_stats as row_stats_reference
from . import soft_embedding as soft_embedding_reference
from . import top_k_top_p as top_k_top_p_reference
from .autocast import without_autocast
from .quantization import FP8_SUM_ERROR, dequantize, quantize_rows
from .row_stats import apply_softcap
from .soft_embedding import tempered

FP32_EPSILON = torch.finfo(torch.float32).eps
# Kernels may flush a probability to 0 where it is not a normal fp32 number.
FP32_TINY = torch.finfo(torch.float32).tiny
# A cumulated fp32 sum over tiles against the fp64 one: what a sample's uniform may be off by.
CDF_SLACK = 8 * FP32_EPSILON


def _rows(value, shape, dtype, device) -> Tensor:
    # Of the dtype at once: a plain number would first be rounded to torch's default dtype.
    value = torch.as_tensor(value, dtype=dtype, device=device)
    return value.reshape(-1) if value.ndim else value.expand(shape.numel())


def _within(name: str, actual: Tensor, truth: Tensor, plain: Tensor, ulp: Tensor | float) -> list[str]:
    """|actual - truth| <= 2 max|plain - truth| + ulp, where an infinity or a NaN has to be met exactly."""
    actual = actual.to(truth.device, torch.float64)
    special = ~truth.isfinite()
    if not torch.equal(actual[special].nan_to_num(12345.0), truth[special].nan_to_num(12345.0)):
        return [f"{name}: infinities or NaN differ from the truth"]
    error = torch.where(special, 0.0, actual - truth).abs()
    plain_error = torch.where(special, 0.0, plain.double() - truth).abs().max() if truth.numel() else 0.0
    allowed = 2 * plain_error + ulp
    bad = ~(error <= allowed)
    if not bool(bad.any()):
        return []
    allowed = torch.as_tensor(allowed, dtype=torch.float64, device=error.device).expand_as(error)
    worst = int((error - allowed).nan_to_num(float("inf")).argmax())
    return [
        f"{name}: {int(bad.sum())} of {bad.numel()} values off by more than allowed, "
        f"worst {error.flatten()[worst]:.3e} against {allowed.flatten()[worst]:.3e}"
    ]


@without_autocast
def check_row_stats(
    stats,
    logits: Tensor,
    *,
    temperature=1.0,
    stats_temperature=None,
    softcap: float | None = None,
    uniform: Tensor,
) -> list[str]:
    """Violations of the budget by a `RowStats` of `logits` [..., V] drawn at `uniform` [...].

    The ulp terms: a logit x / T carries a rounding of eps * |x / T| in fp32, which entropy and
    logsumexp inherit as it is and probabilities as a relative error. These two are fp32 numbers themselves, so
    they carry a rounding of their own size besides, which is what counts where all logits are nearly the same.
    """
    vocab, shape = logits.shape[-1], logits.shape[:-1]
    flat = logits.reshape(1, -1, vocab)
    uniform = uniform.reshape(-1)
    t = _rows(temperature, shape, torch.float32, logits.device)
    ts = None if stats_temperature is None else _rows(stats_temperature, shape, torch.float32, logits.device)
    zero = torch.tensor(0, device="cpu")
    truth = row_stats_reference(flat.double(), t, ts, uniform, None, zero, softcap)
    plain = row_stats_reference(flat.float(), t, ts, uniform, None, zero, softcap)
    names = ("argmax", "sample", "entropy", "logsumexp", "top1_prob", "top2_prob", "sample_prob")
    truth = {name: value.reshape(-1) for name, value in zip(names, truth)}
    plain = {name: value.reshape(-1) for name, value in zip(names, plain)}
    actual = {name: getattr(stats, name).reshape(-1).to(logits.device) for name in names}

    problems = []
    for name in ("argmax", "sample"):
        outside = (actual[name] < 0) | (actual[name] >= vocab)
        if bool(outside.any()):
            problems.append(f"{name}: {int(outside.sum())} values outside [0, {vocab})")
    if problems:
        return problems

    x = apply_softcap(flat.double(), softcap)[0]
    greedy = t == 0
    sampling = torch.where(greedy, 1.0, t).double()
    stats_t = (sampling if ts is None else ts).double()
    finite = torch.where(x.isfinite(), x, 0.0).abs().amax(-1)
    rounding = FP32_EPSILON * (finite / stats_t + 1)
    valid = truth["logsumexp"].isfinite()

    for name in ("entropy", "logsumexp"):
        own = FP32_EPSILON * torch.where(valid, truth[name].abs(), 0.0)
        problems += _within(name, actual[name], truth[name], plain[name], 4 * (rounding + own))
    for name in ("top1_prob", "top2_prob"):
        ulp = 8 * rounding * truth[name] + FP32_TINY
        problems += _within(name, actual[name], truth[name], plain[name], ulp)
    # The probability that goes with the sample that was drawn, which may be a tie of the truth's.
    p = torch.exp(x / stats_t[:, None] - truth["logsumexp"][:, None])
    own = torch.where(valid, p.gather(-1, actual["sample"][:, None])[:, 0], 0.0)
    plain_own = own + (plain["sample_prob"] - truth["sample_prob"]) * (plain["sample"] == truth["sample"])
    problems += _within("sample_prob", actual["sample_prob"], own, plain_own, 8 * rounding * own + FP32_TINY)

    # Two indices are tied where their logits differ by less than the spacing of fp32 there.
    top = torch.where(valid, x.gather(-1, truth["argmax"][:, None])[:, 0], 0.0)
    chosen = torch.where(valid, x.gather(-1, actual["argmax"][:, None])[:, 0], 0.0)
    different = actual["argmax"] != truth["argmax"]
    wrong = different & ~(top - chosen <= 4 * FP32_EPSILON * (top.abs() + 1e-30))
    if bool(wrong.any()):
        problems.append(f"argmax: {int(wrong.sum())} rows differ from the truth without a tie")

    problems += _check_samples(actual, x, uniform.double(), sampling, greedy, valid, finite)
    return problems


def _check_samples(actual, x, uniform, sampling, greedy, valid, finite) -> list[str]:
    q = torch.softmax(torch.where(valid[:, None], x, 0.0) / sampling[:, None], -1)
    cdf = q.cumsum(-1)
    sample = actual["sample"][:, None]
    upper = cdf.gather(-1, sample)[:, 0]
    mass = q.gather(-1, sample)[:, 0]
    slack = CDF_SLACK + 2 * FP32_EPSILON * finite / sampling
    drawn = (uniform >= upper - mass - slack) & (uniform <= upper + slack) & (mass > 0)
    right = torch.where(greedy, actual["sample"] == actual["argmax"], drawn)
    right = torch.where(valid, right, (actual["sample"] == 0) & (actual["argmax"] == 0))
    if bool(right.all()):
        return []
    return [
        f"sample: {int((~right).sum())} of {right.numel()} rows are not the inverse of the CDF at their uniform"
    ]


@without_autocast
def check_top_k_top_p(
    cutoff: Tensor,
    logits: Tensor,
    *,
    temperature,
    top_k: int,
    top_p: float,
    top_k_first: bool,
    softcap: float | None,
) -> list[str]:
    """Violations of the budget by the result of `top_k_top_p` of `logits` [..., V].

    Top-k has to be exact. A token of top-p may be kept or dropped where the mass before it is the share p to within the
    roundings of x, which a sum of e^x inherits as a relative error. The cutoff is a logit of the row.
    """
    if cutoff.shape != logits.shape[:-1] or cutoff.dtype != torch.float32:
        return [f"cutoff: shape {tuple(cutoff.shape)} and dtype {cutoff.dtype}"]
    rows = logits.reshape(-1, logits.shape[-1]).double()
    t = _rows(temperature, logits.shape[:-1], torch.float32, logits.device)
    # Of fp32: where x is beyond it a row is left as it is.
    plain = top_k_top_p_reference(rows[None].float(), t, top_k, top_p, top_k_first, softcap)[0].double()
    truth = top_k_top_p_reference(rows[None], t, top_k, top_p, top_k_first, softcap)[0]
    truth = torch.where(plain.isinf(), plain, truth)[:, None]
    actual = cutoff.reshape(-1, 1).to(rows.device, torch.float64)
    t = torch.where(t == 0, 1.0, t)[:, None].double()
    x = apply_softcap(rows, softcap) / t
    masses = torch.exp(x - x.amax(-1, keepdim=True))
    least = rows.topk(top_k, dim=-1).values[:, -1:] if 0 < top_k <= rows.shape[-1] else -float("inf")
    if top_k_first:
        masses = torch.where(rows >= least, masses, 0.0)

    def share(which: Tensor) -> Tensor:
        return torch.where(which, masses, 0.0).sum(-1, keepdim=True) / masses.sum(-1, keepdim=True)

    finite = torch.where(x.isfinite(), x, 0.0).abs().amax(-1, keepdim=True)
    slack = 8 * FP32_EPSILON * (finite + 1)
    tied = (actual >= least) & (rows == actual).any(-1, keepdim=True)
    more = (actual < truth) & (share(rows > actual) <= top_p + slack)
    fewer = (actual > truth) & (share(rows >= actual) >= top_p - slack)
    tied &= (more | fewer) & (top_p < 1)
    wrong = ~((actual == truth) | tied)
    if not bool(wrong.any()):
        return []
    first = int(wrong[:, 0].nonzero()[0, 0])
    return [
        f"cutoff: {int(wrong.sum())} of {wrong.numel()} rows differ from the truth without a tie, "
        f"first row {first}: {actual[first].item():.9g} instead of {truth[first].item():.9g}"
    ]


@without_autocast
def check_block_attention(output: Tensor, lse: Tensor | None, *arguments) -> list[str]:
    """Violations of the budget by the result of `block_attention`.

    Args:
        output, lse: what the op returned (lse may be None).
        arguments: the arguments of `reference.block_attention`, in its order.
    """
    tensors = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    truth, truth_lse = attention_reference(*tensors)
    dtype = arguments[0].dtype
    plain, plain_lse = _plain_attention(*arguments)
    spacing = torch.finfo(dtype).eps
    problems = []
    if output.dtype != dtype:
        problems.append(f"output: dtype {output.dtype} instead of {dtype}")
    # One rounding of the output itself is half a spacing. A score of size s carries a rounding of eps * s, which
    # its weight inherits as a relative error: seen only where scores are in the hundreds, and then in whichever
    # order a product was summed. The rest of the budget is plain PyTorch's error.
    score_rounding = FP32_EPSILON * truth_lse.abs()[..., None] * float(arguments[2].abs().max())
    ulp = spacing * truth.abs() + spacing * 1e-2 + score_rounding
    problems += _within("output", output, truth, plain, ulp)
    if lse is not None:
        ulp = 8 * FP32_EPSILON * (truth_lse.abs() + 1)
        problems += _within("lse", lse, truth_lse, plain_lse, ulp)
    return problems


def _plain_attention(
    q, k, v, prefix_k, prefix_v, start, end, scale, softcap, causal, window=None
) -> tuple[Tensor, Tensor]:
    """What a user writes in PyTorch at the tensors' own dtype: concatenate, repeat, matmul, softmax, matmul."""
    batch, query_heads, length, _ = q.shape
    group = query_heads // k.shape[1]
    prefix_length = 0 if prefix_k is None else prefix_k.shape[2]
    output = torch.empty_like(q)
    lse = torch.empty(batch, query_heads, length, dtype=torch.float32, device=q.device)
    for b in range(batch):
        first = 0 if start is None else int(start[b])
        last = max(first, prefix_length if end is None else int(end[b]))
        keys, values = k[b], v[b]
        if prefix_k is not None:
            keys = torch.cat([prefix_k[b, :, first:last], keys], 1)
            values = torch.cat([prefix_v[b, :, first:last], values], 1)
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        scores = (q[b] @ keys.transpose(-1, -2)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(
                scores.shape[-1] - length
            )
            if window is not None:
                seen &= seen.new_ones(seen.shape).triu(scores.shape[-1] - length - window + 1)
            scores = scores.masked_fill(~seen, float("-inf"))
        lse[b] = torch.logsumexp(scores.float(), -1)
        output[b] = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ values
    return output, lse


@without_autocast
def check_soft_embedding(
    result: Tensor, logits: Tensor, weight: Tensor, temperature, softcap, tolerance=0.0
) -> list[str]:
    """Violations of the budget by `soft_embedding(exact=False)` of logits [..., V] and weight [V, E].

    Plain PyTorch at the tensors' dtype is the reference model's form: softmax in fp32, probabilities rounded to
    the dtype of the weight, then the product. `tolerance` > 0 allows the mass of the tiles it may leave out.
    """
    vocab, embedding = weight.shape
    flat = logits.reshape(1, -1, vocab)
    temperature = torch.as_tensor(temperature, device=logits.device)
    if temperature.ndim:
        temperature = temperature.reshape(-1)
    x = tempered(flat.double(), temperature, softcap)
    lse = torch.logsumexp(x, -1)
    valid = lse.isfinite()
    truth = soft_embedding_reference(
        flat.double(), x.argmax(-1), valid.float(), weight.double(), temperature, softcap
    )
    probabilities = torch.softmax(tempered(flat.float(), temperature, softcap), -1)
    plain = torch.where(valid[..., None], probabilities.to(weight.dtype) @ weight, 0.0)
    spacing = torch.finfo(weight.dtype).eps
    # Capped logits are fp32 numbers: at a low temperature their spacing is no longer small.
    exponents = 2 * FP32_EPSILON * (torch.where(valid, lse, 0.0).abs() + 1)[..., None]
    ulp = (spacing + exponents) * truth.abs() + FP32_EPSILON * weight.abs().max().double()
    left_out = min(1.0, tolerance * -(-vocab // 64)) * float(weight.abs().max())
    return _within("soft_embedding", result.reshape(1, -1, embedding), truth, plain, ulp + left_out)


@without_autocast
def check_linears(
    results: list[Tensor],
    rows: Tensor,
    weights: list[Tensor],
    scales: list[Tensor] | None = None,
    rounds_rows: bool = True,
) -> list[str]:
    """Violations of the budget by the results of `linears`. Plain PyTorch is a product by itself.

    Args:
        scales: of FP8 weights. The truth is the product of what numbers and scales stand for; plain PyTorch sums it in
            fp32 and rounds it to the dtype of the rows, or without rounded rows multiplies in that dtype.
        rounds_rows: whether rows are rounded to FP8 there. Matrix units of a GPU add up their products with fewer bits.
    """
    shapes = [(*rows.shape[:-1], len(weight)) for weight in weights]
    found = [tuple(result.shape) for result in results]
    if found != shapes or any(result.dtype != rows.dtype for result in results):
        return [f"linears: {found} instead of {shapes} {rows.dtype}"]
    problems = []
    given = rows
    if scales is not None:
        weights = [dequantize(weight, scale, torch.float64) for weight, scale in zip(weights, scales)]
        if rounds_rows:
            numbers, row_scale = quantize_rows(rows)
            given = numbers.double() * row_scale
    for number, (result, weight) in enumerate(zip(results, weights)):
        truth = given.double() @ weight.double().T
        if scales is None or not rounds_rows:
            plain = rows @ weight.to(rows.dtype).T
        else:
            plain = (given.float() @ weight.float().T).to(rows.dtype)
        ulp = torch.finfo(rows.dtype).eps * truth.abs() + FP32_EPSILON
        if scales is not None and rounds_rows and result.is_cuda:
            ulp = ulp + FP8_SUM_ERROR * (given.double().abs() @ weight.double().abs().T)
        problems += _within(f"linears {number}", result, truth, plain, ulp)
    return problems


@without_autocast
def check_commit(result: tuple[Tensor, ...], *arguments) -> list[str]:
    """Violations by the six tensors of `commit`: they have to equal the reference's.

    Args:
        result: (tokens, committed, num_committed, draft, history, finished).
        arguments: the arguments of `reference.commit`, in its order.
    """
    names = ("tokens", "committed", "num_committed", "draft", "history", "finished")
    problems = []
    for name, actual, expected in zip(names, result, commit_reference(*arguments)):
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            came, wanted = (tuple(actual.shape), actual.dtype), (tuple(expected.shape), expected.dtype)
            problems.append(f"{name}: shape and dtype {came} instead of {wanted}")
        elif not torch.equal(actual, expected):
            problems.append(f"{name}: {int((actual != expected).sum())} of {expected.numel()} values differ")
    return problems
