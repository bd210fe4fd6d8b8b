"""`MaskedDiffusionSampler.generate` against the published generation loops, on stand-ins of their models."""

import inspect
import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from samplers_literal import by_rank, transfer_counts
from samplers_models import MASK, SDAR, VOCAB, Dream, FastDream, FastLLaDA, LLaDA, Store

from dgemma_accel.samplers import (
    DREAM,
    BlockCache,
    DInferThreshold,
    DualCache,
    Entropy,
    EntropyBoundRenoise,
    Factor,
    FullSequence,
    HierarchyWithRemask,
    JointThresholdEdit,
    LowConfidence,
    LowConfidenceDynamic,
    MaskedDiffusionSampler,
    MaskgitPlus,
    PrefixCache,
    Random,
    SequentialWindow,
    Threshold,
)

SEEDS = range(8)


def prompts(batch, length, seed):
    return torch.randint(0, MASK, (batch, length), generator=torch.Generator().manual_seed(seed))


def confidence_of(logits):
    """(argmax, its probability in fp64) of logits [B, L, V]."""
    x0 = logits.argmax(-1)
    return x0, torch.softmax(logits.double(), -1).gather(-1, x0[..., None])[..., 0]


def transfer(x, logits, masked, k=None, tau=None):
    """get_transfer_index of Fast-dLLM: the k best of each row, or rank 1 and all that reach tau."""
    x0, c = confidence_of(logits)
    for b in range(x.shape[0]):
        order = by_rank(c[b].tolist(), masked[b].nonzero()[:, 0].tolist())
        taken = order[: k[b]] if tau is None else [i for r, i in enumerate(order) if r == 0 or c[b, i] >= tau]
        x[b, taken] = x0[b, taken]


def fast_dllm(model, prompt, new, block, steps, tau=None, cache=None, cfg=0.0, shift=False):
    """LLaDA's generate (cache None) and Fast-dLLM's with a prefix or dual cache. Returns (tokens, model calls).

    shift: the calls of Fast-dLLM's Dream, with logits shifted right. Its own loop feeds the block alone and commits
    the block's first position at the first evaluation whatever its confidence; here one position more is fed.
    """
    batch, length = prompt.shape
    x = torch.full((batch, length + new), MASK)
    x[:, :length] = prompt
    calls = 0
    dual = {"dual_cache": True} if shift else {}
    for start in range(length, length + new, block):
        end, first = start + block, start - shift
        counts = [transfer_counts(block, steps) for _ in range(batch)]
        past, step = None, 0
        while bool((x[:, start:end] == MASK).any()):
            if past is None:
                place, fed = 0, x
                if cfg:
                    hidden = x.clone()
                    hidden[:, :length] = MASK
                    conditional, unconditional = model(torch.cat([x, hidden])).logits.chunk(2)
                    logits = unconditional + (cfg + 1) * (conditional - unconditional)
                elif cache is None:
                    logits = model(x).logits
                else:
                    output = model(x, use_cache=True)
                    logits, past = output.logits, output.past_key_values
                if cache == "prefix":
                    past = [(k[..., :first, :], v[..., :first, :]) for k, v in past]
            elif cache == "prefix":
                place, fed = first, x[:, first:]
                logits = model(fed, past_key_values=past, use_cache=True).logits
            else:
                place, fed = first, x[:, first:end]
                replaced = torch.zeros_like(x, dtype=torch.bool)
                replaced[:, first:end] = True
                logits = model(
                    fed, past_key_values=past, use_cache=True, replace_position=replaced, **dual
                ).logits
            if shift:
                logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
            calls += 1
            masked = (fed == MASK) & (torch.arange(fed.shape[1]) + place < end)
            k = None if tau is not None else [counts[b][step] for b in range(batch)]
            transfer(x[:, place : place + fed.shape[1]], logits, masked, k, tau)
            step += 1
    return x, calls


INTERFACES = {None: FullSequence(), "prefix": PrefixCache(), "dual": DualCache()}


@pytest.mark.parametrize("cache", INTERFACES)
@pytest.mark.parametrize("tau", [None, 0.5])
@pytest.mark.parametrize("shift", [False, True], ids=["llada", "dream"])
def test_llada_and_fast_dllm(shift, cache, tau):
    kind = FastDream if shift else LLaDA if cache is None else FastLLaDA
    for seed in SEEDS:
        prompt = prompts(3, 5, seed)
        expected, calls = fast_dllm(kind(seed), prompt, 16, 8, 4, tau, cache, shift=shift)
        sampler = MaskedDiffusionSampler.for_llada(
            LowConfidence() if tau is None else Threshold(tau),
            mask_id=MASK,
            block_length=8,
            steps=4 if tau is None else None,
            interface=replace(INTERFACES[cache], shift_logits=shift),
        )
        model = kind(seed)
        result = sampler.generate(model, prompt, 16)
        assert torch.equal(result.sequences, expected)
        assert result.calls == calls == len(model.calls)
        # A row that is done early in a block waits for the others.
        assert int(result.nfe.max()) <= calls
        assert tau is not None or result.nfe.tolist() == [calls] * 3
        assert not result.stuck.any()


