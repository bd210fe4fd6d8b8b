"""What torch does around an op changes nothing: strides, autocast, forward mode, compilation, its default dtype."""

import pytest
import torch
from conftest import DEVICES, backend_params
from torch._dynamo.testing import CompileCounterWithBackend

import dgemma_accel
from dgemma_accel.backends import MODULES
from dgemma_accel.ops import registration
from dgemma_accel.ops.feed_forward import feed_forward
from dgemma_accel.ops.progress import progress
from dgemma_accel.ops.quantize_rows import quantize_rows
from dgemma_accel.reference import budget
from dgemma_accel.reference.budget_experts import check_experts
from dgemma_accel.reference.feed_forward import FeedForwardCall
from dgemma_accel.reference.progress import ProgressCall
from dgemma_accel.samplers import (
    CanvasState,
    Edit,
    EntropyBound,
    EntropyThreshold,
    Keep,
    Remask,
    Renoise,
    StableAndConfident,
    Threshold,
    TopK,
)

VOCAB = 40
EVERYWHERE = [
    pytest.param(op, *param.values, marks=param.marks) for op in MODULES for param in backend_params(op)
]


def rows_first(tensor):
    """Of the same values, the first dimension innermost."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def with_gaps(tensor):
    wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 3)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def as_it_is(tensor):
    return tensor


def arguments_of(op, device, lay=as_it_is, by=None):
    """Tensors of a small call that backend `by` takes, those with more than one dimension as `lay` lays them out."""
    generator = torch.Generator().manual_seed(5)

    def real(*shape):
        return lay(torch.randn(shape, generator=generator).to(device))

    def whole(most, *shape):
        return lay(torch.randint(0, most, shape, generator=generator).to(device))

    if op in ("row_stats", "soft_embedding"):
        return (real(2, 3, VOCAB), real(VOCAB, 16))
    if op == "head_stats":
        return (real(2, 3, 16), real(VOCAB, 16))
    if op == "commit":
        fields = [whole(VOCAB, 2, 6) for _ in range(2)] + [real(2, 6).abs() for _ in range(5)]
        return (whole(2, 2, 6), *(lay(field) for field in fields))
    if op == "progress":
        flags = [whole(2, *shape) > 0 for shape in ((2, 6), (2,), (2,))]
        return (whole(2, 2, 6), whole(2, 2, 6), flags[0], real(2, 6), *flags[1:], whole(9, 2))
    if op == "block_attention":
        # The compiled CUDA kernel has no fp32 and no narrower head.
        width, dtype = (64, torch.bfloat16) if by == "cuda" else (16, torch.float32)
        sizes = ((4, 8), (2, 8), (2, 8), (2, 5), (2, 5))
        return tuple(lay(real(2, heads, length, width).to(dtype)) for heads, length in sizes)
    if op in ("quantize_rows", "top_k_top_p"):
        return (real(2, 3, VOCAB),)
    # Nor have the CUDA kernels of experts fp32 or these sizes.
    side, dtype = (32, torch.bfloat16) if by == "cuda" else (16, torch.float32)

    def sided(*shape):
        return real(*(side if size is None else size for size in shape)).to(dtype)

    if op == "feed_forward":
        shapes = [(6, None)] * 3 + [(20, None), (20, None), (None, 20), (3, None), (3,)]
        return tuple(sided(*shape) for shape in (*shapes, (3, 2 * side, None), (3, None, None)))
    return (sided(6, None), whole(3, 6, 2), real(6, 2), sided(3, 2 * side, None), sided(3, None, None))


def run(op, backend, given):
    """The tensors that a call of the public function returns."""
    if op == "row_stats":
        return tuple(dgemma_accel.row_stats(given[0], temperature=0.5, seed=1, backend=backend))
    if op == "soft_embedding":
        stats = dgemma_accel.row_stats(given[0], seed=1, backend="reference")
        return (dgemma_accel.soft_embedding(given[0], stats, given[1], backend=backend),)
    if op == "head_stats":
        logits, stats = dgemma_accel.head_stats(*given, seed=1, backend=backend)
        _, alone = dgemma_accel.head_stats(*given, seed=1, keep_logits=False, backend=backend)
        return (logits, *stats, *alone)
    if op == "commit":
        tokens, *fields = given
        stop = StableAndConfident(2)
        result = dgemma_accel.commit(
            tokens,
            dgemma_accel.RowStats(*fields),
            TopK(2),
            Renoise(VOCAB),
            seed=1,
            state=CanvasState.start(tokens, stop),
            stop=stop,
            backend=backend,
        )
        state = result.state
        return (
            result.tokens,
            result.committed,
            result.num_committed,
            state.draft,
            state.history,
            state.finished,
        )
    if op == "progress":
        return progress(ProgressCall(*given, None, 1, False, False, False), backend)
    if op == "block_attention":
        return dgemma_accel.block_attention(*given, return_lse=True, backend=backend)
    if op == "feed_forward":
        return feed_forward(FeedForwardCall(*given, 2, "gelu_tanh"), backend)
    if op == "quantize_rows":
        return quantize_rows(*given, backend)
    if op == "top_k_top_p":
        return (dgemma_accel.top_k_top_p(*given, top_k=5, top_p=0.9, backend=backend),)
    return (dgemma_accel.experts(*given, backend=backend),)


@pytest.mark.parametrize("lay", [rows_first, with_gaps])
@pytest.mark.parametrize("op, by", EVERYWHERE)
def test_results_are_laid_out_as_the_fake_says(op, by, lay, monkeypatch):
    device, seen = DEVICES[by], []
    call = registration.Operator.__call__

    def noted(self, *arguments):
        seen.append((self.overload, arguments))
        return call(self, *arguments)

    expected = run(op, by, arguments_of(op, device, by=by))
    monkeypatch.setattr(registration.Operator, "__call__", noted)
    results = run(op, by, arguments_of(op, device, lay, by))
    assert [r.stride() for r in results] == [r.stride() for r in expected]
    monkeypatch.undo()
    for overload, arguments in seen:
        if overload.name() == f"dgemma::{op}":
            tests = ("test_faketensor", "test_aot_dispatch_dynamic")
            torch.library.opcheck(overload, arguments, test_utils=tests)


@pytest.mark.parametrize("op, by", EVERYWHERE)
def test_autocast_changes_no_op(op, by):
    device = DEVICES[by]
    given = arguments_of(op, device, by=by)
    expected = run(op, by, given)
    with torch.autocast(device, dtype=torch.bfloat16):
        results = run(op, by, given)
        assert torch.is_autocast_enabled(device)
    for result, wanted in zip(results, expected):
        assert result.dtype == wanted.dtype and torch.equal(result, wanted)


def test_autocast_loosens_no_budget():
    attention, experts = arguments_of("block_attention", "cpu"), arguments_of("experts", "cpu")
    output = dgemma_accel.block_attention(*attention).bfloat16().float()
    mixed = dgemma_accel.experts(*experts).bfloat16().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert budget.check_block_attention(output, None, *attention, None, None, 0.25, None, False)
        assert check_experts(mixed, *experts)


OF_REALS = [op for op in MODULES if op not in ("commit", "progress", "soft_embedding")]


@pytest.mark.parametrize("op", OF_REALS)
def test_forward_mode_is_refused(op):
    given = arguments_of(op, "cpu")

    def call(tensor):
        return run(op, "auto", (tensor, *given[1:]))[-1]

    with pytest.raises(RuntimeError, match=f"dgemma::{op} is not differentiable, not in forward mode either"):
        torch.func.jvp(call, given[:1], (torch.ones_like(given[0]),))
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(call(given[0]), run(op, "auto", given)[-1])


@pytest.mark.parametrize("op", OF_REALS)
def test_derivatives_by_torch_func_are_refused(op):
    given = arguments_of(op, "cpu")

    def call(tensor):
        return run(op, "auto", (tensor, *given[1:]))[-1]

    for derivative in (
        lambda: torch.func.vjp(call, given[0]),
        lambda: torch.func.jacrev(call)(given[0]),
        lambda: torch.func.grad(lambda tensor: torch.vmap(call)(tensor[None]).sum())(given[0]),
    ):
        with pytest.raises(RuntimeError, match=f"^dgemma::{op} is not differentiable"):
            derivative()
    # What is held constant is no matter of the transform.
    by = torch.func.grad(lambda factor: (factor * call(given[0])).sum())(torch.tensor(2.0))
    torch.testing.assert_close(by, call(given[0]).sum())


REALS, WHOLES = [0.5 + n / 64 for n in range(10)], list(range(2, 12))
LOGITS, WEIGHT = arguments_of("row_stats", "cpu")
HIDDEN, QUERY = torch.randn(2, 3, 16), torch.randn(1, 2, 3, 16)
STATS = dgemma_accel.row_stats(LOGITS, seed=1)
TOKENS = torch.zeros(2, 3, dtype=torch.int64)


def decide(rule, write=None, **options):
    return dgemma_accel.commit(TOKENS, STATS, rule, write or Remask(39), **options).tokens


# A number of the public functions, its values, and how many graphs they take: the first value's, that of any other,
# and for what is an argument of the op itself one for each.
NUMBERS = {
    "row_stats temperature": (lambda v: dgemma_accel.row_stats(LOGITS, temperature=v, seed=1), REALS, 2),
    "row_stats temperature from 0": (
        lambda v: dgemma_accel.row_stats(LOGITS, temperature=v, seed=1),
        [0.0, *REALS],
        2,
    ),
    "row_stats stats_temperature": (
        lambda v: dgemma_accel.row_stats(LOGITS, stats_temperature=v, seed=1),
        REALS,
        2,
    ),
    "row_stats softcap": (lambda v: dgemma_accel.row_stats(LOGITS, softcap=v, seed=1), REALS[:3], 3),
    "row_stats seed": (lambda v: dgemma_accel.row_stats(LOGITS, seed=v), WHOLES, 2),
    "head_stats temperature": (
        lambda v: dgemma_accel.head_stats(HIDDEN, WEIGHT, temperature=v, seed=1)[1],
        REALS,
        2,
    ),
    "soft_embedding temperature": (
        lambda v: dgemma_accel.soft_embedding(LOGITS, STATS, WEIGHT, temperature=v),
        REALS,
        2,
    ),
    "block_attention scale": (
        lambda v: dgemma_accel.block_attention(QUERY, QUERY, QUERY, scale=v),
        REALS[:3],
        3,
    ),
    "block_attention softcap": (
        lambda v: dgemma_accel.block_attention(QUERY, QUERY, QUERY, softcap=v),
        REALS[:3],
        3,
    ),
    "block_attention window": (
        lambda v: dgemma_accel.block_attention(QUERY, QUERY, QUERY, causal=True, window=v),
        WHOLES,
        2,
    ),
    "TopK": (lambda v: decide(TopK(v)), WHOLES, 2),
    "Threshold": (lambda v: decide(Threshold(v)), REALS, 2),
    "EntropyThreshold": (lambda v: decide(EntropyThreshold(v)), REALS, 2),
    "EntropyBound": (lambda v: decide(EntropyBound(v)), REALS, 2),
    "gumbel_temperature": (lambda v: decide(TopK(1, gumbel_temperature=v), seed=1), REALS, 2),
    "Edit": (lambda v: decide(Edit(v, v, 7), Keep()), REALS, 2),
    "Renoise": (lambda v: decide(TopK(1), Renoise(v), seed=1), WHOLES, 2),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_may_change_under_one_compiled_function(name):
    call, values, graphs = NUMBERS[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for value in values:
        results, expected = compiled(value), call(value)
        pairs = zip(results, expected) if isinstance(expected, tuple) else [(results, expected)]
        assert all(torch.equal(ours, wanted) for ours, wanted in pairs), value
    # Some releases of torch compile a number once more before they let it change.
    assert counter.frame_count in (graphs, graphs + 1)


@pytest.mark.parametrize("op", [op for op in MODULES if op != "soft_embedding"])
def test_every_size_may_be_dynamic(op):
    given = arguments_of(op, "cpu")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *given: run(op, "auto", given), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    assert all(torch.equal(a, b) for a, b in zip(compiled(*given), run(op, "auto", given)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300, 10**400])
def test_numbers_that_are_none_of_fp32_are_named(bad):
    for name in ("temperature", "stats_temperature", "softcap"):
        with pytest.raises(ValueError, match=f"^{name}: must be finite"):
            dgemma_accel.row_stats(LOGITS, seed=1, **{name: bad})
    with pytest.raises(ValueError, match="^scale: must be finite"):
        dgemma_accel.block_attention(QUERY, QUERY, QUERY, scale=bad)
