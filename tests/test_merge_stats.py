"""A vocabulary split over two gloo ranks gives the statistics and the sample of one device."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import dgemma_accel
from dgemma_accel.ops.shards import merge_tables, shard_table
from dgemma_accel.reference.budget import check_row_stats

VOCAB, ROWS, SPLIT = 1000, 24, 360


def make_hidden_and_weight():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, ROWS // 2, 32, generator=generator)
    return hidden, torch.randn(VOCAB, 32, generator=generator)


CASES = (
    {"temperature": 0.7, "softcap": 20.0},
    {"temperature": 0.7, "stats_temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": torch.linspace(0, 2, ROWS).reshape(2, ROWS // 2), "softcap": 5.0},
)


def worker(rank, directory):
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    hidden, weight = make_hidden_and_weight()
    # The first rank holds the later columns, to show that shards are ordered by column and not by rank.
    start, stop = ((SPLIT, VOCAB), (0, SPLIT))[rank]
    results = []
    for kwargs in CASES:
        logits, stats = dgemma_accel.head_stats(
            hidden, weight[start:stop], seed=0, backend="reference", **kwargs
        )
        merged = dgemma_accel.merge_stats(
            logits,
            stats,
            vocab_start=start,
            vocab_size=VOCAB,
            seed=5,
            offset=2,
            backend="reference",
            **kwargs,
        )
        results.append(merged)

    logits = hidden @ weight[start:stop].T
    logits[0, 0] = -math.inf
    logits[0, 1] = -math.inf if rank == 0 else logits[0, 1]
    logits[0, 2, 3] = math.nan if rank == 1 else logits[0, 2, 3]
    stats = dgemma_accel.row_stats(logits, seed=0, backend="reference")
    where = {"vocab_start": start, "vocab_size": VOCAB, "backend": "reference"}
    broken = dgemma_accel.merge_stats(logits, stats, uniform=torch.full((2, ROWS // 2), 0.5), **where)

    errors = []
    for first, size in ((start + rank, VOCAB), (start - (1 - rank), VOCAB), (start, VOCAB + 1)):
        try:
            dgemma_accel.merge_stats(logits, stats, vocab_start=first, vocab_size=size, seed=1)
            errors.append("none")
        except ValueError as error:
            errors.append(str(error))
    rows = (2, ROWS // 2)
    for uniform in (
        torch.full(rows, 1.5),
        torch.full((ROWS // 2,), 0.5),
        torch.full(rows, 0.5).double(),
        0.5,
    ):
        try:
            dgemma_accel.merge_stats(logits, stats, uniform=uniform, **where)
            errors.append("none")
        except (TypeError, ValueError) as error:
            errors.append(str(error))

    first_alone = dist.new_group([0])
    try:
        dgemma_accel.merge_stats(logits, stats, seed=1, group=first_alone, **where)
        errors.append("none")
    except (RuntimeError, ValueError) as error:
        errors.append(str(error))
    torch.save((results, broken, errors), f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gloo")
    mp.spawn(worker, args=(str(directory),), nprocs=2)
    ranks = [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(2)]
    return ranks


def test_equals_one_device(outcome):
    hidden, weight = make_hidden_and_weight()
    for index, kwargs in enumerate(CASES):
        logits, whole = dgemma_accel.head_stats(
            hidden, weight, seed=5, offset=2, backend="reference", **kwargs
        )
        merged = outcome[0][0][index]
        assert all(torch.equal(a, b) for a, b in zip(merged, outcome[1][0][index])), "ranks differ"
        assert torch.equal(merged.sample, whole.sample) and torch.equal(merged.argmax, whole.argmax)
        for name in ("entropy", "logsumexp", "top1_prob", "top2_prob", "sample_prob"):
            assert torch.allclose(getattr(merged, name), getattr(whole, name), rtol=2e-5, atol=2e-6), (
                name,
                kwargs,
            )
        if index == 0:
            from dgemma_accel.reference.row_stats import row_uniform

            uniform = row_uniform(None, torch.tensor(5), torch.tensor(2), ROWS, "cpu").reshape(2, ROWS // 2)
            assert not check_row_stats(merged, logits, uniform=uniform, **kwargs)


def test_exact_ties_go_to_the_lower_token():
    for trial in range(50):
        torch.manual_seed(trial)
        logits = torch.randn(4, 90)
        logits[:, 70] = logits[:, 20] = logits.amax(-1) + 0.3
        tables = []
        for start, stop in ((0, 40), (40, 90)):
            part = logits[:, start:stop]
            stats = dgemma_accel.row_stats(part, seed=0, backend="reference")
            tables.append(shard_table(part, stats, start, None, torch.ones(4), None, "reference"))
        assert merge_tables(torch.stack(tables)).argmax.tolist() == [20] * 4


@pytest.mark.parametrize("temperature", [1e-6, 1e-20, 1e-37])
def test_a_tie_is_drawn_from_both_shards_at_every_temperature(temperature):
    logits = torch.zeros(2, 10)
    logits[:, 2] = logits[:, 7] = 8.0
    t = torch.full((2,), temperature)
    tables = []
    for start in (0, 5):
        part = logits[:, start : start + 5]
        stats = dgemma_accel.row_stats(part, temperature=temperature, seed=0, backend="reference")
        tables.append(shard_table(part, stats, start, None, t, None, "reference"))
    merged = merge_tables(torch.stack(tables))
    owner, local = merged.split(torch.tensor([0.25, 0.75]))
    assert owner.tolist() == [0, 1] and local.tolist() == [0.5, 0.5]
    assert merged.top1_prob.tolist() == [0.5, 0.5]


def owners(logits, cut, uniform, temperature=1.0, stats_temperature=None):
    """The shard, 0 before the column `cut` and 1 from it on, that the sample of each row is drawn from."""
    tables = []
    for start, part in ((0, logits[:, :cut]), (cut, logits[:, cut:])):
        kwargs = {"stats_temperature": stats_temperature, "backend": "reference"}
        stats = dgemma_accel.row_stats(part, temperature=temperature, seed=0, **kwargs)
        tables.append(shard_table(part, stats, start, None, torch.full((len(part),), temperature), **kwargs))
    return merge_tables(torch.stack(tables)).split(uniform)[0]


@pytest.mark.parametrize("empty, uniform, owner", [(0, 0.0, 1), (1, 1.0 - 2.0**-24, 0)])
def test_a_shard_without_mass_holds_no_sample(empty, uniform, owner):
    logits = torch.randn(4, 50)
    logits[:, 20 * empty : 20 + 30 * empty] = -math.inf
    assert owners(logits, 20, torch.full((4,), uniform)).tolist() == [owner] * 4


def test_shards_hold_what_their_mass_is_at_the_temperature_of_the_sample():
    generator = torch.Generator().manual_seed(0)
    logits, uniform = torch.randn(400, 50, generator=generator) * 2, torch.rand(400, generator=generator)
    temperatures = {"temperature": 0.3, "stats_temperature": 1.0}
    whole = dgemma_accel.row_stats(logits, uniform=uniform, backend="reference", **temperatures)
    assert torch.equal(owners(logits, 20, uniform, **temperatures), (whole.sample >= 20).long())


def test_rows_without_a_distribution(outcome):
    broken = outcome[0][1]
    assert broken.logsumexp[0, 0].isnan() and broken.entropy[0, 0] == math.inf and broken.sample[0, 0] == 0
    assert broken.logsumexp[0, 2].isnan() and broken.top1_prob[0, 2] == 0
    hidden, weight = make_hidden_and_weight()
    row = (hidden @ weight.T)[0, 1].clone()
    row[SPLIT:] = -math.inf
    whole = dgemma_accel.row_stats(row[None], uniform=torch.tensor([0.5]), backend="reference")
    assert broken.sample[0, 1] == whole.sample[0]
    assert torch.allclose(broken.entropy[0, 1], whole.entropy[0], atol=1e-5)


def test_shards_that_do_not_cover_the_vocabulary(outcome):
    for rank in range(2):
        gap, overlap, short = outcome[rank][2][:3]
        assert "vocab_start: shards leave a gap" in gap
        assert "vocab_start: shards overlap" in overlap
        assert "vocab_size: shards cover [0, 1000)" in short


def test_uniforms_that_are_not_one_in_0_to_1_for_each_row(outcome):
    for rank in range(2):
        value, shape, dtype, number = outcome[rank][2][3:7]
        assert value == "uniform: values must be in [0.0, 1.0), got 1.5"
        assert shape == "uniform: shape must be (2, 12) (one value per row), got (12,)"
        assert dtype.startswith("uniform: dtype must be") and number.startswith(
            "uniform: a torch.Tensor expected"
        )


def test_a_rank_outside_the_group(outcome):
    assert outcome[1][2][7] == "group: this rank has to be in it, got rank 1 of the default group"


def test_needs_a_process_group_and_a_seed():
    logits = torch.zeros(2, 4)
    stats = dgemma_accel.row_stats(logits, seed=0, backend="reference")
    with pytest.raises(RuntimeError, match="init_process_group"):
        dgemma_accel.merge_stats(logits, stats, vocab_start=0, vocab_size=4, seed=1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": [[0.0] * 4] * 2}, "logits: a torch.Tensor expected, got list"),
        ({"stats": (1,) * 7}, "stats: RowStats expected, got tuple"),
        ({"vocab_start": "0"}, "vocab_start: an int expected, got str"),
        ({"vocab_size": 4.0}, "vocab_size: an int expected, got float"),
        ({"backend": None}, "backend: a string expected, got NoneType"),
    ],
)
def test_wrong_types_are_told_before_ranks_wait_for_each_other(change, message):
    logits = torch.zeros(2, 4)
    arguments = {
        "logits": logits,
        "stats": dgemma_accel.row_stats(logits, seed=0),
        "vocab_start": 0,
        "vocab_size": 4,
    }
    with pytest.raises(TypeError, match=message):
        dgemma_accel.merge_stats(**{**arguments, **change}, seed=1)
