"""Steps of a sampler that are replayed: the same tokens as launched one by one, and what is recorded when.

A recording that runs its function again stands in for the CUDA graph; like one it knows nothing but the tensors that it
was made with.
"""

import logging
import math
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from recordings import Again
from samplers_models import Attention
from test_samplers import CASES, LENGTH, MASK, MODELS, VOCAB

from dgemma_accel import cuda_graph
from dgemma_accel.samplers import (
    CreditThreshold,
    Entropy,
    EntropyBoundRenoise,
    LowConfidence,
    LowConfidenceDynamic,
    MaskedDiffusionSampler,
    MaskgitPlus,
    Rule,
    Strategy,
    Threshold,
    TopK,
    recorded,
)

# Name -> (strategy, schedule).
STRATEGIES = {name: (one, options.get("schedule", "masked")) for name, (one, _, options) in CASES.items()}
STRATEGIES["renoise"] = (EntropyBoundRenoise(VOCAB, 2.0, stop_confidence=0.6), "masked")
STRATEGIES["joint_penalty"] = (replace(STRATEGIES["joint_threshold"][0], penalty_lambda=1.5), "masked")
# One has a memory that grows from step to step, and one goes over the rows in parts.
LAUNCHED = {"credit"}
# What is copied where it changed; "memory.draft" is read of finished rows only, which no block begins with.
FIELDS = [name for name in recorded.READ if name != "seed"] + [
    "memory.edits",
    "memory.history",
    "memory.finished",
]
# Edits end at temperature 0 only.
STEPS = [(name, t) for name in STRATEGIES for t in (0.0, 0.7) if "joint" not in name or t == 0]


@pytest.fixture(autouse=True)
def no_recordings():
    recorded.clear()
    yield
    recorded.clear()


@pytest.fixture
def made(monkeypatch):
    """Steps are recorded on a CPU too, from the second one of a kind on. The list of recordings made."""
    monkeypatch.setitem(cuda_graph.RECORDINGS, "cpu", Again)
    monkeypatch.setattr(Again, "made", [])
    monkeypatch.setattr(recorded, "PATIENCE", 1)
    return Again.made


def sampler_of(strategy, **options):
    return MaskedDiffusionSampler(strategy, MASK, **{"block_length": LENGTH, **options})


def given(batch=5, seed=1):
    """Blocks of masks with given tokens between them."""
    noise = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, MASK, (batch, LENGTH), generator=noise)
    return torch.where(torch.rand(tokens.shape, generator=noise) < 0.75, MASK, tokens)


def settling(tokens):
    """Rows of a block come to the same rest one after the other, and the last one at once."""
    logits = 0.6 * MODELS["peaky"](0)(tokens)
    logits[..., 1 : LENGTH + 1] += 6 * torch.eye(LENGTH)
    logits[-1, :, 1 : LENGTH + 1] += 20 * torch.eye(LENGTH)
    return logits


def run(sampler, model, tokens, seed=3, steps=40):
    """What each step of a block leaves."""
    state, trace = sampler.start(tokens, open=tokens == MASK, seed=seed, offset=2), []
    while bool(state.active.any()) and len(trace) < steps:
        tokens = sampler.step(model(tokens), tokens, state)
        trace.append(left_by(sampler, tokens, state))
    return trace


def left_by(sampler, tokens, state):
    final = sampler.decider.final_tokens(tokens, state)
    return tokens, final, state.active, state.stuck, state.nfe, state.committed, state.step, state.offset


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for one, other in zip(a, b)
        for x, y in zip(one, other)
    )


@pytest.mark.parametrize("name, temperature", STEPS)
def test_every_step_is_the_one_that_is_launched(name, temperature, made):
    strategy, schedule = STRATEGIES[name]
    settings = {"temperature": temperature, "schedule": schedule, "steps": 6}
    ours = sampler_of(strategy, **settings)
    for kind in ("flat", "peaky", "proposes_mask", "settling"):
        for number in range(3):
            model, tokens = MODELS[kind](number) if kind in MODELS else settling, given(seed=number)
            expected = run(replace(ours, graph=False), model, tokens, seed=number)
            assert same(run(ours, model, tokens, seed=number), expected)
    assert len(made) == (0 if name in LAUNCHED else 1)
    if made:
        assert made[0].replays > 10 and made[0].runs == 0


