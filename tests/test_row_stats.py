"""row_stats: every backend against fp64 truth within the error budget, on odd shapes and poisoned inputs."""

import itertools
import math

import pytest
import torch
from conftest import DEVICES, far_apart
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma_accel
from dgemma_accel.backends import BackendError, load
from dgemma_accel.reference.budget import check_row_stats
from dgemma_accel.reference.philox import WORD_SAMPLE, random_words, uniform_from_word

OP = "row_stats"


def make_logits(rows, vocab, dtype=torch.float32, peak=0.0, scale=3.0, device="cpu"):
    """Noise rows; with `peak`, every other row has one settled token."""
    logits = torch.randn(rows, vocab, device=device) * scale
    if peak:
        index = torch.randint(vocab, (rows,), device=device)
        logits[::2] += torch.nn.functional.one_hot(index, vocab)[::2] * peak
    return logits.to(dtype)


def run(logits, backend, **kwargs):
    uniform = kwargs.pop("uniform", None)
    if uniform is None:
        uniform = torch.rand(logits.shape[:-1], device=logits.device)
    stats = dgemma_accel.row_stats(logits, uniform=uniform, backend=backend, **kwargs)
    return stats, check_row_stats(stats, logits, uniform=uniform, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 31, 257, 4096, 5003])
def test_within_budget(backend, device, dtype, vocab):
    for kwargs in (
        {},
        {"temperature": 0.45, "softcap": 30.0},
        {"temperature": 0.7, "stats_temperature": 1.0},
    ):
        for peak in (0.0, 40.0):
            logits = make_logits(6, vocab, dtype, peak, device=device)
            _, problems = run(logits, backend, **kwargs)
            assert not problems, (kwargs, peak, problems)


@pytest.mark.parametrize("vocab", [20_011, 70_001])
def test_vocabularies_of_many_tiles(backend, device, vocab):
    _, problems = run(
        make_logits(3, vocab, torch.bfloat16, 25.0, device=device), backend, temperature=0.6, softcap=30.0
    )
    assert not problems


def test_shapes_and_views(backend, device):
    wide = make_logits(2 * 7, 600, device=device).view(2, 7, 600)
    for logits in (
        wide[0, 0],
        wide[0],
        wide,
        wide[:, 1:, 3:500],
        wide[:, ::2],
        wide.transpose(0, 1),
        wide[None],
    ):
        stats, problems = run(logits, backend, temperature=0.8)
        assert stats.argmax.shape == logits.shape[:-1]
        assert not problems
    poisoned = torch.full((2, 7, 640), math.nan, device=device)
    poisoned[:, :, 20:620] = wide
    _, problems = run(poisoned[:, :, 20:620], backend)
    assert not problems, "values beside the view leaked in"


def test_rows_may_lie_far_apart(backend, device):
    """Further than 32 bits count elements."""
    # Either way rows are a multiple of 16 elements apart, so that they are cut, and summed, in the same order.
    near = make_logits(2, 5008, torch.bfloat16, device=device)[:, :5003]
    far = far_apart(near, 2**31 + 16)
    settings = {"temperature": 0.7, "softcap": 30.0, "seed": 3, "backend": backend}
    found, expected = (dgemma_accel.row_stats(logits, **settings) for logits in (far, near))
    assert all(torch.equal(left, right) for left, right in zip(found, expected))


def test_temperature_by_row_with_greedy_rows(backend, device):
    logits = make_logits(8, 999, device=device)
    temperature = torch.tensor([0.0, 0.3, 0.0, 1.0, 2.0, 0.0, 0.5, 4.0], device=device)
    stats, problems = run(logits, backend, temperature=temperature)
    assert not problems
    assert torch.equal(stats.sample[temperature == 0], stats.argmax[temperature == 0])
    tensor, _ = run(
        logits, backend, temperature=torch.tensor(0.5), uniform=torch.full((8,), 0.3, device=device)
    )
    number, _ = run(logits, backend, temperature=0.5, uniform=torch.full((8,), 0.3, device=device))
    assert all(torch.equal(a, b) for a, b in zip(tensor, number))
    _, problems = run(logits, backend, temperature=temperature, stats_temperature=temperature + 0.5)
    assert not problems


