"""The CUDA kernel of commit, run thread by thread on the host under sanitizers: equal to the reference."""

import random
import re

import pytest
import torch
from emulated_kernels import build, planted, read_tensor, run, run_clean, skip_without_compiler, write_case

from dgemma_accel import samplers as r
from dgemma_accel.reference.budget import check_commit
from dgemma_accel.reference.commit import CommitCall

pytestmark = skip_without_compiler()

PROGRAM = "commit_emulated"
PER_ROW = {"k": torch.int64, "value": torch.float32, "value2": torch.float32, "seed": torch.int64,
           "offset": torch.int64, "confidence": torch.float32}  # fmt: skip


def call_of(rule, write, batch, length, *, levels=20, candidates=None, stop=None, agree=False, seed=3):
    """A `CommitCall`; few `levels` make many ties."""

    def number():
        return (torch.randint(0, levels, (batch, length)) / levels).float()

    encoded = rule.encode()
    tokens, argmax, sample = (torch.randint(0, 5, (batch, length)) for _ in range(3))
    sample_prob, entropy = number(), number()
    sample_prob[torch.rand(batch, length) < 0.1] = -0.0
    entropy[torch.rand(batch, length) < 0.1] = float("inf")
    draft = history = finished = confidence = None
    if stop is not None:
        state = r.CanvasState.start(tokens, stop)
        draft, history, finished = state.draft, state.history, torch.rand(batch) < 0.3
        if agree:
            history, entropy = argmax.expand(history.shape).clone(), entropy.nan_to_num(posinf=0.0)
        confidence = torch.tensor(stop.confidence)

    def tensor(value, dtype):
        return torch.as_tensor(value).to(dtype)

    return CommitCall(
        tokens, argmax, sample, entropy, sample_prob, number(), number(),
        None if candidates is None else torch.rand(batch, length) < candidates,
        int(encoded.measure), int(encoded.select), int(encoded.flags), tensor(encoded.k, torch.int64),
        tensor(encoded.value, torch.float32), tensor(encoded.value2, torch.float32), encoded.mask_id,
        int(write.kind), write.argument, torch.tensor(seed), torch.tensor(2), draft, history, finished, confidence,
    )  # fmt: skip


def case(folder, call):
    batch, length = call.tokens.shape
    numbers = {
        "batch": batch,
        "length": length,
        "depth": 0 if call.history is None else len(call.history),
    }
    tensors = {}
    for name, value in call._asdict().items():
        if name in PER_ROW and value is not None:
            numbers[name], tensors[name] = value.ndim > 0, value.to(PER_ROW[name])
        elif isinstance(value, torch.Tensor):
            tensors[name] = value
        elif value is not None:
            numbers[name] = value
    return write_case(folder, numbers, tensors)


def result(folder, call):
    shape = call.tokens.shape
    out = [
        read_tensor(folder, "new_tokens", torch.int64, shape),
        read_tensor(folder, "committed", torch.bool, shape),
        read_tensor(folder, "num_committed", torch.int64, shape[:1]),
    ]
    if call.finished is None:
        return (
            *out,
            torch.empty(0, dtype=torch.int64),
            torch.empty(0, dtype=torch.int64),
            torch.empty(0).bool(),
        )
    return (
        *out,
        read_tensor(folder, "new_draft", torch.int64, shape),
        read_tensor(folder, "new_history", torch.int64, call.history.shape),
        read_tensor(folder, "new_finished", torch.bool, shape[:1]),
    )


def rules(batch, length):
    k, share = torch.randint(0, length + 2, (batch,)), torch.rand(batch)
    return (
        r.TopK(k), r.TopK(3, gumbel_temperature=0.3), r.TopK(2, measure=r.Measure.ENTROPY), r.Random(k), r.Margin(1),
        r.Sequential(4), r.Threshold(0.5), r.Threshold(share, min_count=k, strict=True),
        r.Threshold(0.9, slack=1e-5, measure=r.Measure.TOP1_PROB), r.Factor(0.4), r.Factor(share, last_rank_quirk=True),
        r.EntropyBound(0.9), r.EntropyBound(share, inclusive=True), r.EntropyThreshold(share, 2), r.Bernoulli(share),
        r.RunBest(0.8, 0.4, 1), r.RunBest(1.0, 0.0, 0), r.Edit(0.6, 0.5, 2, 1),
    )  # fmt: skip


WRITES = (r.Remask(2), r.Renoise(262_144), r.Renoise(2**31 - 1), r.Keep())


@pytest.fixture(scope="module")
def program():
    return build(PROGRAM)