def test_all_other_strategies_are_recorded():
    launched = {name for name, (strategy, _) in STRATEGIES.items() if sampler_of(strategy).kind is None}
    assert launched == LAUNCHED


WIDE = 6000
FILTERS = {
    "Dream": (Entropy(), {"temperature": 0.2, "top_p": 0.95}),
    "SDAR": (
        LowConfidenceDynamic(),
        {"temperature": 1.0, "top_k": 20, "top_k_first": True, "schedule": "block", "steps": 6},
    ),
    "both": (Threshold(0.5), {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "confidence": "untempered"}),
    "greedy": (MaskgitPlus(), {"top_k": 7}),
    "Dream as published": (Entropy(epsilon=1e-10), {"temperature": 0.2, "top_p": 0.95}),
}


def wide(tokens):
    """Logits over a vocabulary of which most rows keep a few tokens, and some nearly all."""
    noise = torch.Generator().manual_seed(int(tokens.sum()))
    logits = torch.randn(*tokens.shape, WIDE, generator=noise) * 3
    logits[..., :50] += 12
    logits[..., MASK] = -30
    if int(tokens.sum()) % 3 == 0:
        logits[0, 0] = torch.randn(WIDE, generator=noise) * 0.01
    return logits


# Name -> (sampler, model): every strategy, and filters.
SAMPLERS = {
    f"{name}, T = {t}": (
        sampler_of(STRATEGIES[name][0], temperature=t, schedule=STRATEGIES[name][1], steps=6),
        MODELS["flat"](0),
    )
    for name, t in STEPS
} | {name: (sampler_of(strategy, **options), wide) for name, (strategy, options) in FILTERS.items()}


@pytest.mark.parametrize("name", FILTERS)
def test_filters(name, made):
    """Replayed whatever they keep."""
    strategy, options = FILTERS[name]
    ours = sampler_of(strategy, **options)
    for number in range(6):
        tokens = given(seed=number)
        expected = run(replace(ours, graph=False), wide, tokens, seed=number)
        assert same(run(ours, wide, tokens, seed=number), expected)
    assert len(made) == 1 and made[0].replays > 10


def test_two_blocks_take_turns(made):
    ours, model = sampler_of(LowConfidence(), temperature=0.7), MODELS["flat"](0)
    expected = [run(replace(ours, graph=False), model, given(seed=n), seed=n) for n in (5, 6)]
    tokens = [given(seed=n) for n in (5, 6)]
    states = [ours.start(t, seed=n, offset=2) for t, n in zip(tokens, (5, 6))]
    for step in range(4):
        for n, state in enumerate(states):
            tokens[n] = ours.step(model(tokens[n]), tokens[n], state)
            assert torch.equal(tokens[n], expected[n][step][0]) and torch.equal(
                state.nfe, expected[n][step][4]
            )
    assert len(made) == 1 and made[0].replays == 7


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("field", ["open", "active", "nfe", "stuck", "masked_at_start"])
def test_a_state_that_was_written_in_between(field, inference, made):
    ours, model, tokens = sampler_of(TopK(1)), MODELS["flat"](0), torch.full((2, LENGTH), MASK)
    if field == "masked_at_start":
        ours = sampler_of(LowConfidence(), steps=5)

    def written(sampler):
        state, current = sampler.start(tokens), tokens
        for step in range(4):
            if step == 3:
                getattr(state, field)[0] = 3 if field in ("nfe", "masked_at_start") else field == "stuck"
            current = sampler.step(model(current), current, state)
        return current, state

    with torch.inference_mode(inference):
        expected, theirs = written(replace(ours, graph=False))
        current, state = written(ours)
    assert made[0].replays == 3
    assert torch.equal(current, expected)
    for name in recorded.LEFT:
        assert torch.equal(getattr(state, name), getattr(theirs, name))


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_that_is_copied_changes_results(field, made, monkeypatch):
    """So one that recordings forgot would show above."""
    knows = recorded.RecordedStep._knows

    def forgets(self, name, given):
        return (name == field and name in self._known) or knows(self, name, given)

    ours, whole = sampler_of(LowConfidence(), temperature=0.7, steps=6), MODELS["proposes_mask"](0)
    if field == "committed":
        ours = sampler_of(AfterCommitted(), steps=6)
    if field == "memory.edits":
        ours = sampler_of(STRATEGIES["joint_threshold"][0])
    elif field in ("memory.history", "memory.finished"):
        # All blocks come to the same rest, some rows of them at once.
        ours, whole = sampler_of(STRATEGIES["renoise"][0], temperature=0.7, steps=20), settling

    def broken(tokens):
        """The first row is stuck while others go on."""
        logits = whole(tokens)
        logits[0] = math.nan
        return logits

    def same_as_launched():
        for number in range(6):
            model, tokens = (whole, broken)[number % 2], given(seed=number)
            expected = run(replace(ours, graph=False), model, tokens, seed=number)
            if not same(run(ours, model, tokens, seed=number), expected):
                return False
        return True

    assert same_as_launched()
    monkeypatch.setattr(recorded.RecordedStep, "_knows", forgets)
    assert not same_as_launched()
    assert len(made) == 1