def test_minus_infinity_and_rows_without_a_distribution(backend, device):
    logits = make_logits(6, 700, device=device)
    logits[0, 3:] = -math.inf
    logits[1, :] = -math.inf
    logits[2, 500] = math.nan
    logits[3, 650] = math.inf
    logits[4, ::2] = -math.inf
    uniform = torch.full((6,), 0.999999, device=device)
    stats, problems = run(logits, backend, uniform=uniform)
    assert not problems
    for row in (1, 2, 3):
        assert stats.argmax[row] == 0 and stats.sample[row] == 0
        assert stats.entropy[row] == math.inf and stats.logsumexp[row].isnan()
        assert stats.top1_prob[row] == stats.top2_prob[row] == stats.sample_prob[row] == 0
    with pytest.raises(ValueError, match="3 rows have no distribution"):
        dgemma_accel.row_stats(logits, uniform=uniform, check=True, backend=backend)


def test_uniform_at_the_ends(backend, device):
    logits = make_logits(4, 300, device=device)
    logits[:, :5] = -math.inf
    logits[:, -5:] = -math.inf
    low, problems = run(logits, backend, uniform=torch.zeros(4, device=device))
    assert not problems and bool((low.sample == 5).all())
    high, problems = run(logits, backend, uniform=torch.full((4,), 1 - 2.0**-24, device=device))
    assert not problems and bool((high.sample < 295).all())


def test_ties_go_to_the_lower_index(backend, device):
    logits = torch.zeros(3, 1000, device=device)
    logits[0, [17, 940]] = 9.0
    logits[1, [999, 998]] = 9.0
    stats, problems = run(logits, backend)
    assert not problems
    assert stats.argmax.tolist() == [17, 998, 0]
    assert torch.equal(stats.top1_prob, stats.top2_prob)


def test_seed_draws_the_documented_uniforms(backend, device):
    logits = make_logits(50, 400, device=device)
    seed, offset = 2**40 + 7, 5
    words = random_words(torch.tensor(seed), torch.tensor(offset), torch.arange(50))
    uniform = uniform_from_word(words[WORD_SAMPLE]).to(device)
    by_seed = dgemma_accel.row_stats(logits, seed=seed, offset=offset, backend=backend)
    by_uniform = dgemma_accel.row_stats(logits, uniform=uniform, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(by_seed, by_uniform))
    in_blocks = dgemma_accel.row_stats(logits.view(5, 10, 400), seed=seed, offset=offset, backend=backend)
    assert torch.equal(in_blocks.sample.flatten(), by_seed.sample)
    other = dgemma_accel.row_stats(logits, seed=seed, offset=offset + 1, backend=backend)
    assert not torch.equal(other.sample, by_seed.sample)
    tensors = dgemma_accel.row_stats(
        logits,
        seed=torch.tensor(seed, device=device),
        offset=torch.tensor(offset, device=device),
        backend=backend,
    )
    assert torch.equal(tensors.sample, by_seed.sample)


@pytest.mark.parametrize(
    "seed, offset", [(2**31, 0), (1, 2**31), (2**32 - 1, 2**32 - 1), (2**63 - 1, 2**63 - 1)]
)
def test_seeds_and_offsets_of_any_size(backend, device, seed, offset):
    logits = make_logits(8, 500, device=device)
    expected = dgemma_accel.row_stats(logits, seed=seed, offset=offset, backend="reference")
    for name in (int, torch.tensor, lambda number: torch.tensor(number, device=device)):
        found = dgemma_accel.row_stats(logits, seed=name(seed), offset=name(offset), backend=backend)
        assert torch.equal(found.sample, expected.sample)


def test_manual_seed_repeats(backend, device):
    logits = make_logits(40, 300, device=device)
    torch.manual_seed(3)
    first = dgemma_accel.row_stats(logits, backend=backend).sample
    second = dgemma_accel.row_stats(logits, backend=backend).sample
    torch.manual_seed(3)
    assert torch.equal(dgemma_accel.row_stats(logits, backend=backend).sample, first)
    assert not torch.equal(first, second)