def test_llada_that_ignores_its_mask_gives_each_row_what_it_gives_it_alone():
    rows = [prompts(1, length, length)[0] for length in (3, 7, 3, 5)]
    sampler = MaskedDiffusionSampler.for_llada(mask_id=MASK, block_length=8, steps=4)
    model = FastLLaDA(0)
    together = sampler.generate(model, rows, 8).new_tokens
    alone = [sampler.generate(FastLLaDA(0), row[None], 8).new_tokens[0] for row in rows]
    assert torch.equal(together, torch.stack(alone))
    assert {length for _, length in model.calls} == {11, 15, 13}
    padded = MaskedDiffusionSampler.for_llada(mask_id=MASK, block_length=8, steps=4, interface=FullSequence())
    assert not torch.equal(padded.generate(FastLLaDA(0), rows, 8).new_tokens, together)


def test_caches_are_used():
    prompt = prompts(2, 5, 0)
    fed = {}
    for cache in ("prefix", "dual"):
        model = FastLLaDA(0)
        numbers = {"mask_id": MASK, "block_length": 4, "interface": INTERFACES[cache]}
        MaskedDiffusionSampler(LowConfidence(), **numbers).generate(model, prompt, 8)
        fed[cache] = [length for _, length in model.calls]
    assert fed["prefix"] == [13, 8, 8, 8, 13, 4, 4, 4]
    assert fed["dual"] == [13, 4, 4, 4, 13, 4, 4, 4]


def test_guidance_without_a_mask():
    for seed in SEEDS:
        prompt = prompts(2, 4, seed)
        expected, calls = fast_dllm(LLaDA(seed), prompt, 8, 8, 8, cfg=1.5)
        sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=8, guidance_scale=1.5)
        result = sampler.generate(LLaDA(seed), prompt, 8)
        assert torch.equal(result.sequences, expected)
        assert result.nfe.tolist() == [2 * calls] * 2


def test_guidance_changes_the_text_and_keeps_ruled_out_tokens_out():
    class Banning(LLaDA):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits[..., 4] = -math.inf
            return output

    plain, guided = (
        MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, guidance_scale=w).generate(
            Banning(1), prompts(4, 6, 1), 16
        )
        for w in (0.0, 3.0)
    )
    assert not torch.equal(plain.sequences, guided.sequences)
    assert not (guided.new_tokens == 4).any()


def dream_sample(model, prompt, new, steps, score, tau=1e-3):
    """`_sample` of Dream, greedy, a batch of one."""
    x = torch.cat([prompt, torch.full((1, new), MASK)], 1)
    times = torch.linspace(1, tau, steps + 1)
    for i in range(steps):
        masked = (x == MASK)[0].nonzero()[:, 0].tolist()
        logits = model(x, "full", None).logits
        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        p = torch.softmax(logits[0].double(), -1)
        n = len(masked)
        k = int(torch.tensor(float(n)) * (1 - times[i + 1] / times[i])) if i < steps - 1 else n
        c = {"maskgit_plus": p.amax(-1), "entropy": (p * torch.log(p + 1e-300)).sum(-1)}[score].tolist()
        taken = by_rank(c, masked)[:k]
        x[0, taken] = logits[0, taken].argmax(-1)
    return x


@pytest.mark.parametrize("score", ["maskgit_plus", "entropy"])
def test_dream(score):
    strategy = {"maskgit_plus": MaskgitPlus(), "entropy": Entropy()}[score]
    for seed in SEEDS:
        sampler = MaskedDiffusionSampler.for_dream(strategy, mask_id=MASK, steps=7)
        rows = [prompts(1, length, seed)[0] for length in (3, 6, 6)]
        expected = [dream_sample(Dream(seed), row[None], 12, 7, score)[0] for row in rows]
        alone = sampler.generate(Dream(seed), rows[0][None], 12)
        assert torch.equal(alone.sequences[0], expected[0])
        # The same rows in one padded batch, with a 4-d mask and position ids.
        together = sampler.generate(Dream(seed), rows, 12)
        for row, new in zip(expected, together.new_tokens):
            assert torch.equal(new, row[-12:])