def test_what_a_step_left_is_not_copied_again(made):
    ours, model, tokens = sampler_of(LowConfidence()), MODELS["flat"](0), torch.full((2, LENGTH), MASK)
    state, loads = ours.start(tokens), []
    for step in range(5):
        if step > 1:
            (recording,) = recorded._kept.steps.values()
            names = [name for name in recorded.READ if name != "seed"]
            loads.append([name for name in names if not recording._knows(name, getattr(state, name))])
        tokens = ours.step(model(tokens), tokens, state)
    assert loads == [[], [], []]


def test_what_was_returned_stays(made):
    """Nothing that a caller got is written by a later replay, nor belongs to the recording."""
    ours, model = sampler_of(LowConfidence()), MODELS["flat"](0)
    trace = run(ours, model, given())
    copies = [[x.clone() if isinstance(x, torch.Tensor) else x for x in one] for one in trace]
    run(ours, model, given(seed=9))
    assert same(trace, copies) and made[0].replays > 8


def test_a_kind_is_recorded_once_it_came_often_enough(made, monkeypatch):
    monkeypatch.setattr(recorded, "PATIENCE", 5)
    model = MODELS["flat"](0)
    # Equal samplers are of one kind.
    for step in range(7):
        ours, tokens = sampler_of(LowConfidence()), torch.full((2, LENGTH), MASK)
        ours.step(model(tokens), tokens, ours.start(tokens))
        assert [r.replays for r in made] == ([] if step < 5 else [step - 4])
    tokens = torch.full((3, LENGTH), MASK)
    for sampler in (ours, sampler_of(LowConfidence(), steps=4), sampler_of(LowConfidence(), temperature=0.5)):
        for _ in range(6):
            sampler.step(model(tokens), tokens)
    assert len(made) == 4


def test_the_last_step_of_a_block_is_launched(made):
    ours, model, tokens = sampler_of(Threshold(0.99), steps=3), MODELS["flat"](0), given(1)
    for _ in range(2):
        trace = run(ours, model, tokens)
        assert len(trace) == 3 and trace[-1][3].all()
    assert made[0].replays == 3


@dataclass(frozen=True)
class Mine(LowConfidence):
    """Derived from one that may be recorded, and not to be taken for one."""

    def rule(self, step):
        return TopK(1 + step.number % 2)


@dataclass(frozen=True)
class MyRule(Rule):
    def encode(self):
        return TopK(2).encode()


def test_what_is_not_recorded(made, monkeypatch):
    model, tokens = MODELS["flat"](0), torch.full((2, LENGTH), MASK)
    plain = sampler_of(LowConfidence(), temperature=0.7)
    others = [
        replace(plain, graph=False),
        replace(plain, temperature=torch.tensor(0.7)),
        replace(plain, temperature=lambda step, steps: 0.7),
        replace(plain, strategy=Mine()),
        replace(plain, strategy=MyRule()),
        replace(plain, strategy=CreditThreshold(), temperature=0.0),
        replace(plain, strategy=TopK(torch.tensor([1, 2]))),
        replace(plain, strategy=Threshold(torch.tensor(0.5))),
    ]
    for sampler in others:
        for _ in range(4):
            sampler.step(model(tokens), tokens)
    logits = model(tokens).requires_grad_()
    for _ in range(4):
        try:
            plain.step(logits, tokens)
        except RuntimeError:
            pass
    monkeypatch.setattr(recorded, "LARGEST", logits.nbytes - 1)
    for _ in range(4):
        plain.step(model(tokens), tokens)
    assert made == []
    monkeypatch.setattr(recorded, "LARGEST", logits.nbytes)
    # Greedy proposals need no filter for the statistics of the untempered distribution.
    for sampler in (plain, replace(plain, temperature=0.0, top_k=3)):
        for _ in range(4):
            sampler.step(model(tokens), tokens)
    assert len(made) == 2