def test_samples_follow_the_distribution(backend, device):
    # The interpreter takes 15 ms a row.
    rows, vocab = (1000 if backend == "triton" and device == "cpu" else 4000), 12
    logits = make_logits(1, vocab, device=device).repeat(rows, 1)
    stats = dgemma_accel.row_stats(logits, temperature=0.7, seed=1, backend=backend)
    expected = torch.softmax(logits[0] / 0.7, -1).cpu()
    observed = torch.bincount(stats.sample.cpu(), minlength=vocab) / rows
    assert float((observed - expected).abs().max()) < 5 * math.sqrt(0.25 / rows)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(1, 2600),
    temperature=st.sampled_from([0.0, 0.1, 0.8, 3.0]),
    stats_temperature=st.sampled_from([None, 0.5, 1.0]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 2**30),
)
def test_any_case_cpp(rows, vocab, temperature, stats_temperature, softcap, scale, seed):
    implementation, reason = load("row_stats", "cpp")
    assert implementation is not None, reason
    torch.manual_seed(seed)
    logits = make_logits(rows, vocab, scale=scale)
    kwargs = {"temperature": temperature, "stats_temperature": stats_temperature, "softcap": softcap}
    _, problems = run(logits, "cpp", **kwargs)
    assert not problems


def test_budget_fails_zeros_wrong_temperature_and_a_dropped_tile():
    logits = make_logits(8, 8192)
    uniform = torch.rand(8)
    good = dgemma_accel.row_stats(logits, uniform=uniform, temperature=0.8, backend="reference")
    assert not check_row_stats(good, logits, uniform=uniform, temperature=0.8)
    zeros = type(good)(*(torch.zeros_like(field) for field in good))
    assert check_row_stats(zeros, logits, uniform=uniform, temperature=0.8)
    warm = dgemma_accel.row_stats(logits, uniform=uniform, temperature=0.88, backend="reference")
    names = {line.split(":")[0] for line in check_row_stats(warm, logits, uniform=uniform, temperature=0.8)}
    assert {"entropy", "logsumexp", "top1_prob", "sample"} <= names
    dropped = logits.clone()
    dropped[:, 4096:4352] = -math.inf
    tile = dgemma_accel.row_stats(dropped, uniform=uniform, temperature=0.8, backend="reference")
    names = {line.split(":")[0] for line in check_row_stats(tile, logits, uniform=uniform, temperature=0.8)}
    assert {"entropy", "logsumexp", "sample"} <= names
    for field in ("entropy", "logsumexp", "top1_prob", "top2_prob", "sample_prob"):
        one_zero = good._replace(**{field: torch.zeros_like(good.entropy)})
        assert check_row_stats(one_zero, logits, uniform=uniform, temperature=0.8), field
    wrong = good._replace(sample=(good.sample + 1) % 8192)
    assert check_row_stats(wrong, logits, uniform=uniform, temperature=0.8)


def without_left_out(logits, cutoff, softcap):
    """The softcapped logits in fp64, with -inf for those below the cutoff [...]: the truth, for `check_row_stats`."""
    x = logits.double()
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    return x.masked_fill(logits.double() < cutoff[..., None].double(), -math.inf)


def run_with_cutoff(logits, cutoff, backend, softcap=None, **kwargs):
    if "uniform" not in kwargs:
        kwargs["uniform"] = torch.rand(logits.shape[:-1], device=logits.device)
    stats = dgemma_accel.row_stats(logits, cutoff=cutoff, softcap=softcap, backend=backend, **kwargs)
    return stats, check_row_stats(stats, without_left_out(logits, cutoff, softcap), **kwargs)


def largest(logits, k):
    """Each row's k-th largest logit as a cutoff, which ties with it pass."""
    return logits.float().topk(k, dim=-1).values[..., -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 257, 4096, 5003])