def sdar_generate(model, prompt, new, block, steps, strategy, tau=0.85):
    """block_diffusion_generate of SDAR, greedy; k never above the masks of the block (published code fails there)."""
    length = prompt.shape[1]
    blocks = -(-(length + new) // block)
    x = torch.full((1, blocks * block), MASK)
    x[:, :length] = prompt
    visible = torch.ones(blocks, blocks).tril().repeat_interleave(block, 0).repeat_interleave(block, 1)[None]
    places = torch.arange(blocks * block)[None]
    cache, whole = Store(), length // block * block
    if whole:
        model(
            x[:, :whole],
            attention_mask=visible[:, :whole, :whole],
            position_ids=places[:, :whole],
            past_key_values=cache,
            use_cache=True,
            store_kv=True,
        )
    counts = transfer_counts(block, steps)
    for start in range(whole, blocks * block, block):
        end = start + block
        options = dict(
            attention_mask=visible[:, start:end, :end],
            position_ids=places[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        current = x[:, start:end].clone()
        for step in range(steps + 1):
            masked = (current == MASK)[0].nonzero()[:, 0].tolist()
            if not masked:
                model(current, **options, store_kv=True)
                break
            x0, c = confidence_of(model(current, **options, store_kv=False).logits)
            c = c[0].tolist()
            k = counts[step]
            if strategy == "sequential":
                taken = [i for i in range(min(masked), min(masked) + k) if i in masked]
            else:
                high = [i for i in masked if c[i] > tau]
                dynamic = strategy == "low_confidence_dynamic"
                taken = high if dynamic and len(high) >= k else by_rank(c, masked)[:k]
            current[0, taken] = x0[0, taken]
        x[:, start:end] = current
    return x[:, : length + new]


@pytest.mark.parametrize("strategy", ["sequential", "low_confidence_static", "low_confidence_dynamic"])
@pytest.mark.parametrize("length", [0, 3, 4, 9])
def test_sdar(strategy, length):
    ours = {
        "sequential": SequentialWindow(),
        "low_confidence_static": LowConfidence(),
        "low_confidence_dynamic": LowConfidenceDynamic(0.6),
    }[strategy]
    for seed in SEEDS:
        prompt = prompts(1, length, seed)
        expected = sdar_generate(SDAR(seed), prompt, 10, 4, 3, strategy, 0.6)
        sampler = MaskedDiffusionSampler.for_sdar(
            ours, mask_id=MASK, steps=3, interface=BlockCache(new_cache=Store)
        )
        result = sampler.generate(SDAR(seed), prompt, 10)
        assert torch.equal(result.sequences, expected)
        assert torch.equal(result.sequences[:, :length], prompt)


def test_sdar_takes_batches_of_different_lengths():
    rows = [prompts(1, length, length)[0] for length in (9, 2, 9, 4)]
    sampler = MaskedDiffusionSampler.for_sdar(mask_id=MASK, interface=BlockCache(new_cache=Store))
    together = sampler.generate(SDAR(3), rows, 6)
    for number, row in enumerate(rows):
        alone = sampler.generate(SDAR(3), row[None], 6)
        assert torch.equal(together.new_tokens[number], alone.new_tokens[0])
        assert int(together.nfe[number]) == int(alone.nfe[0])


def joint_threshold(model, prompt, new, block, tau, tau_edit, budget, penalty_lambda=0.0):
    """The loop of SGLang's JointThreshold, a batch of one, with the model read anew at every iteration."""
    x = torch.cat([prompt, torch.full((1, new), MASK)], 1)
    for start in range(prompt.shape[1], x.shape[1], block):
        part = slice(start, start + block)
        edits = 0
        for _ in range(block + budget):
            logits = model(x).logits[0, part].clone()
            for i in range(1, block):
                logits[i, x[0, start + i - 1]] -= penalty_lambda
            best, p = confidence_of(logits[None])
            best, p, current = best[0], p[0], x[0, part]
            masked = current == MASK
            taken = masked & (p > tau)
            if masked.any():
                if not taken.any():
                    taken[by_rank(p.tolist(), masked.nonzero()[:, 0].tolist())[0]] = True
            else:
                edits += 1
                if edits > budget:
                    break
            taken |= ~masked & (best != current) & (p > tau_edit)
            if not taken.any():
                break
            x[0, part] = torch.where(taken, best, current)
    return x


# Parameters of the published models' forward, in their order.
FORWARDS = {
    # GSAI-ML/LLaDA-8B-Instruct, modeling_llada.py: not found at its own place, so from the copies in
    # monash-yann/dllm-research (models/LLaDA-8B-Instruct) and therkels/LLaDAText2SQL.
    "LLaDAModelLM": "input_ids inputs_embeds attention_mask attention_bias past_key_values labels use_cache "
    "output_attentions output_hidden_states return_dict cache_position",
    # NVlabs/Fast-dLLM, llada/model/modeling_llada.py: not found at its own place, so from the forks
    # hills-code/Fast-dLLM and seungkyun-dan/Fast-dLLM, under the same path.
    "LLaDAModelLM of Fast-dLLM": "input_ids inputs_embeds attention_mask attention_bias past_key_values labels "
    "use_cache output_attentions output_hidden_states return_dict replace_position",
    # Dream-org/Dream-v0-Instruct-7B, modeling_dream.py: not found at its own place, so from the copy in zhaoyMa/Saber
    # (Dream/modeling_dream.py).
    "DreamModel": "input_ids attention_mask position_ids past_key_values inputs_embeds labels use_cache "
    "output_attentions output_hidden_states return_dict cache_position num_logits_to_keep **loss_kwargs",
    # NVlabs/Fast-dLLM, dream/model/modeling_dream.py.
    "DreamModel of Fast-dLLM": "input_ids attention_mask position_ids past_key_values inputs_embeds labels use_cache "
    "output_attentions output_hidden_states return_dict cache_position num_logits_to_keep dual_cache "
    "replace_position **loss_kwargs",
    # JetAstra/SDAR, training/model/SDAR-4B-Chat/modeling_sdar.py.
    "SDARForCausalLM": "input_ids attention_mask position_ids past_key_values inputs_embeds labels use_cache "
    "output_attentions output_hidden_states cache_position logits_to_keep **kwargs",
}
# SDARForCausalLM hands its other arguments to SDARModel, which has this parameter.
HANDED_ON = {"SDARForCausalLM": {"store_kv"}}


def signature_of(forward):
    kinds = inspect.Parameter
    return inspect.Signature(
        [
            kinds(name.lstrip("*"), kinds.VAR_KEYWORD if name[0] == "*" else kinds.POSITIONAL_OR_KEYWORD)
            for name in FORWARDS[forward].split()
        ]
    )


SHIFTED = {cache: replace(INTERFACES[cache], shift_logits=True) for cache in ("prefix", "dual")}


@pytest.mark.parametrize(
    "forward, stand_in, interface, names",
    [
        ("LLaDAModelLM", LLaDA, FullSequence(), "attention_mask"),
        ("LLaDAModelLM of Fast-dLLM", FastLLaDA, PrefixCache(), "past_key_values use_cache"),
        ("LLaDAModelLM of Fast-dLLM", FastLLaDA, DualCache(), "past_key_values use_cache replace_position"),
        ("DreamModel", Dream, DREAM, "attention_mask position_ids"),
        ("DreamModel of Fast-dLLM", FastDream, SHIFTED["prefix"], "past_key_values use_cache"),
        (
            "DreamModel of Fast-dLLM",
            FastDream,
            SHIFTED["dual"],
            "past_key_values use_cache replace_position dual_cache",
        ),
        (
            "SDARForCausalLM",
            SDAR,
            BlockCache(new_cache=Store),
            "attention_mask position_ids past_key_values use_cache store_kv",
        ),
    ],
)
def test_calls_name_parameters_that_the_published_forward_has(forward, stand_in, interface, names):
    published = signature_of(forward)
    rest = next((p.name for p in published.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    model, seen = stand_in(1), set()

    def call(*args, **kwargs):
        bound = published.bind_partial(*args, **kwargs).arguments
        handed_on = bound.pop(rest, {})
        assert set(handed_on) <= HANDED_ON.get(forward, set())
        seen.update(bound, handed_on)
        return model(**bound, **handed_on)

    call.__signature__ = published
    sampler = MaskedDiffusionSampler(Threshold(0.6), mask_id=MASK, block_length=4, interface=interface)
    result = sampler.generate(call, [[1, 2, 3], [4, 5, 6, 7, 8]], 8)
    assert not (result.new_tokens == MASK).any()
    assert seen == {"input_ids", *names.split()}


class TransformersOutput(FastLLaDA):
    """Published code that returns its cache in an output of transformers, which renames it since 5.24."""

    def forward(self, *args, **kwargs):
        outputs = pytest.importorskip("transformers").modeling_outputs
        output = super().forward(*args, **kwargs)
        return outputs.CausalLMOutputWithPast(logits=output.logits, past_key_values=output.past_key_values)

    forward.__signature__ = inspect.signature(FastLLaDA.forward)


@pytest.mark.parametrize("interface", [PrefixCache(), DualCache()], ids=("prefix", "dual"))
def test_published_code_with_an_output_of_transformers(interface):
    sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=4, interface=interface)
    results = [sampler.generate(kind(2), prompts(3, 5, 2), 8) for kind in (FastLLaDA, TransformersOutput)]
    assert torch.equal(results[0].sequences, results[1].sequences)


@pytest.mark.filterwarnings("error:.*deprecated:FutureWarning")
def test_prefix_cache_of_a_model_of_transformers(monkeypatch):
    """The cache goes in and comes out under the name of the release, and is cut without a length."""
    transformers = pytest.importorskip("transformers")
    said = []
    # Outputs say it through their logger, arguments by a FutureWarning.
    monkeypatch.setattr(transformers.utils.generic.logger, "warning_once", said.append)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    # A causal model's prefix does not change while a block is decided, so the cache changes nothing.
    full, cached = (
        MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=4, interface=interface).generate(
            model, prompts(2, 5, 0), 12
        )
        for interface in (FullSequence(shift_logits=True), PrefixCache(shift_logits=True))
    )
    assert torch.equal(full.sequences, cached.sequences)
    assert not [text for text in said if "deprecated" in text]


def test_a_compiled_model_is_called_as_what_it_wraps():
    sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=4, interface=SHIFTED["dual"])
    plain = sampler.generate(FastDream(4), prompts(2, 5, 4), 8)
    compiled = sampler.generate(torch.compile(FastDream(4), backend="eager"), prompts(2, 5, 4), 8)
    assert torch.equal(plain.sequences, compiled.sequences)


def test_a_model_that_ignores_its_mask_gets_batches_of_one_length():
    rows = [[1], [2, 3, 4, 5, 6, 7], [8, 9, 1]]
    sampler = MaskedDiffusionSampler(
        LowConfidence(), mask_id=MASK, block_length=4, interface=FullSequence(attention_mask=None)
    )
    together = sampler.generate(FastLLaDA(5), rows, 8)
    for number, row in enumerate(rows):
        assert torch.equal(
            together.new_tokens[number], sampler.generate(FastLLaDA(5), [row], 8).new_tokens[0]
        )


@pytest.mark.parametrize("penalty_lambda", [0.0, 2.0])
def test_sglang_joint_threshold(penalty_lambda):
    edited = 0
    for seed in range(16):
        prompt = prompts(1, 4, seed)
        expected = joint_threshold(LLaDA(seed), prompt, 12, 6, 0.4, 0.3, 4, penalty_lambda)
        strategy = JointThresholdEdit(0.4, 0.3, edit_budget=4, penalty_lambda=penalty_lambda)
        seen = []
        sampler = MaskedDiffusionSampler(strategy, mask_id=MASK, block_length=6)
        result = sampler.generate(LLaDA(seed), prompt, 12, callback=lambda x, *_, seen=seen: seen.append(x))
        assert torch.equal(result.sequences, expected)
        edited += sum(int(((a != MASK) & (a != b)).any()) for a, b in pairwise(seen))
    assert edited > 10


def test_the_penalty_changes_the_text():
    texts = [
        MaskedDiffusionSampler(
            JointThresholdEdit(0.4, 0.3, edit_budget=4, penalty_lambda=penalty), mask_id=MASK, block_length=6
        ).generate(LLaDA(3), prompts(4, 4, 3), 12)
        for penalty in (0.0, 2.0)
    ]
    assert not torch.equal(texts[0].sequences, texts[1].sequences)


class DroppingStore(Store):
    """A store whose rows can be dropped, as those of transformers' DynamicCache."""

    def batch_select_indices(self, indices):
        if self.layers is not None:
            self.layers = [(k[indices], v[indices]) for k, v in self.layers]


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "interface, model",
    [
        (FullSequence(), LLaDA),
        (PrefixCache(), FastLLaDA),
        (DualCache(), FastLLaDA),
        (BlockCache(new_cache=DroppingStore), SDAR),
    ],
    ids=("full", "prefix", "dual", "block"),
)
def test_rows_that_are_done_are_not_fed(monkeypatch, interface, model, temperature, guidance_scale):
    def run(eos_id, number):
        sampler = MaskedDiffusionSampler(
            Threshold(0.6), mask_id=MASK, block_length=4, eos_id=eos_id, interface=interface,
            temperature=temperature, guidance_scale=guidance_scale,
        )  # fmt: skip
        return sampler.generate(model(number), prompts(6, 8, number), 16, seed=3)

    # A model and a token that ends some rows early and others not.
    eos_id, number = next(
        (token, number)
        for number in SEEDS
        for first in [run(None, number).new_tokens[:, :8]]
        for token in range(MASK)
        if 0 < int((first == token).any(-1).sum()) < 6
    )
    dropped = run(eos_id, number)
    session = type(interface).session
    monkeypatch.setattr(session, "select", lambda self, rows: False)
    whole = run(eos_id, number)
    assert torch.equal(dropped.sequences, whole.sequences)
    for name in ("nfe", "ended", "stuck"):
        assert torch.equal(getattr(dropped, name), getattr(whole, name))
    assert dropped.calls == whole.calls
    assert dropped.rows_fed < whole.rows_fed
    assert bool(whole.ended.any())
    if isinstance(interface, FullSequence):
        assert dropped.rows_fed == int(dropped.nfe.sum())


def test_transformers_cache_drops_rows():
    transformers = pytest.importorskip("transformers")
    assert hasattr(transformers.DynamicCache(), "batch_select_indices")


STRATEGIES = (
    LowConfidence(),
    Threshold(0.6),
    Factor(1.0),
    HierarchyWithRemask(0.8, 0.4, 0.3),
    DInferThreshold(0.6),
)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)
def test_a_batch_of_different_lengths_is_each_row_alone(strategy):
    rows = [[], [1], [2, 3, 4, 5, 6, 7], [8, 9, 1]]
    sampler = MaskedDiffusionSampler(strategy, mask_id=MASK, block_length=4, eos_id=2)
    together = sampler.generate(LLaDA(5), rows, 10)
    assert together.sequences.shape == (4, 16)
    for number, row in enumerate(rows):
        alone = sampler.generate(LLaDA(5), [row], 10)
        assert torch.equal(together.new_tokens[number], alone.new_tokens[0])
        assert int(together.nfe[number]) == int(alone.nfe[0])
        assert together.sequences[number, 6 - len(row) : 6].tolist() == row
        assert (together.sequences[number, : 6 - len(row)] == 2).all()