def test_threads_share_recordings(made):
    ours, model = sampler_of(LowConfidence(), temperature=0.7), MODELS["flat"](0)
    expected = [run(replace(ours, graph=False), model, given(seed=n), seed=n) for n in range(6)]
    run(ours, model, given())
    found, start = {}, threading.Barrier(6)

    def work(n):
        start.wait()
        found[n] = [run(ours, model, given(seed=n), seed=n) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(one, expected[n]) for n in range(6) for one in found[n])
    assert len(made) == 1 and made[0].replays > 6 * 3 * 4


class OnDevice(torch.Tensor):
    """Not known to be on the host."""

    is_cpu = False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def test_seeds_of_host_and_device(made):
    ours, model, tokens = sampler_of(LowConfidence(), temperature=0.7), MODELS["flat"](0), given()
    run(ours, model, tokens)
    for number in (5, 9, 5):
        seed = torch.tensor(number)
        if number == 9:
            seed = seed.as_subclass(OnDevice)
        found = []
        for sampler in (ours, replace(ours, graph=False)):
            state = sampler.start(tokens, seed=number)
            state.seed = seed
            found.append(sampler.step(model(tokens), tokens, state))
        assert torch.equal(*found)
    assert made[0].replays > 3


def test_open_positions_that_are_written_behind_torch_s_back(made):
    ours, model, tokens = sampler_of(TopK(LENGTH)), MODELS["flat"](0), torch.full((2, LENGTH), MASK)
    open = torch.ones_like(tokens, dtype=torch.bool)
    for number in range(4):
        open.data[:] = True
        open.data[:, number] = False
        found = [
            sampler.step(model(tokens), tokens, sampler.start(tokens, open=open, seed=1))
            for sampler in (ours, replace(ours, graph=False))
        ]
        assert torch.equal(*found) and (found[0] == MASK).sum() == 2
    state = ours.start(tokens, open=open)
    open.zero_()
    assert state.open.any()


def test_a_seed_that_is_written_behind_torch_s_back(made):
    ours, model, tokens = sampler_of(LowConfidence(), temperature=0.7), MODELS["flat"](0), given()

    def texts(sampler):
        seed, found = torch.tensor(0), []
        for number in range(4):
            state = sampler.start(tokens, seed=seed)
            seed.data.fill_(number)
            found.append(sampler.step(model(tokens), tokens, state))
        return torch.stack(found)

    assert torch.equal(texts(ours), texts(replace(ours, graph=False))) and made[0].replays == 3


@dataclass(frozen=True)
class AfterCommitted(Strategy):
    """Commits one more than right of what was committed last."""

    recordable = True

    def rule(self, step):
        return TopK(1 + step.state.committed.roll(1, -1).sum(-1) % 3)


@dataclass(frozen=True)
class Rotates(Strategy):
    """Remembers the last two counts, one of which moves on to the other's name."""

    recordable = True

    def start(self, state, tokens):
        state.memory |= {"now": torch.ones_like(state.nfe), "before": torch.zeros_like(state.nfe)}

    def rule(self, step):
        memory = step.state.memory
        memory["before"], memory["now"] = memory["now"], 1 + (memory["before"] + memory["now"]) % 3
        return TopK(memory["now"])


@pytest.mark.parametrize("strategy", [AfterCommitted(), Rotates()], ids=lambda s: type(s).__name__)
def test_strategies_of_others(strategy, made):
    ours, model = sampler_of(strategy, temperature=0.7), MODELS["flat"](0)
    for number in range(5):
        tokens = given(seed=number)
        expected = run(replace(ours, graph=False), model, tokens, seed=number)
        assert same(run(ours, model, tokens, seed=number), expected)
    assert len(made) == 1 and made[0].replays > 3


