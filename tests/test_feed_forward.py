"""feed_forward: dense MLP, the router's choice and the experts, each against its own truth."""

import pytest
import torch

from dgemma_accel.native import feed_forward_branches
from dgemma_accel.ops.feed_forward import feed_forward
from dgemma_accel.reference.budget_experts import check_dense, check_experts
from dgemma_accel.reference.feed_forward import DENSE_SCALES, FeedForwardCall
from dgemma_accel.reference.feed_forward import choose as choose_by_reference
from dgemma_accel.reference.quantization import quantize, quantize_nvfp4, quantize_rows

OP = "feed_forward"
# Not of every size and dtype; see test_cuda_experts.py.
WITHOUT = ("cuda",)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_case(rows, dense_width, count, width, embedding, dtype, device, top_k=2):
    """Arguments of the op. The router's scores lie apart by more than any rounding, in another order in every row."""
    # A row of `routed` picks a column of the router, whose numbers are the experts' in an order of their own.
    experts_of = torch.stack([torch.randperm(count) for _ in range(embedding)]).T.float()
    router = (experts_of - count / 2) / 8
    routed = torch.eye(embedding)[torch.randint(embedding, (rows,))]
    tensors = (
        torch.randn(rows, embedding), routed, torch.randn(rows, embedding),
        torch.randn(dense_width, embedding) * embedding**-0.5,
        torch.randn(dense_width, embedding) * embedding**-0.5,
        torch.randn(embedding, dense_width) * dense_width**-0.5,
        router, torch.rand(count) + 0.5,
        torch.randn(count, 2 * width, embedding) * embedding**-0.5, torch.randn(count, embedding, width) * width**-0.5,
    )  # fmt: skip
    return tuple(tensor.to(dtype).to(device) for tensor in tensors), top_k


def run(case, top_k, backend, activation="gelu_tanh", **scales):
    return feed_forward(FeedForwardCall(*case, top_k, activation, **scales), backend)


def check(results, case, top_k, activation="gelu_tanh", **scales):
    """Violations of the budgets of `experts`, for which the dense MLP is one expert that every row has."""
    dense, routed, hidden, dense_gate, dense_up, dense_down, router, expert_scale, gate_up, down = case
    mlp, mixture = results
    index, weights = choose_by_reference(routed @ router.T, expert_scale, top_k)
    alone = dense.new_zeros((len(dense), 1), dtype=torch.int64), dense.new_ones((len(dense), 1))
    return [
        *check_experts(
            mlp, dense, *alone, torch.cat([dense_gate, dense_up])[None], dense_down[None], activation
        ),
        *check_experts(mixture, hidden, index, weights, gate_up, down, activation, **scales),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, dense_width, count, width, embedding, top_k",
    [(1, 1, 1, 1, 1, 1), (7, 20, 5, 24, 40, 3), (40, 70, 16, 40, 130, 4), (33, 1100, 3, 16, 96, 3)],
)
def test_within_budget(backend, device, dtype, rows, dense_width, count, width, embedding, top_k):
    case, top_k = make_case(rows, dense_width, count, width, embedding, dtype, device, top_k)
    results = run(case, top_k, backend)
    assert [r.shape for r in results] == [(rows, embedding)] * 2 and {r.dtype for r in results} == {dtype}
    assert not check(results, case, top_k)


def test_silu_and_no_rows(backend, device):
    case, top_k = make_case(9, 24, 4, 16, 32, torch.float32, device)
    results = run(case, top_k, backend, "silu")
    assert not check(results, case, top_k, "silu") and len(check(results, case, top_k)) == 2
    none = tuple(tensor[:0] for tensor in case[:3])
    assert [r.shape for r in run((*none, *case[3:]), top_k, backend)] == [(0, 32)] * 2


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_quantised_experts(backend, device, form):
    case, top_k = make_case(12, 24, 4, 32, 64, torch.float32, device)
    matrices, scales = [], {}
    for name, weight in zip(("gate_up", "down"), case[8:]):
        if form == "fp8":
            numbers, scales[f"{name}_scale"] = quantize(weight)
        else:
            numbers, scales[f"{name}_scale"], scales[f"{name}_global_scale"] = quantize_nvfp4(weight)
        matrices.append(numbers)
    case = (*(tensor.bfloat16() for tensor in case[:8]), *matrices)
    results = run(case, top_k, backend, **scales)
    assert not check(results, case, top_k, **scales)