def test_padded_tensor_prompts():
    ids = torch.tensor([[1, 2, 0, 0], [3, 4, 5, 6]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK)
    padded = sampler.generate(LLaDA(1), ids, 8, attention_mask=mask)
    listed = sampler.generate(LLaDA(1), [[1, 2], [3, 4, 5, 6]], 8)
    assert torch.equal(padded.sequences, listed.sequences)


class Fixed(torch.nn.Module):
    """Says `text` whatever it reads, or line n of it to a prompt that begins with n; `kind` is the answer's form."""

    def __init__(self, text, kind="tensor"):
        super().__init__()
        self.text, self.kind, self.calls = torch.tensor(text), kind, 0

    def forward(self, tokens):
        self.calls += 1
        logits = torch.zeros(*tokens.shape, VOCAB)
        text = self.text if self.text.ndim == 1 else self.text[tokens[:, 0]]
        logits.scatter_(-1, text[..., -tokens.shape[1] :].expand_as(tokens)[..., None], 30.0)
        forms = {
            "tensor": logits,
            "tuple": (logits, None),
            "dict": {"logits": logits},
            "object": SimpleNamespace(logits=logits),
        }
        return forms[self.kind]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "object"])
def test_any_form_of_logits(kind):
    model = Fixed([1, 2, 3, 4, 5, 6], kind)
    result = MaskedDiffusionSampler(Threshold(0.9), mask_id=MASK).generate(model, torch.tensor([[1, 2]]), 4)
    assert result.sequences.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert result.nfe.tolist() == [1]
    result = MaskedDiffusionSampler(Threshold(0.9), mask_id=MASK).generate(lambda x: model(x), [[1, 2]], 4)
    assert result.sequences.tolist() == [[1, 2, 3, 4, 5, 6]]