@dataclass(frozen=True)
class Listed(Strategy):
    numbers: list
    recordable = True

    def rule(self, step):
        return TopK(self.numbers[0])


@dataclass(frozen=True)
class NotCompared(Strategy):
    k: int = field(compare=False)
    recordable = True

    def rule(self, step):
        return TopK(self.k)


class NoData(Strategy):
    recordable = True

    def rule(self, step):
        return TopK(1)


class Plain(LowConfidence):
    """Equal to any other of its class."""

    recordable = True

    def __init__(self, k):
        object.__setattr__(self, "k", k)

    def rule(self, step):
        return TopK(self.k)


def test_strategies_that_do_not_say_what_they_are(made):
    model, tokens = MODELS["flat"](0), torch.full((2, LENGTH), MASK)
    for strategy in (Listed([2]), NotCompared(1), NotCompared(3), NoData(), Plain(1), Plain(3)):
        ours = sampler_of(strategy)
        k = getattr(strategy, "k", 2 if isinstance(strategy, Listed) else 1)
        for _ in range(4):
            state = ours.start(tokens)
            ours.step(model(tokens), tokens, state)
            assert state.committed.sum(-1).tolist() == [k, k]
    assert made == []


def test_states_with_another_memory(made):
    model, tokens = MODELS["flat"](0), torch.full((2, LENGTH), MASK)
    plain, edits = sampler_of(LowConfidence()), sampler_of(STRATEGIES["joint_threshold"][0])
    for ours in (plain, edits):
        run(ours, model, tokens)
    replays = sum(one.replays for one in made)
    for note in ([], torch.zeros(3), "text"):
        state, current = plain.start(tokens), tokens
        state.memory["note"] = note
        current = plain.step(model(current), current, state)
        assert state.committed.sum() == 2
    # As without recordings.
    plain.step(model(tokens), tokens, edits.start(tokens))
    with pytest.raises(KeyError):
        edits.step(model(tokens), tokens, plain.start(tokens))
    assert sum(one.replays for one in made) == replays and len(made) == 2


def test_tokens_of_another_dtype_are_refused_as_before(made):
    ours, model, tokens = sampler_of(LowConfidence()), MODELS["flat"](0), torch.full((2, LENGTH), MASK)
    run(ours, model, tokens)
    for _ in range(3):
        with pytest.raises(TypeError, match="tokens"):
            ours.step(model(tokens), tokens.int(), ours.start(tokens))


def test_a_recording_that_finds_no_memory_is_tried_again(made, monkeypatch, caplog):
    tried = []

    class Full(Again):
        def __init__(self, *arguments):
            tried.append(arguments)
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(cuda_graph.RECORDINGS, "cpu", Full)
    monkeypatch.setattr(recorded, "LONGER", 10)
    ours, model, tokens = sampler_of(LowConfidence()), MODELS["flat"](0), torch.full((2, LENGTH), MASK)
    for _ in range(30):
        ours.step(model(tokens), tokens)
    assert 2 <= len(tried) <= 3 and not caplog.records


def test_a_recording_that_fails(made, monkeypatch, caplog):
    tried = []

    class Fails(Again):
        def __init__(self, *arguments):
            tried.append(arguments)
            super().__init__(*arguments)
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setitem(cuda_graph.RECORDINGS, "cpu", Fails)
    ours, model = sampler_of(LowConfidence(), temperature=0.7), MODELS["flat"](0)
    expected = run(replace(ours, graph=False), model, given())
    with caplog.at_level(logging.WARNING, "dgemma_accel"):
        assert all(same(run(ours, model, given()), expected) for _ in range(3))
    lines = [record.getMessage() for record in caplog.records]
    assert len(tried) == 1 and len(lines) == 1
    assert lines[0].endswith("RuntimeError: operation not permitted when stream is capturing")


