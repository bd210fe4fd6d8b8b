"""top_k_top_p: every backend against fp64 truth, with ties, on odd shapes and poisoned inputs."""

import itertools
import math

import pytest
import torch
from conftest import far_apart
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma_accel
from dgemma_accel.reference.budget import check_top_k_top_p

OP = "top_k_top_p"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILTERS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_k": 20, "top_p": 0.9},
    {"top_k": 20, "top_p": 0.9, "top_k_first": True},
]


def make_logits(rows, vocab, dtype=torch.float32, device="cpu", scale=2.0):
    """Flat rows, rows with a few large logits, and rows with one, by turns."""
    logits = torch.randn(rows, vocab) * scale
    logits[1::3, : max(1, vocab // 50)] += 8.0
    logits[2::3, vocab // 2] += 25.0
    return logits.to(device, dtype)


def run(logits, backend, **kwargs):
    cutoff = dgemma_accel.top_k_top_p(logits, backend=backend, **kwargs)
    options = {"top_k": 0, "top_p": 1.0, "top_k_first": False, "temperature": 1.0, "softcap": None}
    return cutoff, check_top_k_top_p(cutoff, logits, **{**options, **kwargs})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 33, 1000, 4096, 4501])
def test_within_budget(backend, device, dtype, vocab):
    logits = make_logits(6, vocab, dtype, device)
    for number, filters in enumerate(FILTERS):
        more = [{}, {"temperature": 0.3}, {"temperature": 1.7, "softcap": 12.0}][number % 3]
        cutoff, problems = run(logits, backend, **filters, **more)
        assert not problems, (filters, more, problems)
        kept_all = filters.get("top_k", 0) > vocab and "top_p" not in filters
        assert (kept_all | (cutoff[:, None] == logits.float()).any(-1)).all()


@pytest.mark.parametrize(
    "kind", ["one value", "two values", "steps", "far below", "both signs", "zeros of both signs"]
)
def test_ties_and_odd_rows(backend, device, kind):
    vocab = 1501
    x = {
        "one value": lambda: torch.full((vocab,), -1.5),
        "two values": lambda: torch.where(torch.arange(vocab) % 3 == 0, 2.0, 1.0),
        "steps": lambda: torch.arange(vocab).div(100, rounding_mode="floor") * 0.01,
        "far below": lambda: torch.cat([torch.tensor([60.0, 59.5]), torch.randn(vocab - 2) * 1e-3 - 80]),
        "both signs": lambda: torch.randn(vocab) * 10 ** torch.linspace(-30, 1, vocab),
        "zeros of both signs": lambda: torch.tensor([0.0, -0.0]).repeat(vocab)[:vocab],
    }[kind]()
    logits = torch.stack([x, x.flip(0), x[torch.randperm(vocab)]]).to(device)
    for k, p, first in itertools.product(
        (0, 1, 5, 700, vocab, 10_000), (0.0, 0.3, 0.999, 1.0), (False, True)
    ):
        _, problems = run(logits, backend, top_k=k, top_p=p, top_k_first=first)
        assert not problems, (k, p, first, problems)


def test_what_is_kept_is_what_a_sort_keeps(backend, device):
    """Without the budget: halves and quarters add up exactly."""
    masses = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    logits = masses.log()[torch.tensor([3, 1, 4, 0, 2])][None].to(device)

    def kept(**filters):
        cutoff = dgemma_accel.top_k_top_p(logits, backend=backend, **filters)
        return (logits >= cutoff[:, None]).sum().item()

    assert [kept(top_p=p) for p in (0.0, 0.3, 0.6, 0.8, 0.9, 1.0)] == [1, 1, 2, 3, 5, 5]
    assert [kept(top_k=k) for k in (0, 1, 2, 3, 4, 5, 6)] == [5, 1, 2, 3, 5, 5, 5]
    # Of the three largest 0.5 is 57%, 0.75 are 86%.
    assert [kept(top_k=3, top_p=p, top_k_first=True) for p in (0.55, 0.6, 0.8, 0.9)] == [1, 2, 2, 3]
    assert [kept(top_k=3, top_p=p) for p in (0.45, 0.55, 0.7, 0.8)] == [1, 2, 2, 3]


def test_temperature_by_row_and_greedy_rows(backend, device):
    logits = make_logits(4, 500, device=device)
    temperature = torch.tensor([0.0, 0.2, 1.0, 3.0], device=device)
    cutoff, problems = run(logits, backend, top_p=0.8, temperature=temperature)
    assert not problems
    for row, t in enumerate(temperature.tolist()):
        alone = dgemma_accel.top_k_top_p(logits[row], top_p=0.8, temperature=t, backend=backend)
        assert alone == cutoff[row]
    same = dgemma_accel.top_k_top_p(logits[0], top_p=0.8, temperature=torch.tensor(1.0), backend=backend)
    assert same == cutoff[0]
    # Top-k alone does not ask for the temperature.
    cold = dgemma_accel.top_k_top_p(logits, top_k=5, temperature=1e-3, backend=backend)
    assert torch.equal(cold, dgemma_accel.top_k_top_p(logits, top_k=5, backend=backend))


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_rows_without_a_distribution_keep_all(backend, device, softcap):
    logits = make_logits(6, 700, device=device)
    logits[0, 650] = math.nan
    logits[1, 3] = math.inf
    logits[2] = -math.inf
    logits[3, 5:] = -math.inf
    logits[4, :] = math.nan
    for filters in FILTERS:
        cutoff, problems = run(logits, backend, softcap=softcap, **filters)
        assert not problems, (filters, problems)
        assert cutoff[0] == cutoff[2] == cutoff[4] == -math.inf
        assert (cutoff[1] == -math.inf) == (softcap is None) and cutoff[5].isfinite()
    assert dgemma_accel.top_k_top_p(logits, top_k=6, softcap=softcap, backend=backend)[3] == -math.inf


def test_a_temperature_beyond_fp32_keeps_all(backend, device):
    logits = make_logits(3, 400, device=device)
    for temperature in (1e-38, 1e-44):
        cutoff, problems = run(logits, backend, top_p=0.5, temperature=temperature)
        assert not problems and (cutoff == -math.inf).all()


def test_shapes_and_views(backend, device):
    wide = make_logits(2 * 7, 600, device=device).view(2, 7, 600)
    views = [
        wide[0, 0],
        wide[0],
        wide,
        wide[:, 1:, 3:500],
        wide[:, ::2],
        wide.transpose(0, 1),
        wide[None],
        wide[:0],
    ]
    for logits in [*views, wide[..., ::2]]:
        cutoff, problems = run(logits, backend, top_k=30, top_p=0.9)
        assert cutoff.shape == logits.shape[:-1] and not problems
    poisoned = torch.full((2, 7, 640), math.nan, device=device)
    poisoned[:, :, 21:621] = wide
    _, problems = run(poisoned[:, :, 21:621], backend, top_p=0.9)
    assert not problems, "values beside the view leaked in"


def test_rows_may_lie_far_apart(backend, device):
    logits = far_apart(make_logits(3, 300, torch.bfloat16, device=device), 2**30 + 24)
    _, problems = run(logits, backend, top_p=0.8)
    assert not problems


def test_two_runs_give_the_same_bits(backend, device):
    logits = make_logits(5, 20_011, torch.bfloat16, device=device)
    first, again = (dgemma_accel.top_k_top_p(logits, top_p=0.97, backend=backend) for _ in range(2))
    assert torch.equal(first, again)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_row(backend, data):
    from conftest import DEVICES

    values = st.floats(-60, 60, width=16) | st.just(-math.inf)
    row = data.draw(st.lists(values, min_size=1, max_size=40))
    filters = {
        "top_k": data.draw(st.integers(0, 45)),
        "top_p": data.draw(st.floats(0, 1)),
        "top_k_first": data.draw(st.booleans()),
        "temperature": data.draw(st.sampled_from([0.0, 0.1, 1.0, 2.0])),
    }
    _, problems = run(torch.tensor([row], device=DEVICES[backend]), backend, **filters)
    assert not problems


@pytest.mark.parametrize(
    "wrong", ["zeros", "temperature", "a dropped tile", "one token more", "k of distinct values"]
)
def test_the_budget_fails_what_is_wrong(wrong):
    logits = make_logits(9, 5000)
    options = {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "top_k_first": False, "softcap": None}
    cutoff = dgemma_accel.top_k_top_p(logits, top_p=0.9, temperature=0.7, backend="reference")
    assert not check_top_k_top_p(cutoff, logits, **options)
    if wrong == "zeros":
        cutoff = torch.zeros_like(cutoff)
    elif wrong == "temperature":
        cutoff = dgemma_accel.top_k_top_p(logits, top_p=0.9, temperature=0.77, backend="reference")
    elif wrong == "a dropped tile":
        cutoff = dgemma_accel.top_k_top_p(logits[:, :4000], top_p=0.9, temperature=0.7, backend="reference")
    elif wrong == "one token more":
        below = torch.where(logits < cutoff[:, None], logits, -math.inf)
        cutoff = below.amax(-1)
    else:
        logits = logits.round()
        options |= {"top_k": 40, "top_p": 1.0}
        cutoff = torch.stack([row.unique().sort(descending=True).values[:40][-1] for row in logits])
    assert check_top_k_top_p(cutoff, logits, **options)


def test_in_torch(backend, device):
    logits = make_logits(3, 300, device=device)
    arguments = (logits[None], torch.tensor(0.7), 20, 0.9, True, 30.0, backend)
    torch.library.opcheck(torch.ops.dgemma.top_k_top_p.default, arguments)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def traced(logits, temperature):
        return dgemma_accel.top_k_top_p(logits, top_k=20, top_p=0.9, temperature=temperature, backend=backend)

    eager = dgemma_accel.top_k_top_p(logits, top_k=20, top_p=0.9, temperature=0.7, backend=backend)
    assert torch.equal(traced(logits, torch.tensor(0.7, device=device)), eager)


@pytest.mark.parametrize(
    "error, change",
    [
        (TypeError, {"logits": [1.0]}),
        (TypeError, {"logits": torch.zeros(3, dtype=torch.int64)}),
        (ValueError, {"logits": torch.zeros(())}),
        (ValueError, {"logits": torch.zeros(3, 0)}),
        (TypeError, {"top_k": 2.5}),
        (TypeError, {"top_k": True}),
        (ValueError, {"top_k": -1}),
        (TypeError, {"top_p": "0.9"}),
        (ValueError, {"top_p": 1.5}),
        (ValueError, {"top_p": math.nan}),
        (TypeError, {"top_k_first": 1}),
        (ValueError, {"temperature": -1.0}),
        (ValueError, {"temperature": torch.ones(4)}),
        (ValueError, {"softcap": 0.0}),
        (ValueError, {"backend": "none"}),
    ],
)
def test_bad_input(error, change):
    arguments = {"logits": torch.zeros(2, 5), "top_k": 2} | change
    with pytest.raises(error, match=next(iter(change))):
        dgemma_accel.top_k_top_p(**arguments)