def test_end_tokens():
    model = Fixed([[1, 5, 6, 7, 21, 8, 9, 9, 9, 9], [1, 5, 6, 7, 8, 9, 10, 11, 12, 20]])
    numbers = {"mask_id": MASK, "block_length": 3, "pad_id": 0}
    ends = MaskedDiffusionSampler(Threshold(0.5), **numbers, eos_id=(20, 21))
    result = ends.generate(model, [[0], [1]], 9)
    assert result.new_tokens.tolist() == [[5, 6, 7, 21, 0, 0, 0, 0, 0], [5, 6, 7, 8, 9, 10, 11, 12, 20]]
    assert result.nfe.tolist() == [2, 3]
    assert result.ended.tolist() == [True, True]
    endless = MaskedDiffusionSampler(Threshold(0.5), **numbers).generate(model, [[0], [1]], 9)
    assert endless.new_tokens[0].tolist() == [5, 6, 7, 21, 8, 9, 9, 9, 9]
    assert not endless.ended.any()


def test_generation_stops_when_all_rows_ended():
    model, recorder = Fixed([1, 5, 6, 21, 8, 9, 9, 9, 9, 9]), Recorder()
    sampler = MaskedDiffusionSampler(Threshold(0.5), mask_id=MASK, block_length=4, eos_id=21, pad_id=0)
    result = sampler.generate(model, [[1]], 9, streamer=recorder)
    assert ("put", [[5, 6, 21, 0]]) in recorder.events
    assert model.calls == result.calls == 1
    assert result.new_tokens.tolist() == [[5, 6, 21] + [0] * 6]