def test_cutoff_within_budget(backend, device, dtype, vocab):
    for kwargs in (
        {},
        {"temperature": 0.45, "softcap": 30.0},
        {"temperature": 0.0, "softcap": 8.0},
        {"temperature": 0.7, "stats_temperature": 1.0, "softcap": 5.0},
    ):
        logits = make_logits(6, vocab, dtype, device=device)
        cutoff = torch.stack(
            [largest(row, min(k, vocab)) for row, k in zip(logits, (1, 2, 5, 50, 300, vocab))]
        )
        _, problems = run_with_cutoff(logits, cutoff, backend, **kwargs)
        assert not problems, (kwargs, problems)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_cutoffs_of_every_kind(backend, device, softcap):
    logits = make_logits(10, 700, device=device)
    logits[:, 650] = 14.0
    logits[3, [40, 41, 640]] = 14.0
    logits[5, 33] = math.nan
    logits[6, ::2] = -math.inf
    logits[7] = -math.inf
    logits[8, 699] = math.inf
    cutoff = [-math.inf, math.nan, 14.5, 14.0, logits[4, 17].item(), 3.0, -1e30, -3.0, 3.0, math.inf]
    cutoff = torch.tensor(cutoff, device=device)
    for temperature, statistics in itertools.product((0.0, 0.8), (True, False)):
        kwargs = {"temperature": temperature, "uniform": torch.full((10,), 0.999999, device=device)}
        if statistics:
            stats, problems = run_with_cutoff(logits, cutoff, backend, softcap, **kwargs)
            assert not problems
            assert stats.argmax[3] == 40 and stats.top1_prob[3] == stats.top2_prob[3]
        else:
            stats = dgemma_accel.row_stats(
                logits, cutoff=cutoff, softcap=softcap, statistics=False, backend=backend, **kwargs
            )
            alike = dgemma_accel.row_stats(logits, cutoff=cutoff, softcap=softcap, backend=backend, **kwargs)
            assert torch.equal(stats.argmax, alike.argmax) and torch.equal(stats.sample, alike.sample)
        # Above all logits, NaN, only -inf, and +inf, which a softcap makes an ordinary logit.
        without = [2, 5, 7, 9] if softcap else [2, 5, 7, 8, 9]
        assert stats.entropy.isinf().nonzero()[:, 0].tolist() == without
        for row in without:
            assert stats.argmax[row] == 0 and stats.sample[row] == 0
            if statistics:
                assert stats.logsumexp[row].isnan()
                assert stats.top1_prob[row] == stats.top2_prob[row] == stats.sample_prob[row] == 0
    with pytest.raises(ValueError, match=f"{len(without)} rows have no distribution"):
        dgemma_accel.row_stats(logits, cutoff=cutoff, softcap=softcap, check=True, backend=backend)


@pytest.mark.parametrize("softcap", [None, 4.0, 20.0, 60.0])
def test_cutoff_in_rows_of_many_tiles(backend, device, softcap):
    """Tiles that are left out as a whole, one of which holds a NaN, in each formula of a tile's exponents."""
    for dtype in (torch.bfloat16, torch.float32):
        logits = make_logits(4, 20_011, dtype, scale=1.0, device=device)
        logits[:, 9000:9003] = torch.tensor([12.0, 13.5, 13.0], dtype=dtype)
        logits[3, 17_000] = math.nan
        cutoff = torch.tensor([13.0, 13.5, 3.0, 13.0], device=device)
        stats, problems = run_with_cutoff(logits, cutoff, backend, softcap, temperature=2.0)
        assert not problems
        assert stats.argmax.tolist() == [9001, 9001, 9001, 0] and stats.entropy[3] == math.inf
        assert stats.top1_prob[1] == 1 and stats.top2_prob[1] == 0 and stats.entropy[1] == 0


