"""head_stats: the product against PyTorch's, its statistics against fp64 truth of the logits it returned."""

import math

import pytest
import torch
from conftest import far_apart

import dgemma_accel
from dgemma_accel.reference.budget import check_row_stats
from dgemma_accel.reference.row_stats import row_uniform

OP = "head_stats"


def run(hidden, weight, backend, **settings):
    uniform = torch.rand(hidden.shape[:-1], device=hidden.device)
    logits, stats = dgemma_accel.head_stats(hidden, weight, uniform=uniform, backend=backend, **settings)
    return logits, stats, check_row_stats(stats, logits, uniform=uniform, **settings)


def check_logits(logits, hidden, weight):
    """Error against fp64 at most twice that of PyTorch's product, plus one spacing."""
    truth = hidden.double() @ weight.double().T
    plain = torch.nn.functional.linear(hidden, weight).double()
    spacing = torch.finfo(hidden.dtype).eps
    error, allowed = (logits.double() - truth).abs(), 2 * (plain - truth).abs().max() + spacing * truth.abs()
    return bool((error <= allowed).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape, vocab", [((1, 32), 5), ((5, 96), 700), ((2, 9, 64), 2050), ((3, 64), 9001)])
def test_within_budget(backend, device, dtype, shape, vocab):
    hidden = torch.randn(shape, device=device).to(dtype)
    weight = (torch.randn(vocab, shape[-1], device=device) * 0.5).to(dtype)
    for settings in ({}, {"softcap": 30.0, "temperature": 0.5}, {"temperature": 0.0}):
        logits, stats, problems = run(hidden, weight, backend, **settings)
        assert (
            logits.dtype == dtype
            and logits.shape == (*shape[:-1], vocab)
            and stats.sample.shape == shape[:-1]
        )
        assert check_logits(logits, hidden, weight)
        assert not problems, settings
    assert not check_logits(torch.zeros_like(logits), hidden, weight)


def test_equals_product_then_row_stats(backend, device):
    hidden, weight = torch.randn(2, 6, 48, device=device), torch.randn(300, 48, device=device)
    settings = {"softcap": 20.0, "temperature": 0.6, "stats_temperature": 1.0, "seed": 4, "offset": 9}
    logits, stats = dgemma_accel.head_stats(hidden, weight, backend=backend, **settings)
    expected = dgemma_accel.row_stats(logits, backend="reference", **settings)
    assert torch.equal(stats.sample, expected.sample) and torch.equal(stats.argmax, expected.argmax)


# At the last of them softcap / temperature is no fp32 number.
@pytest.mark.parametrize("softcap, temperature", [(300.0, 6.0), (3e4, 600.0), (1e30, 1.0), (1e30, 1e-9)])
def test_softcaps_of_any_size(backend, device, softcap, temperature):
    hidden, weight = torch.randn(3, 16, device=device), torch.randn(700, 16, device=device)
    hidden *= min(softcap, 1e4) / 16
    uniform = torch.rand(3, device=device)
    settings = {"softcap": softcap, "temperature": temperature, "uniform": uniform}
    logits, stats = dgemma_accel.head_stats(hidden, weight, backend=backend, **settings)
    assert not check_row_stats(stats, logits, **settings)
    _, stats = dgemma_accel.head_stats(hidden, weight, keep_logits=False, backend=backend, **settings)
    assert not check_row_stats(stats, logits, **settings)


def test_rows_without_a_distribution(backend, device):
    hidden, weight = torch.randn(3, 16, device=device), torch.randn(40, 16, device=device)
    hidden[1, 2] = math.nan
    _, stats = dgemma_accel.head_stats(hidden, weight, seed=0, backend=backend)
    assert stats.logsumexp.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="1 rows have no distribution"):
        dgemma_accel.head_stats(hidden, weight, seed=0, check=True, backend=backend)


@pytest.mark.parametrize("far", ["hidden", "weight"])
def test_rows_may_lie_far_apart(backend, device, far):
    """Further than 32 bits count elements, as the last positions of a batch of hidden states may."""
    near = {
        "hidden": torch.randn(2, 48, device=device).bfloat16(),
        "weight": torch.randn(3, 48, device=device).bfloat16(),
    }
    wide = near | {far: far_apart(near[far], 2**31 + 16 if far == "hidden" else 2**30 + 16)}
    for keep_logits in (True, False):
        settings = {"softcap": 30.0, "seed": 3, "keep_logits": keep_logits, "backend": backend}
        (logits, stats), (expected, wanted) = (
            dgemma_accel.head_stats(**tensors, **settings) for tensors in (wide, near)
        )
        assert all(torch.equal(a, b) for a, b in zip(stats, wanted))
        assert not keep_logits or torch.equal(logits, expected)