def test_the_last_block_may_be_short():
    for cached in (FullSequence(), PrefixCache(), DualCache()):
        sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=4, interface=cached)
        result = sampler.generate(FastLLaDA(2), prompts(2, 3, 2), 6)
        assert result.sequences.shape == (2, 9)
        assert not (result.sequences == MASK).any()


def test_steps_limit_flags_what_is_left():
    sampler = MaskedDiffusionSampler(Threshold(1.0), mask_id=MASK, block_length=8, steps=3)
    result = sampler.generate(LLaDA(0), prompts(2, 3, 0), 16)
    assert result.stuck.all()
    assert result.nfe.tolist() == [3, 3]
    assert (result.new_tokens == MASK).sum(-1).tolist() == [13, 13]


def test_a_stuck_row_does_not_stop_the_others():
    def model(tokens, attention_mask=None):
        logits = torch.zeros(*tokens.shape, VOCAB)
        # By the prompt's first place: 0, the padding, in the row that proposes the mask alone.
        logits[tokens[:, 0] == 0, :, MASK] = 9.0
        logits[tokens[:, 0] == 1, :, 5] = 9.0
        return logits

    sampler = MaskedDiffusionSampler(DInferThreshold(0.5), mask_id=MASK, block_length=4)
    result = sampler.generate(model, [[1], [1, 2]], 8)
    assert result.stuck.tolist() == [True, False]
    assert result.new_tokens.tolist() == [[MASK] * 8, [5] * 8]
    assert result.nfe.tolist() == [1, 2]