def test_cutoff_of_views_and_rows_by_temperature(backend, device):
    wide = make_logits(2 * 7, 640, device=device).view(2, 7, 640)
    wide[:, :, :3], wide[:, :, 603:] = 50.0, math.nan
    for logits in (
        wide[0, 0, 3:603],
        wide[:, 1:, 3:600],
        wide[:, ::2, 3:603],
        wide.transpose(0, 1)[..., 3:603],
    ):
        shape = logits.shape[:-1]
        cutoffs = torch.full((*shape, 2), math.nan, device=device)
        cutoffs[..., 0] = largest(logits, 20)
        temperature = torch.rand(shape, device=device) * (torch.rand(shape, device=device) < 0.7)
        for kwargs in (
            {"temperature": 1.3},
            {"temperature": temperature, "stats_temperature": temperature + 0.5},
        ):
            stats, problems = run_with_cutoff(logits, cutoffs[..., 0], backend, 30.0, **kwargs)
            assert stats.argmax.shape == shape and not problems
    _, problems = run_with_cutoff(wide[:, :, 3:603], largest(wide[:1, :1, 3:603], 9).expand(2, 7), backend)
    assert not problems


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [0.5, 1e3, 3e38])
def test_what_is_left_out_is_never_drawn(backend, device, softcap, temperature):
    logits = make_logits(1, 4500, torch.bfloat16, device=device).repeat(48, 1)
    logits[:, [0, 4499]] = -20.0
    uniform = torch.linspace(0, 1 - 2.0**-24, 48, device=device)
    for stats_temperature in (None, 1.0):
        stats = dgemma_accel.row_stats(
            logits, temperature=temperature, stats_temperature=stats_temperature, softcap=softcap,
            cutoff=largest(logits, 40), uniform=uniform, backend=backend,
        )  # fmt: skip
        drawn = logits.gather(-1, stats.sample[:, None])[:, 0]
        assert bool((drawn >= largest(logits, 40)).all()) and bool((stats.sample_prob > 0).all())
        # In vocabulary order, so each of the forty that has mass comes at its share of the uniforms.
        assert bool((stats.sample.diff() >= 0).all())
        assert temperature < 1 or len(stats.sample.unique()) > 30


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(1, 9000),
    temperature=st.sampled_from([0.0, 0.1, 0.8, 3.0]),
    stats_temperature=st.sampled_from([None, 0.5, 1.0]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    cutoff=st.sampled_from([-math.inf, -1.0, 0.0, 2.0, 40.0]),
    seed=st.integers(0, 2**30),
)
def test_any_case_cpp_with_cutoff(rows, vocab, temperature, stats_temperature, softcap, scale, cutoff, seed):
    torch.manual_seed(seed)
    logits = make_logits(rows, vocab, scale=scale)
    kwargs = {"temperature": temperature, "stats_temperature": stats_temperature, "softcap": softcap}
    _, problems = run_with_cutoff(logits, cutoff + torch.rand(rows), "cpp", **kwargs)
    assert not problems


def test_the_truth_fails_other_cutoffs():
    logits, uniform = make_logits(8, 500), torch.rand(8)
    cutoff = largest(logits, 10)
    for softcap in (None, 30.0):
        truth = without_left_out(logits, cutoff, softcap)
        for other, problems in (
            (None, True),
            (largest(logits, 11), True),
            (largest(logits, 9), True),
            (cutoff, False),
        ):
            stats = dgemma_accel.row_stats(
                logits, cutoff=other, softcap=softcap, uniform=uniform, backend="reference"
            )
            assert bool(check_row_stats(stats, truth, uniform=uniform)) == problems