@pytest.mark.parametrize("rounds_rows", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_mlp_with_fp8_weights(backend, device, dtype, rounds_rows, monkeypatch):
    """Rows are rounded before both products, but not on a GPU that does not multiply FP8."""
    if not rounds_rows:
        if backend == "reference":
            pytest.skip("the specification rounds rows")
        monkeypatch.setattr(feed_forward_branches, "multiplies_fp8", lambda device: False)
    case, top_k = make_case(20, 128, 4, 32, 64, dtype, device)
    made = [quantize_rows(weight) for weight in case[3:6]]
    dense = dict(zip(DENSE_SCALES, (scale for _, scale in made)))
    scaled = (*case[:3], *(numbers for numbers, _ in made), *case[6:])
    mlp, mixture = run(scaled, top_k, backend, **dense)
    wide = [numbers.float() * scale for numbers, scale in made]
    assert not check_dense(mlp, case[0], *wide, rounds_rows=rounds_rows)
    # The experts know nothing of it.
    assert torch.equal(mixture, run(case, top_k, backend)[1])
    turned = dict(
        zip(DENSE_SCALES, (dense["dense_up_scale"], dense["dense_gate_scale"], dense["dense_down_scale"]))
    )
    for wrong in (
        torch.zeros_like(mlp),
        mlp * 1.25,
        run(scaled, top_k, backend, **turned)[0],
        run((*scaled[:3], scaled[4], scaled[3], *scaled[5:]), top_k, backend, **turned)[0],
    ):
        assert check_dense(wrong, case[0], *wide, rounds_rows=rounds_rows)


def test_budget_fails_what_is_wrong(backend, device):
    case, top_k = make_case(20, 40, 8, 24, 48, torch.float32, device)
    right = run(case, top_k, backend)
    assert not check(right, case, top_k)
    for part in range(2):
        wrong = [right[0].clone(), right[1].clone()]
        wrong[part][3] = 0
        assert len(check(wrong, case, top_k)) == 1, "a dropped row"
    # Rows of the other's norm, an expert less, a scale that was not applied, gate and up the other way round.
    swapped = (case[2], case[1], case[0], *case[3:])
    assert len(check(run(swapped, top_k, backend), case, top_k)) == 2
    assert len(check(run(case, 1, backend), case, top_k)) == 1
    unscaled = (*case[:7], torch.ones_like(case[7]), *case[8:])
    assert len(check(run(unscaled, top_k, backend), case, top_k)) == 1
    turned = (*case[:3], case[4], case[3], *case[5:])
    assert len(check(run(turned, top_k, backend), case, top_k)) == 1


@pytest.mark.parametrize("top_k", [0, 5])
def test_choices_that_there_are_not(top_k):
    case, _ = make_case(3, 8, 4, 8, 16, torch.float32, "cpu")
    with pytest.raises(ValueError, match=f"top_k: must be between 1 and the 4 experts, got {top_k}"):
        run(case, top_k, "auto")


class TestChoose:
    """The router's choice by itself: equal experts, ties included, and weights of fp32."""

    @pytest.fixture
    def choose(self, backend):
        if backend == "reference":
            return choose_by_reference
        module = pytest.importorskip("dgemma_accel.triton_kernels.expert_routing")
        return module.choose

    def assert_same(self, choose, scores, top_k, scale=None):
        scale = torch.rand(scores.shape[1], device=scores.device) + 0.5 if scale is None else scale
        index, weights = choose(scores, scale, top_k)
        expected, wanted = choose_by_reference(scores.double(), scale.double(), top_k)
        assert index.dtype == torch.int64 and weights.dtype == torch.float32
        assert torch.equal(index, expected)
        assert torch.allclose(weights.double(), wanted, rtol=1e-5, atol=1e-7, equal_nan=True)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "rows, count, top_k", [(1, 1, 1), (5, 3, 3), (9, 128, 8), (3, 130, 6), (6, 8, 5)]
    )
    def test_equal(self, choose, device, dtype, rows, count, top_k):
        self.assert_same(choose, (torch.randn(rows, count, device=device) * 4).to(dtype), top_k)

    def test_ties_go_to_the_lower_number(self, choose, device):
        scores = torch.randint(-2, 3, (40, 24), device=device).float()
        scores[::2][scores[::2] == 0] = -0.0
        self.assert_same(choose, scores, 7)
        self.assert_same(choose, torch.zeros(3, 16, device=device), 4)

    def test_scores_without_a_distribution(self, choose, device):
        scores = torch.randn(6, 16, device=device)
        scores[0, 3] = scores[1, 2] = scores[1, 9] = float("nan")
        scores[1, 2] = -scores[1, 2]
        scores[2] = float("-inf")
        scores[3, 4:] = float("-inf")
        scores[4, 5] = float("inf")
        index, weights = choose(scores, torch.ones(16, device=device), 6)
        assert ((index >= 0) & (index < 16)).all()
        assert all(len(set(row)) == 6 for row in index.tolist())
        assert weights[[0, 1, 2, 4]].isnan().any(1).all()
        assert index[3, :4].sort().values.tolist() == [0, 1, 2, 3] and not weights[3, 4:].any()
        self.assert_same(choose, scores[[3, 5]], 6)

    def test_scales_of_any_stride(self, choose, device):
        wide = torch.rand(32, device=device) + 0.5
        self.assert_same(choose, torch.randn(5, 16, device=device), 3, wide[::2])

    def test_far_apart(self, choose, device):
        """Weights of what underflows next to the first choice are 0, and the rest is as it would be without."""
        scores = torch.tensor([[0.0, -200.0, 3.0, -1e30, 2.5]], device=device)
        self.assert_same(choose, scores, 4)