class Recorder:
    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append(("put", value.tolist()))

    def put_draft(self, value, **kwargs):
        self.events.append(("draft", value.tolist()))

    def end(self):
        self.events.append(("end", None))


def test_streaming_of_drafts():
    recorder, steps = Recorder(), []
    sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=4, steps=2)
    result = sampler.generate(
        LLaDA(0),
        [[1, 2]],
        8,
        streamer=recorder,
        callback=lambda x, block, step: steps.append((x.shape, block, step)),
    )
    assert [kind for kind, _ in recorder.events] == ["put", *["draft", "draft", "put"] * 2, "end"]
    assert recorder.events[0] == ("put", [[1, 2]])
    assert sum(token == MASK for token in recorder.events[1][1][0]) == 2
    written = [value for kind, value in recorder.events if kind == "put"][1:]
    assert torch.tensor(written).reshape(1, 8).equal(result.new_tokens)
    assert steps == [((1, 10), 0, 0), ((1, 10), 0, 1), ((1, 10), 1, 0), ((1, 10), 1, 1)]
    with pytest.raises(ValueError, match="streamer: one prompt"):
        sampler.generate(LLaDA(0), [[1], [2]], 8, streamer=recorder)


def test_seeds():
    sampler = MaskedDiffusionSampler(Random(), mask_id=MASK, temperature=1.5, block_length=8)
    model, prompt = LLaDA(0), prompts(2, 3, 0)
    first, same, other = (sampler.generate(model, prompt, 16, seed=s).sequences for s in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    torch.manual_seed(4)
    one = sampler.generate(model, prompt, 16).sequences
    torch.manual_seed(4)
    assert torch.equal(one, sampler.generate(model, prompt, 16).sequences)


def test_temperature_of_the_step_and_of_the_row():
    model, prompt = LLaDA(0, sharpness=1.0), prompts(3, 3, 0)
    seen = []

    def temperature(step, steps):
        seen.append((step, steps))
        return 0.0

    greedy = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=4, steps=2)
    by_step = MaskedDiffusionSampler(
        LowConfidence(), mask_id=MASK, block_length=4, steps=2, temperature=temperature
    )
    expected = greedy.generate(model, prompt, 4).sequences
    assert torch.equal(by_step.generate(model, prompt, 4).sequences, expected)
    assert seen == [(0, 2), (1, 2)]
    by_row = MaskedDiffusionSampler(
        LowConfidence(), mask_id=MASK, block_length=4, steps=2, temperature=torch.tensor([0.0, 3.0, 0.0])
    )
    result = by_row.generate(model, prompt, 4, seed=0).sequences
    assert torch.equal(result[::2], expected[::2]) and not torch.equal(result[1], expected[1])
    with pytest.raises(ValueError, match="temperature: one value per prompt"):
        by_row.generate(model, prompts(2, 3, 0), 4)