def test_a_replay_that_fails_leaves_the_state(made, monkeypatch):
    ours, model, tokens = sampler_of(LowConfidence(), temperature=0.7), MODELS["flat"](0), given()
    expected = run(replace(ours, graph=False), model, tokens)
    state, trace = ours.start(tokens, seed=3, offset=2), []
    while len(trace) < len(expected):
        if len(trace) == 3:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

                def interrupted(self):
                    self.function()
                    raise KeyboardInterrupt

                patch.setattr(Again, "replay", interrupted)
                ours.step(model(tokens), tokens, state)
            assert made[0].runs == 0
        tokens = ours.step(model(tokens), tokens, state)
        trace.append(left_by(ours, tokens, state))
    assert same(trace, expected)


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("where", ["replay", "end", "note"])
def test_an_interrupt_leaves_a_state_that_can_be_taken_up(where, made, monkeypatch):
    ours, model, tokens = sampler_of(LowConfidence(), temperature=0.7), MODELS["flat"](0), given()
    expected = run(replace(ours, graph=False), model, tokens)
    run(ours, model, tokens)
    state = ours.start(tokens, open=tokens == MASK, seed=3, offset=2)
    for _ in range(2):
        tokens = ours.step(model(tokens), tokens, state)
    with monkeypatch.context() as patch, pytest.raises(Stopped):

        def stopped(self, *arguments):
            if where == "replay":
                self.function()
            raise Stopped

        if where == "note":
            patch.setattr(recorded, "_put", stopped)
        else:
            patch.setattr(Again, where, stopped)
        ours.step(model(tokens), tokens, state)
    made[0].runs = 0
    tokens = ours.step(model(tokens), tokens, state)
    assert same([left_by(ours, tokens, state)], expected[2:3])


def test_a_recording_that_is_interrupted_is_tried_again(made, monkeypatch):
    tried = []

    class Interrupted(Again):
        def __init__(self, *arguments):
            tried.append(arguments)
            raise Stopped

    monkeypatch.setattr(recorded, "LONGER", 5)
    ours, model, tokens = sampler_of(LowConfidence()), MODELS["flat"](0), torch.full((2, LENGTH), MASK)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setitem(cuda_graph.RECORDINGS, "cpu", Interrupted)
        for _ in range(3):
            ours.step(model(tokens), tokens)
    for _ in range(10):
        ours.step(model(tokens), tokens)
    assert len(tried) == 1 and len(made) == 1


def test_a_recording_that_made_room_is_replayed_no_more(made):
    ours, model = sampler_of(LowConfidence(), temperature=0.7), MODELS["flat"](0)
    expected = run(replace(ours, graph=False), model, given())
    run(ours, model, given())
    (step,) = recorded._kept.steps.values()
    replays = made[0].replays
    recorded.clear()
    assert made[0].waits == 1
    # Another thread had found it before.
    state, tokens = ours.start(given(), open=given() == MASK, seed=3, offset=2), given()
    tokens = step.take(model(tokens), tokens, state)
    assert same([left_by(ours, tokens, state)], expected[:1]) and made[0].replays == replays


def test_what_is_cleared_meanwhile_is_not_kept(made, monkeypatch):
    class Slow(Again):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            recorded.clear()

    monkeypatch.setitem(cuda_graph.RECORDINGS, "cpu", Slow)
    ours, model = sampler_of(LowConfidence(), temperature=0.7), MODELS["flat"](0)
    expected = run(replace(ours, graph=False), model, given())
    assert all(same(run(ours, model, given()), expected) for _ in range(3))
    assert not recorded._kept.steps and len(made) > 3 and all(one.waits == 1 for one in made)


def test_the_largest_logits_are_those_of_the_docstring():
    assert recorded.LARGEST == 96 << 20
    assert "at most 96 MiB" in MaskedDiffusionSampler.__doc__


@dataclass(frozen=True)
class AsksTwice(Strategy):
    """Whether the first proposals were settled counts, too."""

    recordable = True
    confidence = "proposal"

    def propose(self, step_logits, state, masked, proposal):
        stats = proposal.stats(step_logits, state.seed, state.offset)
        proposal.stats(step_logits.roll(1, -1) * 10, state.seed, state.offset)
        return stats

    def rule(self, step):
        return TopK(1)


def test_filters_in_inference_mode_and_twice_a_step(made):
    options = {"temperature": 0.3, "top_p": 0.9, "confidence": "proposal"}
    edits = {"top_p": 0.9, "confidence": "proposal"}
    for ours in (sampler_of(AsksTwice(), **options), sampler_of(STRATEGIES["joint_threshold"][0], **edits)):
        before = len(made)
        with torch.inference_mode():
            for number in range(6):
                tokens = given(seed=number)
                expected = run(replace(ours, graph=False), wide, tokens, seed=number)
                assert same(run(ours, wide, tokens, seed=number), expected)
        assert len(made) == before + 1