LOGITS = torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    "kwargs, error, text",
    [
        ({"logits": [1.0]}, TypeError, "logits: a torch.Tensor expected, got list"),
        ({"logits": torch.zeros(3, dtype=torch.int64)}, TypeError, "logits: dtype must be one of"),
        ({"logits": torch.tensor(1.0)}, ValueError, "logits: shape must be"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "logits: the vocabulary must not be empty"),
        ({"temperature": -0.1}, ValueError, "temperature: must be finite and in .* got -0.1"),
        ({"temperature": math.nan}, ValueError, "temperature: must be finite"),
        ({"temperature": math.inf}, ValueError, "temperature: must be finite"),
        ({"temperature": "hot"}, TypeError, "temperature: a number or a tensor expected, got str"),
        ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature: values must be in"),
        ({"temperature": torch.full((2, 3), math.nan)}, ValueError, "temperature: values must be in"),
        (
            {"temperature": torch.ones(3)},
            ValueError,
            r"temperature: a number, a 0-d tensor or shape \(2, 3\)",
        ),
        ({"stats_temperature": 0.0}, ValueError, "stats_temperature: must be finite"),
        ({"stats_temperature": torch.zeros(2, 3)}, ValueError, "stats_temperature: values must be in"),
        ({"softcap": 0}, ValueError, r"softcap: must be finite and in \[1e-30, 1e\+30\], got 0"),
        ({"softcap": -3.0}, ValueError, "softcap: must be finite and in"),
        ({"softcap": 1e-31}, ValueError, "softcap: must be finite and in"),
        ({"softcap": 3e38}, ValueError, "softcap: must be finite and in"),
        ({"uniform": torch.rand(2)}, ValueError, r"uniform: shape must be \(2, 3\)"),
        ({"uniform": torch.rand(2, 3).double()}, TypeError, "uniform: dtype"),
        ({"uniform": torch.ones(2, 3)}, ValueError, r"uniform: values must be in \[0.0, 1.0\)"),
        ({"uniform": torch.rand(2, 3, device="meta")}, ValueError, "uniform: must be on cpu"),
        ({"cutoff": 0.5}, TypeError, "cutoff: a torch.Tensor expected, got float"),
        (
            {"cutoff": torch.zeros(2, 3).double()},
            TypeError,
            "cutoff: dtype must be one of float32, got float64",
        ),
        ({"cutoff": torch.zeros(3)}, ValueError, r"cutoff: shape must be \(2, 3\) \(one value per row\)"),
        ({"cutoff": torch.zeros(2, 3, device="meta")}, ValueError, "cutoff: must be on cpu like the input"),
        ({"seed": -1}, ValueError, "seed: must be in"),
        ({"seed": 0.5}, TypeError, "seed: an int or a 0-d int64 tensor"),
        ({"seed": torch.tensor([1])}, ValueError, "seed: shape must be"),
        ({"offset": torch.tensor(1.0)}, TypeError, "offset: dtype"),
        ({"backend": "fast"}, ValueError, "backend: must be one of"),
        ({"backend": "cuda"}, BackendError, "row_stats: backend 'cuda' cannot run this call"),
    ],
)
def test_bad_input(kwargs, error, text):
    if kwargs.get("backend") == "cuda" and DEVICES["cuda"] == "cpu":
        pytest.skip("these kernels take CPU tensors")
    if kwargs.get("backend") == "cuda" and torch.cuda.is_available():
        text = "device: required cpu, supported"
    arguments = {"logits": LOGITS, "backend": "reference", **kwargs}
    with pytest.raises(error, match=text):
        dgemma_accel.row_stats(arguments.pop("logits"), **arguments)


def test_opcheck(backend, device):
    logits = make_logits(6, 50, device=device).view(2, 3, 50)
    arguments = (
        logits,
        torch.tensor(0.5),
        None,
        None,
        torch.tensor(1),
        torch.tensor(0),
        30.0,
        False,
        backend,
    )
    torch.library.opcheck(torch.ops.dgemma.row_stats.default, arguments)
    torch.library.opcheck(
        torch.ops.dgemma.row_stats.default, (*arguments, True, largest(logits, 3).flatten())
    )


def test_compile_fullgraph(backend, device):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def entropy(logits, temperature):
        return (
            dgemma_accel.row_stats(logits * 2, temperature=temperature, seed=1, backend=backend).entropy + 1
        )

    logits = make_logits(4, 60, device=device)
    expected = dgemma_accel.row_stats(logits * 2, temperature=0.5, seed=1, backend=backend).entropy + 1
    assert torch.equal(entropy(logits, torch.tensor(0.5, device=device)), expected)


def test_compile_fullgraph_with_cutoff(backend, device):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def prob(logits):
        cutoff = (logits * 2).topk(3).values[..., -1]
        return dgemma_accel.row_stats(logits * 2, cutoff=cutoff, seed=1, backend=backend).top1_prob + 1

    logits = make_logits(6, 60, device=device).view(2, 3, 60)
    for some in (logits, logits[:1]):
        cutoff = largest(some * 2, 3)
        expected = dgemma_accel.row_stats(some * 2, cutoff=cutoff, seed=1, backend=backend).top1_prob + 1
        assert torch.equal(prob(some), expected)


def test_environment_names_the_backend(monkeypatch):
    monkeypatch.setenv("DGEMMA_ACCEL_BACKEND", "cuda" if not torch.cuda.is_available() else "nothing")
    with pytest.raises((BackendError, ValueError)):
        dgemma_accel.row_stats(LOGITS)
    monkeypatch.setenv("DGEMMA_ACCEL_BACKEND", "reference")
    assert dgemma_accel.row_stats(LOGITS).argmax.shape == (2, 3)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_infinite_entropy_is_a_row_without_a_distribution(temperature, backend, device):
    logits = torch.randn(2, 4, 300)
    logits[0, 1] = -math.inf
    logits[0, 2, 299] = math.nan
    logits[1, 3, 7] = math.inf
    for statistics in (True, False):
        stats = dgemma_accel.row_stats(
            logits.to(device), temperature=temperature, seed=1, statistics=statistics, backend=backend
        )
        assert stats.entropy.isinf().nonzero().tolist() == [[0, 1], [0, 2], [1, 3]]