def test_uniform_noise_generation():
    text = [1, 5, 6, 7, 2, 8, 9, 9, 4]
    model = Fixed(text)
    sampler = MaskedDiffusionSampler(EntropyBoundRenoise(VOCAB), mask_id=0, block_length=4, steps=20)
    result = sampler.generate(model, [[1]], 8, seed=1)
    assert result.sequences.tolist() == [text]
    # Certain from the first step on, and stable one step later.
    assert result.nfe.tolist() == [4]


def test_transformers_masked_language_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    model = transformers.BertForMaskedLM(config).eval()
    sampler = MaskedDiffusionSampler(
        LowConfidence(), mask_id=MASK, block_length=4, interface=FullSequence(position_ids=True)
    )
    rows = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    together = sampler.generate(model, rows, 8)
    for number, row in enumerate(rows):
        assert torch.equal(together.new_tokens[number], sampler.generate(model, [row], 8).new_tokens[0])


def test_transformers_streamer():
    transformers = pytest.importorskip("transformers")
    written = []

    class Tokenizer:
        def decode(self, tokens, **kwargs):
            return " ".join(map(str, torch.as_tensor(tokens).tolist()))

    class Quiet(transformers.TextDiffusionStreamer):
        def on_finalized_text(self, text, stream_end=False):
            written.append(text)

    sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=4)
    result = sampler.generate(LLaDA(0), [[1, 2]], 4, streamer=Quiet(Tokenizer()))
    assert "".join(written).split() == [str(token) for token in result.sequences[0].tolist()]


def too_short(tokens):
    return torch.zeros(tokens.shape[0], tokens.shape[1] - 1, VOCAB)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((too_short, [[1]], 4), {}, r"model: logits must be \[1, 5, V\] like its tokens, got \(1, 4, 23\)"),
        ((lambda x: torch.zeros(*x.shape), [[1]], 4), {}, "model: logits must be"),
        ((lambda x: "text", [[1]], 4), {}, "model: must return logits"),
        ((lambda x: torch.zeros(*x.shape, MASK), [[1]], 4), {}, "mask_id: 22 is outside the vocabulary"),
        (("model", [[1]], 4), {}, "model: a callable"),
        ((LLaDA(), [[1]], 0), {}, "max_new_tokens"),
        ((LLaDA(), [], 4), {}, "prompt_ids: at least one"),
        ((LLaDA(), torch.zeros(2, 3), 4), {}, "prompt_ids: dtype"),
        ((LLaDA(), torch.zeros(3, dtype=torch.int64), 4), {}, r"prompt_ids: shape must be \[B, L\]"),
        ((LLaDA(), [[[1]]], 4), {}, r"prompt_ids\[0\]"),
        ((Fixed([1, 2, 3, 4, 5]), [[1]], 4), {"interface": PrefixCache()}, "use_cache"),
        (
            (lambda x, **_: torch.zeros(*x.shape, VOCAB), [[1]], 4),
            {"interface": DualCache()},
            "past_key_values",
        ),
    ],
)
def test_bad_calls(arguments, options, message):
    sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, **options)
    with pytest.raises((TypeError, ValueError), match=message):
        sampler.generate(*arguments)


def test_bad_interfaces():
    with pytest.raises(ValueError, match="attention_mask"):
        FullSequence(attention_mask="3d")
    with pytest.raises(ValueError, match="BlockCache"):
        MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=None, interface=BlockCache())
    with pytest.raises(ValueError, match="shift_logits"):
        BlockCache(shift_logits=True)


def test_shifted_logits_with_caches():
    """A shifted model with a cache is fed one position more, so that no position loses its prediction."""

    for seed in SEEDS:
        prompt = prompts(2, 4, seed)
        # One block, one step: what the caches answer at the first evaluation is the whole sequence's.
        full = MaskedDiffusionSampler(
            LowConfidence(), mask_id=MASK, block_length=8, steps=1, interface=FullSequence(shift_logits=True)
        ).generate(FastDream(seed), prompt, 8)
        for cached in (PrefixCache(shift_logits=True), DualCache(shift_logits=True)):
            numbers = {"mask_id": MASK, "block_length": 8, "interface": cached}
            one = MaskedDiffusionSampler(LowConfidence(), steps=1, **numbers).generate(
                FastDream(seed), prompt, 8
            )
            assert torch.equal(one.sequences, full.sequences)
            model = FastDream(seed)
            MaskedDiffusionSampler(LowConfidence(), steps=2, **numbers).generate(model, prompt, 8)
            assert model.calls == [(2, 12), (2, 9)]