@pytest.mark.parametrize("stats_temperature", [None, 1.0])
def test_without_logits(monkeypatch, stats_temperature):
    from dgemma_accel.native import head_stats_sliced

    monkeypatch.setattr(head_stats_sliced, "SLICE", 70)
    hidden, weight = torch.randn(3, 8, 32), torch.randn(501, 32)
    temperature = torch.linspace(0, 2, 24).reshape(3, 8)
    settings = {
        "softcap": 20.0,
        "temperature": temperature,
        "stats_temperature": stats_temperature,
        "seed": 7,
    }
    logits, stats = dgemma_accel.head_stats(
        hidden, weight, keep_logits=False, backend="reference", **settings
    )
    assert logits is None
    kept, expected = dgemma_accel.head_stats(hidden, weight, backend="reference", **settings)
    assert torch.equal(stats.sample, expected.sample) and torch.equal(stats.argmax, expected.argmax)
    uniform = row_uniform(None, torch.tensor(7), torch.tensor(0), 24, "cpu").reshape(3, 8)
    del settings["seed"]
    assert not check_row_stats(stats, kept, uniform=uniform, **settings)
    greedy = temperature == 0
    assert torch.equal(stats.sample[greedy], stats.argmax[greedy])


@pytest.mark.parametrize("softcap", [None, 100.0])
def test_low_temperatures_without_logits(backend, device, softcap):
    """Logits that are computed again for the sample may come out otherwise in their last place."""
    hidden, weight = torch.randn(32, 192, device=device), torch.randn(1000, 192, device=device)
    for temperature in (1e-5, 1e-7, 1e-9):
        settings = {"temperature": temperature, "softcap": softcap, "seed": 5, "keep_logits": False}
        _, stats = dgemma_accel.head_stats(hidden, weight, backend=backend, **settings)
        settled = stats.top1_prob == 1
        assert settled.sum() > 24
        assert torch.equal(stats.sample[settled], stats.argmax[settled])
        assert torch.equal(stats.sample_prob[settled], stats.top1_prob[settled])


HIDDEN, WEIGHT = torch.zeros(2, 4), torch.zeros(7, 4)


@pytest.mark.parametrize(
    "arguments, kwargs, error, text",
    [
        ((HIDDEN.long(), WEIGHT), {}, TypeError, "hidden: dtype must be one of"),
        (
            (HIDDEN, WEIGHT[:, :3]),
            {},
            ValueError,
            r"weight: shape must be \[V, 4\] like hidden, got \(7, 3\)",
        ),
        ((HIDDEN, WEIGHT[:0]), {}, ValueError, r"weight: shape must be \[V, E\] with V >= 1"),
        ((HIDDEN, WEIGHT.half()), {}, TypeError, "weight: dtype must be one of float32, got float16"),
        ((HIDDEN, WEIGHT.to("meta")), {}, ValueError, "weight: must be on cpu like hidden, got meta"),
        ((HIDDEN, WEIGHT), {"softcap": 0.0}, ValueError, "softcap: must be finite and in"),
        ((HIDDEN, WEIGHT), {"temperature": -1}, ValueError, "temperature: must be finite"),
        ((HIDDEN, WEIGHT), {"uniform": torch.rand(3)}, ValueError, r"uniform: shape must be \(2,\)"),
    ],
)
def test_bad_input(arguments, kwargs, error, text):
    with pytest.raises(error, match=text):
        dgemma_accel.head_stats(*arguments, **kwargs, backend="reference")


def test_opcheck(backend, device):
    hidden, weight = torch.randn(2, 3, 16, device=device), torch.randn(50, 16, device=device)
    arguments = (
        hidden,
        weight,
        torch.tensor(0.5),
        None,
        None,
        torch.tensor(1),
        torch.tensor(0),
        30.0,
        True,
        False,
        backend,
    )
    torch.library.opcheck(torch.ops.dgemma.head_stats.default, arguments)


@pytest.mark.parametrize("level", [-2.5, -1.369, -0.01])
def test_nearly_constant_rows_in_slices_are_within_budget(level):
    """Sums of many equal terms: what is left over is the rounding of the results themselves."""
    weight, hidden, uniform = torch.full((40_000, 1), level), torch.ones(2, 1), torch.full((2,), 0.5)
    weight[7], hidden[1] = 0.0, 1.001
    for settings in ({}, {"temperature": 3.0}, {"temperature": 0.7, "stats_temperature": 1.0}):
        for backend in ("reference", "cpp"):
            _, stats = dgemma_accel.head_stats(
                hidden, weight, keep_logits=False, uniform=uniform, backend=backend, **settings
            )
            assert not check_row_stats(stats, hidden @ weight.T, uniform=uniform, **settings), backend