@pytest.mark.parametrize("temperature", [1e20, 1e30, 3e38])
def test_what_is_ruled_out_takes_no_mass_at_any_temperature(backend, device, temperature):
    """A difference of minus infinity is none however it is scaled from one temperature to the other."""
    logits, uniform = torch.randn(64, 31, device=device), torch.rand(64, device=device)
    logits[torch.rand(64, 31, device=device) < 0.3] = -math.inf
    logits[:, 3] = 0.0
    for stats_temperature in (1.0, 1e-6):
        kwargs = {"temperature": temperature, "stats_temperature": stats_temperature, "uniform": uniform}
        ours, reference = (
            dgemma_accel.row_stats(logits, backend=name, **kwargs) for name in (backend, "reference")
        )
        assert torch.equal(ours.sample, reference.sample)


@pytest.mark.parametrize("temperature", [1e-4, 1e-6, 1e-8, 1e-30])
def test_tied_tokens_share_the_mass_at_any_temperature(backend, device, temperature):
    """What a row's numbers divided by the temperature cannot tell apart, their differences do."""
    logits = torch.randn(4, 300, device=device)
    logits[:, [7, 150]] = 8.0
    stats = dgemma_accel.row_stats(logits, temperature=temperature, seed=3, backend=backend)
    half = torch.full((4,), 0.5, device=device)
    for probability in (stats.top1_prob, stats.top2_prob, stats.sample_prob):
        torch.testing.assert_close(probability, half)
    torch.testing.assert_close(stats.entropy, torch.full_like(half, math.log(2)))


@pytest.mark.parametrize("softcap", [1e-6, 30.0, 1e6])
@pytest.mark.parametrize("largest", [0.3, 0.8, 5.0])
def test_softcap_of_logits_of_every_size(backend, device, softcap, largest):
    """The formula of a tile's exponents: below half of the softcap, below it, beyond it, and where it is extreme."""
    for dtype in (torch.float32, torch.bfloat16):
        logits = ((torch.rand(2, 8200, device=device) * 2 - 1) * largest * softcap).to(dtype)
        _, problems = run(
            logits, backend, temperature=softcap / 50, stats_temperature=softcap / 40, softcap=softcap
        )
        assert not problems


@pytest.mark.parametrize("softcap", [1e-30, 1e30])
def test_softcaps_at_the_ends_of_their_range(backend, device, softcap):
    for temperature in (1e-3, 1.0, 1e3):
        logits = make_logits(2, 300, device=device)
        _, problems = run(logits, backend, temperature=temperature, softcap=softcap)
        assert not problems, temperature


# The last coefficient of a polynomial below the softcap may have its twelfth power; 1e30 / 1e-9 is no fp32 number.
@pytest.mark.parametrize("softcap", [0.01, 300.0, 3e3, 3e4, 1e30])
def test_softcaps_of_any_size(backend, device, softcap):
    for share, temperature in itertools.product((0.4, 0.9), (1.0, softcap / 50, 1e-9)):
        logits = (torch.rand(2, 8192, device=device) * 2 - 1) * share * min(softcap, 1e20)
        _, problems = run(logits, backend, temperature=temperature, softcap=softcap)
        assert not problems, (share, temperature)


def test_a_softcap_makes_infinities_finite(backend, device):
    logits = torch.tensor([[0.0, -math.inf, 1.0], [0.0, math.inf, 1.0]], device=device)
    uniform = torch.tensor([0.5, 0.5], device=device)
    ours, capped = (
        dgemma_accel.row_stats(x, softcap=2.0, uniform=uniform, backend=backend)
        for x in (logits, logits.clamp(-1e4, 1e4))
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, capped)) and ours.entropy.isfinite().all()
    # A token that logits of -inf rule out is not ruled out any more.
    low = dgemma_accel.row_stats(
        logits[:1], softcap=2.0, uniform=torch.tensor([0.29], device=device), backend=backend
    )
    assert low.sample.tolist() == [1]
