"""`MaskedDiffusionSampler.generate` against the published generation loops, on stand-ins of their models."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from samplers_literal import by_rank, transfer_counts
from samplers_models import (
    INTERFACES,
    MASK,
    SDAR,
    SEEDS,
    VOCAB,
    Dream,
    FastDream,
    FastLLaDA,
    FastQwen,
    LLaDA,
    LLaDA2,
    Nemotron,
    Store,
    prompts,
)

import dgemma_accel
from dgemma_accel.samplers import (
    BlockCache,
    CausalContext,
    Entropy,
    HierarchicalCache,
    JointThresholdEdit,
    LowConfidence,
    LowConfidenceDynamic,
    MaskedDiffusionSampler,
    MaskgitPlus,
    SequentialWindow,
    Threshold,
)


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


def test_guidance_without_a_mask():
    for seed in SEEDS:
        prompt = prompts(2, 4, seed)
        expected, calls = fast_dllm(LLaDA(seed), prompt, 8, 8, 8, cfg=1.5)
        sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=8, guidance_scale=1.5)
        result = sampler.generate(LLaDA(seed), prompt, 8)
        assert torch.equal(result.sequences, expected)
        assert result.nfe.tolist() == [2 * calls] * 2


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
            ours, mask_id=MASK, steps=3, temperature=0.0, interface=BlockCache(new_cache=Store)
        )
        result = sampler.generate(SDAR(seed), prompt, 10)
        assert torch.equal(result.sequences, expected)
        assert torch.equal(result.sequences[:, :length], prompt)


def test_sdar_takes_batches_of_different_lengths():
    rows = [prompts(1, length, length)[0] for length in (9, 2, 9, 4)]
    sampler = MaskedDiffusionSampler.for_sdar(
        mask_id=MASK, temperature=0.0, interface=BlockCache(new_cache=Store)
    )
    together = sampler.generate(SDAR(3), rows, 6)
    for number, row in enumerate(rows):
        alone = sampler.generate(SDAR(3), row[None], 6)
        assert torch.equal(together.new_tokens[number], alone.new_tokens[0])
        assert int(together.nfe[number]) == int(alone.nfe[0])


def test_sdar_samples_at_temperature_1_as_published():
    numbers = {"mask_id": MASK, "interface": BlockCache(new_cache=Store)}
    default, sampled, greedy = (
        MaskedDiffusionSampler.for_sdar(**numbers, **options).generate(SDAR(3), prompts(1, 5, 3), 24, seed=2)
        for options in ({}, {"temperature": 1.0}, {"temperature": 0.0})
    )
    assert torch.equal(default.sequences, sampled.sequences)
    assert not torch.equal(default.sequences, greedy.sequences)


def llada2_generate(model, prompt, new, block, steps, tau):
    """LLaDA2's generate, greedy. Returns (tokens, model calls)."""
    length = prompt.shape[1]
    blocks = -(-(length + new) // block)
    x = torch.full((1, blocks * block), MASK)
    x[:, :length] = prompt
    visible = torch.ones(blocks, blocks).tril().repeat_interleave(block, 0).repeat_interleave(block, 1)
    counts, calls = transfer_counts(block, steps), 0
    for end in range((length // block + 1) * block, blocks * block + 1, block):
        for step in range(steps):
            masked = (x[0, end - block : end] == MASK).nonzero()[:, 0].tolist()
            if not masked:
                break
            logits = model(
                x[:, :end],
                attention_mask=visible[None, None, :end, :end].log(),
                position_ids=torch.arange(end)[None],
            ).logits[:, end - block :]
            calls += 1
            x0, c = confidence_of(logits)
            c = c[0].tolist()
            high = [i for i in masked if c[i] > tau]
            taken = high if len(high) >= counts[step] else by_rank(c, masked)[: counts[step]]
            x[0, [end - block + i for i in taken]] = x0[0, taken]
    return x[:, : length + new], calls


@pytest.mark.parametrize("length", [0, 3, 4, 9])
@pytest.mark.parametrize("steps", [2, 4])
def test_llada2(length, steps):
    for seed in SEEDS:
        prompt = prompts(1, length, seed)
        expected, calls = llada2_generate(LLaDA2(seed), prompt, 10, 4, steps, 0.6)
        sampler = MaskedDiffusionSampler.for_llada2(
            LowConfidenceDynamic(0.6), mask_id=MASK, block_length=4, steps=steps
        )
        result = sampler.generate(LLaDA2(seed), prompt, 10)
        assert torch.equal(result.sequences, expected) and result.calls == calls


def test_llada2_takes_batches_of_different_lengths():
    rows = [prompts(1, length, length)[0] for length in (9, 2, 9, 4)]
    sampler = MaskedDiffusionSampler.for_llada2(mask_id=MASK, block_length=4, steps=3)
    together = sampler.generate(LLaDA2(3), rows, 6)
    for number, row in enumerate(rows):
        alone = sampler.generate(LLaDA2(3), row[None], 6)
        assert torch.equal(together.new_tokens[number], alone.new_tokens[0])
        assert int(together.nfe[number]) == int(alone.nfe[0])


def test_llada2_in_half_precision_gets_its_mask_in_it():
    sampler = MaskedDiffusionSampler.for_llada2(mask_id=MASK, block_length=4, steps=4)
    result = sampler.generate(LLaDA2(1).bfloat16(), prompts(2, 5, 1), 8)
    assert not (result.new_tokens == MASK).any()


def fast_dllm_v2(model, prompt, new, block, small, tau, use_block_cache, stop=None):
    """generate of Fast-dLLM v2, greedy, with a prompt of `block` tokens read as longer ones are.

    Returns (tokens, model calls); the tokens end with `stop`, or where `new` are written.
    """
    length = prompt.shape[1]
    x, past, calls = prompt, None, 0

    def ended():
        """Whether a stop token is there and no mask before it, in the row's new tokens."""
        written = x[0, length:].tolist()
        return stop in written and MASK not in written[: written.index(stop)]

    whole = length // block * block
    if whole:
        output = model(x[:, :whole], use_cache=True, update_past_key_values=True, block_size=block)
        calls, past = 1, output.past_key_values
        if whole == length:
            x = torch.cat([x, output.logits[:, -1:].argmax(-1)], 1)
    while x.shape[1] < length + new and not ended():
        x = torch.cat([x, torch.full((len(x), block - x.shape[1] % block), MASK)], 1)
        within, own = None, slice(x.shape[1] - block, x.shape[1])
        for start in range(own.start, own.stop, small):
            part = slice(start, start + small)
            if start >= length + new:
                break
            while bool((x[:, part] == MASK).any()) and not ended():
                fed = {"use_cache": True, "past_key_values": past, "block_size": block}
                alone = within is not None and not bool((x[:, start] == MASK).any())
                if use_block_cache and alone:
                    logits = model(
                        x[:, part], **fed, use_block_cache=True, block_past_key_values=within,
                        replace_position=start - own.start,
                    ).logits  # fmt: skip
                else:
                    output = model(x[:, own], **fed, use_block_cache=use_block_cache)
                    logits, within = output.logits, output.block_past_key_values
                calls += 1
                logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
                if logits.shape[1] == block:
                    logits = logits[:, start - own.start :][:, :small]
                x0, c = confidence_of(logits)
                for b in range(len(x)):
                    masked = (x[b, part] == MASK).nonzero()[:, 0].tolist()
                    best = by_rank(c[b].tolist(), masked)[:1]
                    for i in masked:
                        if c[b, i] > tau or i in best:
                            x[b, start + i] = x0[b, i]
        if x.shape[1] >= length + new or ended():
            break
        output = model(
            x[:, own], use_cache=True, past_key_values=past, update_past_key_values=True, block_size=block
        )
        calls, past = calls + 1, output.past_key_values
        x = torch.cat([x, output.logits[:, -1:].argmax(-1)], 1)
    x = x[:, : length + new]
    if stop is not None and stop in x[0, length:]:
        x = x[:, : length + x[0, length:].tolist().index(stop) + 1]
    return x, calls


@pytest.mark.parametrize("use_block_cache", [False, True], ids=["blocks", "sub-blocks"])
@pytest.mark.parametrize("length", [0, 3, 8, 9, 15, 16])
def test_fast_dllm_v2(length, use_block_cache):
    interface = HierarchicalCache(model_block_length=8, use_block_cache=use_block_cache)
    alone = 0
    for seed in SEEDS:
        prompt = prompts(3, length, seed)
        expected, calls = fast_dllm_v2(FastQwen(seed), prompt, 21, 8, 4, 0.4, use_block_cache)
        sampler = MaskedDiffusionSampler.for_fast_dllm_v2(
            Threshold(0.4, strict=True), mask_id=MASK, block_length=4, interface=interface
        )
        model = FastQwen(seed)
        result = sampler.generate(model, prompt, 21)
        assert torch.equal(result.sequences, expected)
        assert result.calls == calls == len(model.calls)
        assert not result.stuck.any()
        alone += sum(fed == 4 for _, fed in model.calls)
    assert (alone > 0) == use_block_cache


def test_fast_dllm_v2_ends_where_its_code_does():
    """Up to the end token the texts are the same: what is written behind it in its sub-block becomes padding."""
    ended, first_of_a_block = 0, 0
    for seed in range(40):
        prompt, stop = prompts(1, 5 + seed % 4, seed), seed % 7
        expected, calls = fast_dllm_v2(FastQwen(seed), prompt, 27, 8, 4, 0.4, False, stop)
        sampler = MaskedDiffusionSampler.for_fast_dllm_v2(
            Threshold(0.4, strict=True), mask_id=MASK, block_length=4, eos_id=stop, pad_id=21,
            interface=HierarchicalCache(model_block_length=8),
        )  # fmt: skip
        result = sampler.generate(FastQwen(seed), prompt, 27)
        assert torch.equal(result.sequences[:, : expected.shape[1]], expected)
        assert bool((result.sequences[:, expected.shape[1] :] == 21).all())
        assert bool(result.ended) == (expected[0, -1] == stop)
        ended += bool(result.ended)
        if result.ended and expected.shape[1] % 8 == 1:
            # Seen before the block that it begins is evaluated.
            first_of_a_block += 1
            assert result.calls == calls
    assert ended > 10 and first_of_a_block > 0


def test_fast_dllm_v2_takes_batches_of_different_lengths():
    rows = [prompts(1, length, length)[0] for length in (9, 2, 9, 8)]
    sampler = MaskedDiffusionSampler.for_fast_dllm_v2(
        mask_id=MASK, block_length=4, interface=HierarchicalCache(model_block_length=8)
    )
    together = sampler.generate(FastQwen(3), rows, 14)
    for number, row in enumerate(rows):
        alone = sampler.generate(FastQwen(3), row[None], 14)
        assert torch.equal(together.new_tokens[number], alone.new_tokens[0])
        assert int(together.nfe[number]) == int(alone.nfe[0])


def test_a_first_token_without_a_distribution_stays_a_mask():
    """The block's own evaluation decides it then."""

    class Broken(FastQwen):
        def forward(self, input_ids, update_past_key_values=False, **kwargs):
            output = super().forward(input_ids, update_past_key_values=update_past_key_values, **kwargs)
            if update_past_key_values:
                output.logits[1] = torch.nan
            else:
                begins.append((input_ids[:, 0] == MASK).tolist())
            return output

    sampler = MaskedDiffusionSampler.for_fast_dllm_v2(
        mask_id=MASK, block_length=4, interface=HierarchicalCache(model_block_length=8)
    )
    begins = []
    result = sampler.generate(Broken(0), prompts(3, 8, 0), 8)
    assert begins[0] == [False, True, False] and begins[-1] == [False] * 3
    whole = sampler.generate(FastQwen(0), prompts(3, 8, 0), 8)
    assert torch.equal(result.new_tokens[[0, 2]], whole.new_tokens[[0, 2]])
    assert not (result.new_tokens == MASK).any()


def nemotron(model, prompt, new, block, tau=None, causal=True, stop=-1):
    """NemotronLabsDiffusionModel.generate, greedy: (text, calls that a model gets)."""

    def diffusion_lm(value):
        for layer in model.encoder.layers:
            layer.self_attn.diffusion_lm = value

    def read(tokens, past):
        if causal:
            diffusion_lm(False)
        output = model(tokens, past_key_values=past, use_cache=True, use_causal_mask=causal)
        diffusion_lm(True)
        return output.past_key_values, output.logits[:, -1].argmax(-1)

    x, length, calls = prompt, prompt.shape[1], 1
    past, following = read(x, None)
    for start in range(length, length + new, block):
        own = torch.full((len(x), block), MASK)
        if causal:
            own[:, 0] = following
        x = torch.cat([x, own], 1)
        part = slice(start, start + block)
        masks = (x[:, part] == MASK).sum(-1)
        for step in range(block):
            masked = x[:, part] == MASK
            if not masked.any():
                break
            calls += 1
            x0, c = confidence_of(model(x[:, part], past_key_values=past, use_cache=False).logits)
            for b in range(len(x)):
                ranked = by_rank(c[b].tolist(), masked[b].nonzero()[:, 0].tolist())
                if tau is None:
                    count = int(masks[b]) // block + (step < int(masks[b]) % block)
                    taken = ranked[:count]
                else:
                    taken = [i for rank, i in enumerate(ranked) if rank == 0 or c[b, i] >= tau]
                for i in taken:
                    x[b, start + i] = x0[b, i]
            found = x[:, part] == stop
            before = (x[:, part] == MASK) & ~found.long().cumsum(-1).bool()
            if bool((found.any(-1) & ~before.any(-1)).any()):
                break
        past, following = read(x[:, part], past)
        calls += 1
        ends = x[:, length:] == stop
        if bool(ends.any(-1).all()):
            return x[:, : length + int(ends.long().argmax(-1).max()) + 1], calls
    return x, calls


@pytest.mark.parametrize("causal", [True, False], ids=["causal context", "whole"])
@pytest.mark.parametrize("tau", [None, 0.4])
@pytest.mark.parametrize("length", [1, 6, 11])
def test_nemotron_labs(length, tau, causal):
    strategy = LowConfidence() if tau is None else Threshold(tau)
    for seed in SEEDS:
        prompt = prompts(3, length, seed)
        expected, calls = nemotron(Nemotron(seed), prompt, 24, 8, tau, causal)
        sampler = MaskedDiffusionSampler.for_nemotron_labs(
            strategy, mask_id=MASK, block_length=8, interface=CausalContext(causal_context=causal)
        )
        model = Nemotron(seed)
        result = sampler.generate(model, prompt, 24)
        assert torch.equal(result.sequences, expected)
        # What is stored after the last block serves nobody.
        assert result.calls == calls - 1 == len(model.calls)
        assert not result.stuck.any()
        assert all(layer.self_attn.diffusion_lm for layer in model.encoder.layers)


def test_nemotron_labs_ends_where_its_code_does():
    ended, first_of_a_block = 0, 0
    for seed in range(40):
        prompt, stop = prompts(1, 5 + seed % 4, seed), seed % 7
        expected, _ = nemotron(Nemotron(seed), prompt, 24, 8, 0.4, stop=stop)
        sampler = MaskedDiffusionSampler.for_nemotron_labs(
            Threshold(0.4), mask_id=MASK, block_length=8, eos_id=stop, pad_id=21
        )
        result = sampler.generate(Nemotron(seed), prompt, 24)
        assert torch.equal(result.sequences[:, : expected.shape[1]], expected)
        assert bool((result.sequences[:, expected.shape[1] :] == 21).all())
        ended += bool(result.ended)
        first_of_a_block += bool(result.ended) and (expected.shape[1] - prompt.shape[1]) % 8 == 1
    assert ended > 10 and first_of_a_block > 0


def test_nemotron_labs_takes_batches_of_different_lengths():
    rows = [prompts(1, length, length)[0] for length in (9, 2, 9, 0)]
    sampler = MaskedDiffusionSampler.for_nemotron_labs(mask_id=MASK, block_length=8)
    together = sampler.generate(Nemotron(3), rows, 14)
    for number, row in enumerate(rows):
        alone = sampler.generate(Nemotron(3), row[None], 14)
        assert torch.equal(together.new_tokens[number], alone.new_tokens[0])
        assert int(together.nfe[number]) == int(alone.nfe[0])


@pytest.mark.parametrize("temperature", [0.7, torch.tensor([0.7, 1.5]), lambda step, steps: 0.7])
def test_nemotron_labs_draws_the_first_token_at_the_temperature(temperature):
    prompt = prompts(2, 6, 0)
    per_row = temperature(0, 8) if callable(temperature) else temperature
    model, differs = Nemotron(0), 0
    for layer in model.encoder.layers:
        layer.self_attn.diffusion_lm = False
    logits = model(prompt, use_cache=True, use_causal_mask=True).logits[:, -1]
    for seed in range(20):
        sampler = MaskedDiffusionSampler.for_nemotron_labs(
            mask_id=MASK, block_length=8, temperature=temperature
        )
        # The flags may be either way before, and stay so.
        result = sampler.generate(model, prompt, 16, seed=seed)
        assert not any(layer.self_attn.diffusion_lm for layer in model.encoder.layers)
        first = dgemma_accel.row_stats(logits, temperature=per_row, seed=seed).sample
        assert torch.equal(result.new_tokens[:, 0], first)
        differs += not torch.equal(first, logits.argmax(-1))
        assert torch.equal(result.sequences, sampler.generate(model, prompt, 16, seed=seed).sequences)
    assert differs


def test_nemotron_labs_draws_no_token_with_the_number_of_a_first_token():
    """With flat logits equal numbers would draw equal tokens: row 1 of the first tokens is position 1 of a block."""
    model, equal = Nemotron(0, sharpness=0.0), torch.zeros(2)
    sampler = MaskedDiffusionSampler.for_nemotron_labs(
        Threshold(0.9), mask_id=MASK, block_length=4, temperature=1.0
    )
    for seed in range(10):
        text = sampler.generate(model, prompts(2, 5, 1), 8, seed=seed).new_tokens
        equal += text[1, ::4] == text[0, 1::4]
    assert equal.max() < 5


def test_nemotron_labs_flags_are_put_back_after_an_error():
    class Broken(Nemotron):
        def core(self, tokens, *args, **kwargs):
            if len(self.calls) == 3:
                raise RuntimeError("broken")
            return super().core(tokens, *args, **kwargs)

    model = Broken(0)
    sampler = MaskedDiffusionSampler.for_nemotron_labs(Threshold(0.0), mask_id=MASK, block_length=4)
    with pytest.raises(RuntimeError, match="broken"):
        sampler.generate(model, prompts(1, 5, 0), 12)
    assert all(layer.self_attn.diffusion_lm for layer in model.encoder.layers)


def test_nemotron_labs_needs_its_parts():
    sampler = MaskedDiffusionSampler.for_nemotron_labs(mask_id=MASK, block_length=4)
    with pytest.raises(
        TypeError, match=r"model: CausalContext\(\) needs its encoder.layers and .* got FastLLaDA"
    ):
        sampler.generate(FastLLaDA(0), prompts(1, 5, 0), 4)
    with pytest.raises(ValueError, match="shift_logits: CausalContext has no shifted form"):
        CausalContext(shift_logits=True)
    with pytest.raises(TypeError, match="causal_context"):
        CausalContext(causal_context=1)


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


@pytest.mark.parametrize("given", [VOCAB, VOCAB + 40])
def test_a_given_token_without_a_logit_has_no_penalty(given):
    """A model may have embeddings for more tokens than its head has logits."""
    sampler = MaskedDiffusionSampler(JointThresholdEdit(0.0, penalty_lambda=2.0), mask_id=3, block_length=4)
    for favourite in (0, VOCAB - 1):
        logits = torch.zeros(1, 4, VOCAB, dtype=torch.bfloat16)
        logits[0, 1, favourite] = 1.0
        logits[0, 3, 5:7] = torch.tensor([1.0, 0.5])
        tokens = sampler.step(logits, torch.tensor([[given, 3, 5, 3]]))
        assert tokens.tolist() == [[given, favourite, 5, 6]]