@pytest.mark.parametrize("batch, length", [(3, 1), (2, 31), (2, 33), (1, 100), (1, 256), (1, 300), (1, 520)])
def test_equals_reference(program, tmp_path, batch, length):
    random.seed(length)
    cases = []
    for rule in rules(batch, length):
        for candidates in (None, 0.7) if length < 256 else (0.9,):
            stop = random.choice([None, r.StableAndConfident(0, 0.5), r.StableAndConfident(3, 0.6)])
            call = call_of(
                rule, random.choice(WRITES), batch, length, levels=random.choice([3, 20, 10**6]),
                candidates=candidates, stop=stop, agree=random.random() < 0.7,
            )  # fmt: skip
            cases.append((tmp_path / str(len(cases)), rule, call))
    run_clean(program, [case(folder, call) for folder, _, call in cases])
    for folder, rule, call in cases:
        assert not check_commit(result(folder, call), call), rule


@pytest.mark.parametrize("length", [20, 100, 256, 520])
def test_sums_at_the_bound(program, tmp_path, length):
    """Sums that are the bound, that are more only when added in order, and sums with NaN."""
    equal = torch.randint(1, 4, (1, length)) / 8
    rising = torch.full((1, length), 2.0**-55)
    rising[0, :2] = 0.5
    spoilt = equal.masked_fill(torch.rand(1, length) < 0.1, float("nan"))
    rows = (equal, 1.0), (equal, 3.25), (rising, 0.5), (rising, 1.0), (spoilt, 1.0), (equal * 0, 0.0)
    cases = []
    for entropy, bound in rows:
        for inclusive in (False, True):
            call = call_of(r.EntropyBound(bound, inclusive=inclusive), r.Renoise(50), 1, length)
            cases.append((tmp_path / str(len(cases)), call._replace(entropy=entropy.float())))
    run_clean(program, [case(folder, call) for folder, call in cases])
    for folder, call in cases:
        assert not check_commit(result(folder, call), call)


# What a race is reported as depends on which thread comes first.
RACE = "no barrier after|never written"
RUNS = r.RunBest(1.0, 0.0, 0)
BUGS = {
    "no barrier of the warp before its keys are read": ("  hw::sync_warp();\n", "", RUNS, RACE),
    "no barrier before other warps' keys are read": (
        "const int count = hw::sync_count(ranked);", "const int count = hw::count_bits(hw::ballot(ranked));",
        RUNS, RACE,
    ),
    "no barrier before other warps' sums are read": (
        "Block::warp_sums().store(warp, sum);\n    hw::sync_block();", "Block::warp_sums().store(warp, sum);",
        r.EntropyBound(0.9), RACE,
    ),
    "a thread behind the canvas takes part": (
        "inside = thread < int(params.length),", "inside = thread <= int(params.length),", RUNS, "heap-buffer-overflow",
    ),
    "the search leaves out the last step": (
        "step = kRun / 2; step > 0;", "step = kRun / 2; step > 1;", r.EntropyBound(0.9), None,
    ),
    "a key's equals in earlier runs are not before it": (
        "bound[i] = key + (", "bound[i] = key + 0 * (", r.EntropyBound(0.9), None,
    ),
    "a run ends one rank early": (
        "Block::rank().load(thread + 1) >= place.count;", "Block::rank().load(thread + 1) >= place.count - 1;",
        RUNS, None,
    ),
    "an entropy is added before it is compared": (
        "holds = before * (1 + kSpread) <= bound;\n    fails = before * (1 - kSpread) > bound;",
        "holds = sum * (1 + kSpread) <= bound;\n    fails = sum * (1 - kSpread) > bound;", r.EntropyBound(0.9), None,
    ),
    "a sum at the bound is not added in order": (
        "if (hw::sync_count(unsure) != 0)", "if (hw::sync_count(unsure) > kThreads)", r.EntropyBound(1.0), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(tmp_path, bug):
    passage, replacement, rule, report = BUGS[bug]
    addresses = report == "heap-buffer-overflow"
    program = planted(PROGRAM, tmp_path, "commit/kernel.cuh", passage, replacement, sanitize=addresses)
    # Of two levels, 0 and 1/2, sums that are the bound of 1.
    levels = 2 if rule == r.EntropyBound(1.0) else 50
    call = call_of(rule, r.Keep(), 1, 100, levels=levels, candidates=0.6)
    folder = case(tmp_path / "case", call)
    done = run(program, [folder])
    if report is None:
        assert done.returncode != 0 or check_commit(result(folder, call), call)
    else:
        assert done.returncode != 0 and re.search(report, done.stderr), done.stderr