@dataclass(frozen=True)
class MySampler(MaskedDiffusionSampler):
    def take_step(self, logits, tokens, state, **options):
        return super().take_step(logits.roll(1, -1), tokens, state, **options)


def test_a_derived_sampler_is_asked_itself(made):
    ours, model, tokens = sampler_of(LowConfidence()), MODELS["flat"](0), given()
    theirs = MySampler(LowConfidence(), MASK, block_length=LENGTH)
    run(ours, model, tokens)
    assert same(run(theirs, model, tokens), run(replace(theirs, graph=False), model, tokens))
    assert theirs.kind is None and len(made) == 1


def test_memory_of_recordings_is_bounded(made, monkeypatch):
    model = MODELS["flat"](0)

    def use(batch):
        tokens = torch.full((batch, LENGTH), MASK)
        for _ in range(3):
            sampler_of(LowConfidence()).step(model(tokens), tokens)
        return next(reversed(recorded._kept.steps.values()))

    def use_all(batch):
        use(batch)
        return [kind[3][0] for kind in recorded._kept.steps]

    assert use(2).bytes > Again.bytes + 2 * LENGTH * VOCAB * 4
    monkeypatch.setattr(recorded, "BUDGET", 2 * use(4).bytes)
    recorded.clear()
    del made[:]
    # The least recently used makes room, and is not made again at once.
    assert [list(use_all(batch)) for batch in (2, 3, 4, 4, 2)] == [[2], [2, 3], [3, 4], [3, 4], [3, 4]]
    assert [one.waits for one in made] == [1, 0, 0]
    monkeypatch.setattr(recorded, "LONGER", 5)
    assert use_all(3) and use_all(4) and use_all(1) == [4, 1] and len(made) == 4
    for _ in range(4):
        kept = use_all(3)
    assert kept == [1, 3] and len(made) == 5
    # One alone may hold half of it, and is not tried again soon where it would hold more.
    assert use_all(5) == use_all(5) == [1, 3] and len(made) == 6
    monkeypatch.setattr(recorded, "KINDS", 3)
    monkeypatch.setattr(recorded, "PATIENCE", 100)
    for batch in range(10, 16):
        use_all(batch)
    assert len(recorded._kept.counts) == 3


def test_whole_texts(made):
    model = Attention()
    prompts = [[1, 2, 3], [4, 5], [6]]
    for strategy in (LowConfidence(), Threshold(0.6), MaskgitPlus()):
        ours = MaskedDiffusionSampler(strategy, 22, block_length=8, temperature=0.4, eos_id=7)
        forward = lambda tokens, attention_mask=None: model.core(tokens, torch.arange(tokens.shape[1]))[0]  # noqa: E731
        expected = replace(ours, graph=False).generate(forward, prompts, 24, seed=5)
        before = sum(recording.replays for recording in made)
        result = ours.generate(forward, prompts, 24, seed=5)
        assert torch.equal(result.sequences, expected.sequences)
        assert torch.equal(result.nfe, expected.nfe) and result.calls == expected.calls
        assert sum(recording.replays for recording in made) > before + 3


@pytest.mark.source_tree
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="needs a PyTorch that was built without CUDA")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_nothing_recorded_waits_for_a_gpu_or_copies_to_it():
    script = Path(__file__).with_name("recorded_on_fake_gpu.py")
    done = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 40


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAMPLERS)
def test_on_a_gpu(name, monkeypatch):
    ours, table = SAMPLERS[name]
    monkeypatch.setattr(recorded, "PATIENCE", 1)

    def model(tokens):
        return table(tokens.cpu()).cuda()

    for number in range(3):
        tokens = given(seed=number).cuda()
        expected = run(replace(ours, graph=False), model, tokens, seed=number)
        assert same(run(ours, model, tokens, seed=number), expected)
    assert len(recorded._kept.steps) == (ours.kind is not None)
    if ours.kind is None or name in FILTERS:
        # Filters ask once a step.
        return
    state, logits = ours.start(tokens, seed=0), model(tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            tokens = ours.step(logits, tokens, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
