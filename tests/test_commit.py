"""commit: every backend equals the reference, the reference obeys each rule's definition."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma_accel
from dgemma_accel import RowStats
from dgemma_accel.reference.philox import WORD_SELECT, below, random_words, uniform_from_word
from dgemma_accel.samplers import (
    Bernoulli,
    CanvasState,
    Edit,
    EntropyBound,
    EntropyThreshold,
    Factor,
    Keep,
    Margin,
    Measure,
    Random,
    Remask,
    Renoise,
    RunBest,
    Sequential,
    StableAndConfident,
    Threshold,
    TopK,
)

OP = "commit"
VOCAB, MASK = 50, 7

RULES = {
    "top_k": TopK(3),
    "top_k_0": TopK(0),
    "top_k_all": TopK(10_000),
    "top_k_top1": TopK(4, measure=Measure.TOP1_PROB),
    "top_k_entropy": TopK(4, measure=Measure.ENTROPY),
    "top_k_gumbel": TopK(3, gumbel_temperature=0.3),
    "top_k_gumbel_margin": TopK(3, measure=Measure.MARGIN, gumbel_temperature=1.5),
    "random": Random(4),
    "margin": Margin(2),
    "sequential": Sequential(3),
    "threshold": Threshold(0.6),
    "threshold_none": Threshold(1.0, min_count=0),
    "threshold_strict": Threshold(0.5, strict=True),
    "threshold_slack": Threshold(0.9, slack=1e-5),
    "threshold_min_count": Threshold(0.8, min_count=3, strict=True),
    "factor": Factor(1.0),
    "factor_quirk": Factor(0.5, last_rank_quirk=True),
    "entropy_bound": EntropyBound(0.7),
    "entropy_bound_0": EntropyBound(0.0),
    "entropy_bound_inclusive": EntropyBound(0.7, inclusive=True),
    "entropy_threshold": EntropyThreshold(0.7),
    "entropy_threshold_none": EntropyThreshold(0.0, min_count=0),
    "bernoulli": Bernoulli(0.4),
    "run_best": RunBest(0.9, low=0.4),
    "edit": Edit(0.7, 0.5, mask_id=MASK),
}
WRITES = {"remask": Remask(MASK), "renoise": Renoise(VOCAB), "keep": Keep()}


def make_stats(batch, length, device="cpu", levels=None):
    """Random statistics; with `levels`, quantised so that exact ties abound."""
    top = torch.rand(batch, length)
    second = top * torch.rand(batch, length)
    entropy = -torch.log(top.clamp_min(1e-3))
    prob = torch.where(torch.rand(batch, length) < 0.7, top, second)
    if levels:
        top, second, entropy, prob = (torch.round(x * levels) / levels for x in (top, second, entropy, prob))
    tokens = torch.randint(VOCAB, (2, batch, length))
    lse = torch.zeros(batch, length)
    fields = (tokens[0], tokens[1], entropy, lse, top, second, prob)
    return RowStats(*(field.to(device) for field in fields))


def make_tokens(batch, length, device="cpu"):
    tokens = torch.randint(VOCAB, (batch, length))
    return torch.where(torch.rand(batch, length) < 0.5, MASK, tokens).to(device)


def fields(result):
    state = result.state
    extra = () if state is None else (state.draft, state.history, state.finished)
    return (result.tokens, result.committed, result.num_committed, *extra)


def on_cpu(rule):
    """The rule with its numbers by row on the CPU."""
    numbers = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    return dataclasses.replace(
        rule, **{k: v.cpu() for k, v in numbers.items() if isinstance(v, torch.Tensor)}
    )


def assert_equals_reference(backend, tokens, stats, rule, write, **kwargs):
    to_cpu = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    state = kwargs.get("state")
    if state is not None:
        to_cpu["state"] = CanvasState(state.draft.cpu(), state.history.cpu(), state.finished.cpu())
    stats_cpu = RowStats(*(field.cpu() for field in stats))
    expected = dgemma_accel.commit(
        tokens.cpu(), stats_cpu, on_cpu(rule), write, **to_cpu, backend="reference"
    )
    result = dgemma_accel.commit(tokens, stats, rule, write, **kwargs, backend=backend)
    for name, a, b in zip(
        ("tokens", "committed", "num", "draft", "history", "finished"), fields(result), fields(expected)
    ):
        assert torch.equal(a.cpu(), b), f"{name} differs for {rule} {write}"
    return result


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_equals_reference(backend, device, rule):
    for (batch, length), write, levels in itertools.product(
        ((1, 1), (3, 17), (2, 64)), WRITES.values(), (None, 8)
    ):
        tokens, stats = make_tokens(batch, length, device), make_stats(batch, length, device, levels)
        candidates = torch.rand(batch, length, device=device) < 0.6
        assert_equals_reference(backend, tokens, stats, rule, write, candidates=candidates, seed=5, offset=2)
        if length == 17:
            assert_equals_reference(backend, tokens, stats, rule, write, seed=2**45 + 3)


@pytest.mark.parametrize("length", [255, 256, 257, 1000, 1024])
def test_long_canvases(backend, device, length):
    tokens, stats = make_tokens(2, length, device), make_stats(2, length, device, 50)
    for rule in (EntropyBound(5.0), TopK(100), Factor(20.0), RunBest(0.9), Threshold(0.99, min_count=10)):
        assert_equals_reference(backend, tokens, stats, rule, Renoise(262_144), seed=1)


def test_numbers_by_row(backend, device):
    tokens, stats = make_tokens(4, 24, device), make_stats(4, 24, device, 10)
    k = torch.tensor([0, 3, 24, 1000], device=device)
    value = torch.tensor([0.0, 0.3, 0.7, 1.0], device=device)
    for rule in (
        TopK(k),
        Random(k),
        Threshold(value),
        Threshold(value, min_count=k),
        Factor(value),
        EntropyBound(value),
        Bernoulli(value),
        RunBest(value, low=value * 0.5, min_count=k),
        Edit(value, value, mask_id=MASK),
        TopK(k, gumbel_temperature=value + 0.1),
    ):
        assert_equals_reference(backend, tokens, stats, rule, Remask(MASK), seed=4)
        scalars = [getattr(rule, name) for name in rule.__dataclass_fields__]
        assert any(isinstance(s, torch.Tensor) for s in scalars)
    scalar = TopK(torch.tensor(3, device=device))
    assert int(assert_equals_reference(backend, tokens, stats, scalar, Keep()).num_committed[0]) == 3


@pytest.mark.parametrize("stability", [0, 1, 3])
def test_stop_and_frozen_rows(backend, device, stability):
    stop = StableAndConfident(stability, 0.5)
    canvas = make_tokens(5, 12, device)
    state = CanvasState.start(canvas, stop)
    stats = make_stats(5, 12, device)
    stats = stats._replace(
        entropy=stats.entropy * torch.tensor([[0.0], [0.1], [9.0], [0.01], [0.2]], device=device)
    )
    seen = []
    for step in range(8):
        argmax = stats.argmax.clone()
        if step < 3:
            argmax[1, step] = (argmax[1, step] + 1) % VOCAB
        before = canvas
        finished_before = state.finished
        result = assert_equals_reference(
            backend,
            canvas,
            stats._replace(argmax=argmax),
            EntropyBound(0.3),
            Renoise(VOCAB),
            seed=9,
            offset=step,
            state=state,
            stop=stop,
        )
        canvas, state = result.tokens, result.state
        frozen = finished_before.cpu()
        assert torch.equal(canvas.cpu()[frozen], before.cpu()[frozen])
        assert not result.committed.cpu()[frozen].any()
        seen.append(state.finished.tolist())
    assert [s[0] for s in seen].index(True) == stability
    assert not any(s[2] for s in seen)
    assert seen[-1][1]


def test_state_without_stop_never_finishes(backend, device):
    canvas = make_tokens(2, 8, device)
    stats = make_stats(2, 8, device)._replace(entropy=torch.zeros(2, 8, device=device))
    state = CanvasState.start(canvas)
    for _ in range(3):
        result = assert_equals_reference(backend, canvas, stats, TopK(1), Keep(), state=state)
        state = result.state
    assert not state.finished.any() and torch.equal(state.draft, stats.argmax)


@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (0, 0)])
def test_no_positions(backend, device, shape):
    """A row without positions commits nothing, and stays as finished as it was."""
    stop, tokens = StableAndConfident(2), torch.zeros(shape, dtype=torch.int64, device=device)
    state = CanvasState.start(tokens, stop)
    state.finished[:1] = True
    for rule in RULES.values():
        result = assert_equals_reference(
            backend, tokens, make_stats(*shape, device), rule, Renoise(VOCAB), seed=1, state=state, stop=stop
        )
        assert torch.equal(result.state.finished, state.finished) and not result.num_committed.any()


def test_invalid_rows_of_row_stats_are_last(backend, device):
    stats = make_stats(1, 6, device)
    stats.entropy[0, :3] = math.inf
    stats.sample_prob[0, :3] = 0
    tokens = make_tokens(1, 6, device)
    for rule in (EntropyBound(1e9), TopK(3), EntropyBound(1e9, inclusive=True)):
        result = assert_equals_reference(backend, tokens, stats, rule, Keep())
        assert result.committed[0, 3:].all()
    first = assert_equals_reference(backend, tokens, stats, TopK(3), Keep())
    assert not first.committed[0, :3].any()


@pytest.mark.parametrize("bad", [[2], [0, 5], [1, 2, 9], list(range(12))])
def test_a_factor_stops_at_a_score_of_nan(backend, device, bad):
    """NaN ranks first and holds no bar, so that from the second one on it ends the run of ranks."""
    tokens, stats = torch.zeros(1, 12, dtype=torch.int64, device=device), make_stats(1, 12, device)
    stats.sample_prob[0, bad] = math.nan
    result = dgemma_accel.commit(tokens, stats, Factor(20.0), Keep(), backend=backend)
    expected = dgemma_accel.commit(tokens, stats, Factor(20.0), Keep(), backend="reference")
    assert torch.equal(result.committed, expected.committed)
    assert (expected.num_committed.item() == 1) == (len(bad) > 1)


def test_no_candidates_and_views(backend, device):
    tokens, stats = make_tokens(3, 9, device), make_stats(3, 9, device)
    nobody = torch.zeros(3, 9, dtype=torch.bool, device=device)
    for rule in RULES.values():
        result = assert_equals_reference(
            backend, tokens, stats, rule, Remask(MASK), candidates=nobody, seed=1
        )
        assert torch.equal(result.tokens, tokens) and not result.num_committed.any()
    wide_stats = make_stats(6, 9, device)
    strided = RowStats(*(field[::2] for field in wide_stats))
    wide = make_tokens(9, 6, device)
    assert_equals_reference(backend, wide.T[:3, :], RowStats(*(f[:, :9] for f in strided)), TopK(2), Keep())


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    rule=st.sampled_from(list(RULES.values())),
    write=st.sampled_from(list(WRITES.values())),
    levels=st.sampled_from([None, 2, 6]),
    seed=st.integers(0, 2**62),
)
def test_any_case_cpp(batch, length, rule, write, levels, seed):
    torch.manual_seed(seed % 2**31)
    tokens, stats = make_tokens(batch, length), make_stats(batch, length, levels=levels)
    candidates = torch.rand(batch, length) < 0.5
    assert_equals_reference("cpp", tokens, stats, rule, write, candidates=candidates, seed=seed)


# The reference against plain statements of the rules, one position at a time.


def ranked(score, candidates):
    return sorted(torch.nonzero(candidates).flatten().tolist(), key=lambda i: (-float(score[i]), i))


def plain_entropy_bound(stats, candidates, bound):
    taken, total = set(), 0.0
    for i in ranked(-stats.entropy[0], candidates[0]):
        if total > bound:
            break
        taken.add(i)
        total += float(stats.entropy[0, i])
    return taken


def plain_threshold(stats, candidates, tau):
    order = ranked(stats.sample_prob[0], candidates[0])
    return {
        i for r, i in enumerate(order) if r == 0 or float(stats.sample_prob[0, i]) >= float(torch.tensor(tau))
    }


def plain_factor(stats, candidates, f):
    taken = set()
    for r, i in enumerate(ranked(stats.sample_prob[0], candidates[0]), start=1):
        if r > 1 and float(stats.sample_prob[0, i]) < 1 - f / (r + 1):
            break
        taken.add(i)
    return taken


def plain_top_k(stats, candidates, k):
    return set(ranked(stats.sample_prob[0], candidates[0])[:k])


@pytest.mark.parametrize(
    "rule, plain, number",
    [
        (EntropyBound(0.7), plain_entropy_bound, 0.7),
        (Threshold(0.625), plain_threshold, 0.625),
        (Factor(1.5), plain_factor, 1.5),
        (TopK(5), plain_top_k, 5),
    ],
    ids=["entropy_bound", "threshold", "factor", "top_k"],
)
def test_reference_is_the_rule(rule, plain, number):
    sizes = set()
    for trial in range(60):
        torch.manual_seed(trial)
        stats, tokens = make_stats(1, 20, levels=None if trial % 2 else 16), make_tokens(1, 20)
        candidates = torch.rand(1, 20) < 0.7
        result = dgemma_accel.commit(
            tokens, stats, rule, Remask(MASK), candidates=candidates, backend="reference"
        )
        taken = plain(stats, candidates, number)
        sizes.add(len(taken))
        assert set(torch.nonzero(result.committed[0]).flatten().tolist()) == taken
        for i in range(20):
            if i in taken:
                expected = int(stats.sample[0, i])
            else:
                expected = MASK if candidates[0, i] else int(tokens[0, i])
            assert int(result.tokens[0, i]) == expected
    assert len(sizes) > 1 or isinstance(rule, TopK)


def test_entropy_exactly_at_the_bound_is_accepted():
    stats = make_stats(1, 4)._replace(entropy=torch.tensor([[0.25, 0.25, 0.5, 0.125]]))
    count = dgemma_accel.commit(
        make_tokens(1, 4), stats, EntropyBound(0.625), Keep(), backend="reference"
    ).num_committed
    assert count.item() == 4
    below_it = EntropyBound(math.nextafter(0.625, 0) - 1e-7)
    assert (
        dgemma_accel.commit(
            make_tokens(1, 4), stats, below_it, Keep(), backend="reference"
        ).num_committed.item()
        == 3
    )


def test_factor_quirk_only_when_the_last_rank_fails():
    stats = make_stats(1, 3)._replace(sample_prob=torch.tensor([[0.9, 0.8, 0.01]]))
    tokens = make_tokens(1, 3)
    assert (
        dgemma_accel.commit(tokens, stats, Factor(1.0), Keep(), backend="reference").num_committed.item() == 2
    )
    quirk = Factor(1.0, last_rank_quirk=True)
    assert dgemma_accel.commit(tokens, stats, quirk, Keep(), backend="reference").num_committed.item() == 3


def test_renoise_is_uniform_and_independent_of_the_step():
    tokens, stats = torch.zeros(40, 500, dtype=torch.int64), make_stats(40, 500)
    result = dgemma_accel.commit(tokens, stats, TopK(0), Renoise(10), seed=1, backend="reference")
    counts = torch.bincount(result.tokens.flatten(), minlength=10)
    assert counts.shape == (10,)
    assert float((counts / 20_000 - 0.1).abs().max()) < 5 * math.sqrt(0.09 / 20_000)
    high, low = torch.tensor([2**32 - 1]), torch.tensor([2**32 - 1])
    assert below(high, low, 262_144).item() == 262_143
    other = dgemma_accel.commit(tokens, stats, TopK(0), Renoise(10), seed=1, offset=1, backend="reference")
    assert not torch.equal(other.tokens, result.tokens)


def test_bernoulli_uses_word_three():
    tokens, stats = torch.zeros(2, 30, dtype=torch.int64), make_stats(2, 30)
    result = dgemma_accel.commit(
        tokens, stats, Bernoulli(0.4), Keep(), seed=11, offset=3, backend="reference"
    )
    words = random_words(torch.tensor(11), torch.tensor(3), torch.arange(60))
    assert torch.equal(result.committed.flatten(), uniform_from_word(words[WORD_SELECT]) < 0.4)


def test_deterministic_calls_leave_the_generator_alone():
    tokens, stats = make_tokens(1, 5), make_stats(1, 5)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    dgemma_accel.commit(tokens, stats, TopK(2), Keep(), backend="reference")
    assert torch.equal(torch.rand(3), expected)


TOKENS, STATS = torch.zeros(2, 4, dtype=torch.int64), make_stats(2, 4)


@pytest.mark.parametrize(
    "arguments, kwargs, error, text",
    [
        ((TOKENS[0], STATS, TopK(1), Keep()), {}, ValueError, r"tokens: shape must be \[B, C\]"),
        ((TOKENS.int(), STATS, TopK(1), Keep()), {}, TypeError, "tokens: dtype"),
        ((TOKENS, tuple(STATS), TopK(1), Keep()), {}, TypeError, "stats: RowStats expected"),
        (
            (TOKENS, STATS._replace(entropy=STATS.entropy[:1]), TopK(1), Keep()),
            {},
            ValueError,
            "stats.entropy: shape",
        ),
        (
            (TOKENS, STATS._replace(sample=STATS.entropy), TopK(1), Keep()),
            {},
            TypeError,
            "stats.sample: dtype",
        ),
        ((TOKENS, STATS, "top", Keep()), {}, TypeError, "rule: a samplers.Rule"),
        ((TOKENS, STATS, TopK(1), "keep"), {}, TypeError, "write: Remask, Renoise or Keep"),
        (
            (TOKENS, STATS, TopK(torch.tensor([1, 2, 3])), Keep()),
            {},
            ValueError,
            r"rule.k: .* shape \(2,\) expected",
        ),
        ((TOKENS, STATS, TopK(1), Keep()), {"candidates": TOKENS}, TypeError, "candidates: dtype"),
        ((TOKENS, STATS, TopK(1), Keep()), {"candidates": TOKENS[:1] > 0}, ValueError, "candidates: shape"),
        ((TOKENS, STATS, TopK(1), Keep()), {"stop": StableAndConfident()}, ValueError, "stop: needs a state"),
        (
            (TOKENS, STATS, TopK(1), Keep()),
            {"stop": StableAndConfident(2), "state": CanvasState.start(TOKENS)},
            ValueError,
            "state.history: shape",
        ),
        ((TOKENS, STATS, TopK(1), Keep), {}, TypeError, "write: Remask, Renoise or Keep expected, got type"),
        (
            (TOKENS, STATS, TopK(1), Keep()),
            {"state": {}},
            TypeError,
            "state: CanvasState or None expected, got dict",
        ),
        (
            (TOKENS, STATS, TopK(1), Keep()),
            {"stop": 0.005, "state": CanvasState.start(TOKENS)},
            TypeError,
            "stop: StableAndConfident or None expected, got float",
        ),
        ((TOKENS, STATS, TopK(1), Keep()), {"seed": 1.5}, TypeError, "seed"),
        (
            (TOKENS, RowStats(*(f.to("meta") for f in STATS)), TopK(1), Keep()),
            {},
            ValueError,
            "must be on cpu",
        ),
    ],
)
def test_bad_input(arguments, kwargs, error, text):
    with pytest.raises(error, match=text):
        dgemma_accel.commit(*arguments, **kwargs, backend="reference")


@pytest.mark.parametrize(
    "make, error",
    [
        (lambda: TopK(-1), ValueError), (lambda: TopK(1.5), TypeError), (lambda: TopK(True), TypeError),
        (lambda: Threshold(1.5), ValueError), (lambda: Threshold(math.nan), ValueError),
        (lambda: Threshold(0.5, min_count=-1), ValueError), (lambda: Factor(-1.0), ValueError),
        (lambda: EntropyBound(-0.1), ValueError), (lambda: Bernoulli(2), ValueError),
        (lambda: Remask(-1), ValueError), (lambda: Remask(2**31), ValueError), (lambda: Renoise(0), ValueError),
        (lambda: TopK(1, gumbel_temperature=0.0), ValueError), (lambda: StableAndConfident(-1), ValueError),
        (lambda: StableAndConfident(1, 0.0), ValueError), (lambda: Edit(0.5, 0.5, mask_id=-2), ValueError),
        (lambda: TopK(torch.zeros(2, 2, dtype=torch.int64)), ValueError), (lambda: Sequential("all"), TypeError),
    ],
)  # fmt: skip
def test_bad_rules(make, error):
    with pytest.raises(error):
        make()


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: TopK(torch.tensor(-1)), ValueError, r"k: values must be in \[0, inf\), got -1"),
        (lambda: TopK(torch.tensor(1.0)), TypeError, "k: dtype must be one of int64, int32"),
        (lambda: TopK(torch.zeros(2, 2, dtype=torch.int64)), ValueError, "k: an int, a 0-d tensor or one"),
        (lambda: Threshold(torch.tensor(math.nan)), ValueError, "tau: values must be in"),
        (lambda: Threshold(torch.tensor(-0.5)), ValueError, r"tau: values must be in \[0.0, 1.0\], got -0.5"),
        (lambda: Threshold(torch.tensor([0.5, 1.5])), ValueError, r"tau: values must be in \[0.0, 1.0\], got 1.5"),
        (lambda: EntropyBound(math.inf), ValueError, r"bound: must be in \[0.0, inf\), got inf"),
        (lambda: EntropyBound(torch.tensor(math.inf)), ValueError, r"bound: values must be in \[0.0, inf\)"),
        (lambda: Factor(math.inf), ValueError, r"f: must be in \[0.0, inf\), got inf"),
        (lambda: Edit(0.5, torch.tensor(2.0), 1), ValueError, "tau_edit: values"),
        (lambda: Remask(torch.tensor(3)), TypeError, "mask_id: an int expected, got a tensor"),
        (lambda: StableAndConfident(torch.tensor(1)), TypeError, "stability: an int expected, got a tensor"),
        (lambda: StableAndConfident(1, torch.zeros(2)), ValueError, "confidence: a number, a 0-d tensor expected"),
        (lambda: Threshold(0.5, measure=Measure.ENTROPY), ValueError, "measure: must be one of .* got Measure.ENTROPY"),
        (lambda: Factor(0.5, measure=Measure.POSITION), ValueError, "measure: must be one of"),
        (lambda: Threshold(0.5, measure="margin"), TypeError, "measure: a samplers.Measure .* got str"),
        (lambda: Factor(0.5, measure="margin"), TypeError, "measure: a samplers.Measure"),
        (lambda: TopK(1, measure="margin"), TypeError, "measure: a samplers.Measure"),
        (lambda: Threshold(0.5, strict="no"), TypeError, "strict: a bool expected, got str"),
        (lambda: Factor(0.5, last_rank_quirk=1), TypeError, "last_rank_quirk: a bool expected, got int"),
        (lambda: EntropyBound(0.5, "no"), TypeError, "inclusive: a bool expected, got str"),
        (lambda: CanvasState.start([[1]]), TypeError, "canvas: a torch.Tensor expected, got list"),
        (lambda: CanvasState.start(TOKENS[0]), ValueError, r"canvas: shape must be \[B, C\]"),
        (lambda: CanvasState.start(TOKENS, 2), TypeError, "stop: StableAndConfident or None expected, got int"),
    ],
)  # fmt: skip
def test_rules_name_what_is_wrong_when_they_are_made(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_opcheck(backend, device):
    stop = StableAndConfident()
    tokens, stats = make_tokens(2, 8, device), make_stats(2, 8, device)
    state = CanvasState.start(tokens, stop)
    zero = torch.tensor(0.0)
    arguments = (
        tokens, stats.argmax, stats.sample, stats.entropy, stats.sample_prob, stats.top1_prob, stats.top2_prob, None,
        2, 3, 0, torch.tensor(0), torch.tensor(0.3), zero, -1, 1, VOCAB, torch.tensor(1), torch.tensor(0),
        state.draft, state.history, state.finished, torch.tensor(0.5), False, backend,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.dgemma.commit.default, arguments)


def test_compile_fullgraph(backend, device):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(tokens, logits, bound):
        stats = dgemma_accel.row_stats(logits, seed=1, backend=backend)
        return dgemma_accel.commit(
            tokens, stats, EntropyBound(bound), Renoise(VOCAB), seed=1, backend=backend
        ).tokens

    tokens, logits = make_tokens(2, 6, device), torch.randn(2, 6, VOCAB, device=device)
    stats = dgemma_accel.row_stats(logits, seed=1, backend=backend)
    expected = dgemma_accel.commit(
        tokens, stats, EntropyBound(0.5), Renoise(VOCAB), seed=1, backend=backend
    ).tokens
    assert torch.equal(step(tokens, logits, torch.tensor(0.5, device=device)), expected)


@pytest.mark.parametrize(
    "entropy", [[0.1, math.nan, 0.2, 0.3], [math.nan, math.nan, 0.1, 0.1], [0.1, 0.2, 0.3, -math.nan]]
)
@pytest.mark.parametrize("rule", [EntropyBound(0.15), EntropyBound(1.0), EntropyBound(1.0, inclusive=True)])
def test_an_entropy_of_nan_comes_first_on_every_backend(backend, device, rule, entropy):
    """`row_stats` never says so, and what it means to a rule is torch.sort's answer."""
    tokens, stats = make_tokens(1, 4, device), make_stats(1, 4, device)
    stats = stats._replace(entropy=torch.tensor([entropy], device=device))
    ours, reference = (
        dgemma_accel.commit(tokens, stats, rule, Keep(), backend=name) for name in (backend, "reference")
    )
    assert torch.equal(ours.committed, reference.committed)
