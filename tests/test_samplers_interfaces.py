"""How a masked-diffusion model is called: its parameters, its caches, and the rows that it is fed."""

import inspect
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
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

from dgemma_accel.samplers import (
    DREAM,
    BlockCache,
    BlockCausal,
    CausalContext,
    DualCache,
    FullSequence,
    HierarchicalCache,
    LowConfidence,
    MaskedDiffusionSampler,
    PrefixCache,
    Threshold,
    interfaces,
)

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
    # Efficient-Large-Model/Fast_dLLM_v2_7B, modeling.py: not found at its own place, so from the copy in
    # Satgoy152/DualDiffusion (FastDLLM_inferencing).
    "Fast_dLLM_QwenForCausalLM": "input_ids attention_mask position_ids past_key_values inputs_embeds labels use_cache "
    "cache_position logits_to_keep update_past_key_values block_size use_block_cache block_past_key_values "
    "replace_position mask_id **kwargs",
    # inclusionAI/LLaDA2.0-mini, modeling_llada2_moe.py: from the copy in AnZhong24/FOCUS.
    "LLaDA2MoeModelLM": "input_ids attention_mask position_ids past_key_values inputs_embeds labels use_cache "
    "store_kv output_attentions output_hidden_states output_router_logits return_dict **kwargs",
    # nvidia/Nemotron-Labs-Diffusion-8B, modeling_nemotron_labs_diffusion.py: not found at its own place, so from a copy
    # of it whose repository the index that it was found in does not name.
    "NemotronLabsDiffusionModel": "input_ids attention_mask position_ids labels split_len past_key_values block_size "
    "eps is_teacher masked_indices p_mask teacher_logits masked_indices_teacher loss_mask ce_loss_weight "
    "output_last_hidden_states_only skip_loss **kwargs",
    # JetAstra/SDAR, training/model/SDAR-4B-Chat/modeling_sdar.py.
    "SDARForCausalLM": "input_ids attention_mask position_ids past_key_values inputs_embeds labels use_cache "
    "output_attentions output_hidden_states cache_position logits_to_keep **kwargs",
}


# Arguments that go on to the model inside, which has these parameters.
HANDED_ON = {"SDARForCausalLM": {"store_kv"}, "NemotronLabsDiffusionModel": {"use_cache"}}


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
            "Fast_dLLM_QwenForCausalLM",
            FastQwen,
            HierarchicalCache(model_block_length=8, use_block_cache=True),
            "past_key_values use_cache logits_to_keep update_past_key_values block_size use_block_cache "
            "block_past_key_values replace_position",
        ),
        ("LLaDA2MoeModelLM", LLaDA2, BlockCausal(), "attention_mask position_ids use_cache"),
        ("NemotronLabsDiffusionModel", Nemotron, CausalContext(), "past_key_values use_cache"),
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
    for part in ("encoder", "diffusion_head"):
        setattr(call, part, getattr(model, part, None))
    sampler = MaskedDiffusionSampler(Threshold(0.6), mask_id=MASK, block_length=4, interface=interface)
    result = sampler.generate(call, [[1, 2, 3], [4, 5, 6, 7, 8]], 8)
    assert not (result.new_tokens == MASK).any()
    assert seen == {"input_ids", *names.split()}


@pytest.mark.parametrize(
    "interface, lacking",
    [
        (PrefixCache(), "use_cache"),
        (DualCache(), "use_cache"),
        (BlockCache(new_cache=Store), "position_ids"),
        (BlockCausal(), "position_ids"),
        (HierarchicalCache(model_block_length=8), "use_cache"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, interfaces.Interface) else value,
)
def test_a_model_that_is_called_in_another_way(interface, lacking):
    sampler = MaskedDiffusionSampler(Threshold(0.6), mask_id=MASK, block_length=4, interface=interface)
    text = f"model: its forward takes no {lacking}, which {type(interface).__name__}\\(\\) calls it with"
    with pytest.raises(TypeError, match=text):
        sampler.generate(LLaDA(1), prompts(1, 5, 1), 8)


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


class Hands(torch.nn.Module):
    """Hands all arguments on to the model inside, as nn.DataParallel does."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Adapted(torch.nn.Module):
    """As PEFT's PeftModelForCausalLM, which names what its task has, and whose model is not its only part."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.adapter = Hands(model), torch.nn.Identity()

    def get_base_model(self):
        return self.base_model.module

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return self.base_model(input_ids, **kwargs)


class Renamed(FastLLaDA):
    """With the cache's name in transformers since 5.24."""

    def forward(self, input_ids, cache=None, use_cache=False):
        output = super().forward(input_ids, past_key_values=cache, use_cache=use_cache)
        return SimpleNamespace(logits=output.logits, cache=output.past_key_values)


WRAPPERS = {"hands": Hands, "twice": lambda model: Hands(Hands(model)), "adapted": Adapted}


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize(
    "interface, kind",
    [(SHIFTED["dual"], FastDream), (PrefixCache(), Renamed)],
    ids=("dual_cache", "cache"),
)
def test_a_wrapped_model_is_called_as_what_it_wraps(interface, kind, wrapper):
    sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=4, interface=interface)
    plain, wrapped = (sampler.generate(one, prompts(2, 5, 4), 8) for one in (kind(4), wrapper(kind(4))))
    assert torch.equal(plain.sequences, wrapped.sequences)


def test_a_shifted_dual_cache_needs_to_know_the_models_parameters():
    """Fast-dLLM's Dream without dual_cache=True would take the block for one behind all that is cached."""
    sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=4, interface=SHIFTED["dual"])
    model = FastDream(4)
    with pytest.raises(TypeError, match="model: its forward does not say whether it takes dual_cache"):
        sampler.generate(lambda tokens, **options: model(tokens, **options), prompts(2, 5, 4), 8)
    assert not model.calls

    def without(tokens, past_key_values=None, use_cache=None, replace_position=None, **options):
        """One whose cache needs no such flag."""
        options |= {"dual_cache": True} if replace_position is not None else {}
        return model(
            tokens, None, None, past_key_values, use_cache, replace_position=replace_position, **options
        )

    plain = sampler.generate(FastDream(4), prompts(2, 5, 4), 8)
    assert torch.equal(sampler.generate(without, prompts(2, 5, 4), 8).sequences, plain.sequences)


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


class DroppingStore(Store):
    """A store whose rows can be dropped, as those of transformers' DynamicCache."""

    def batch_select_indices(self, indices):
        if self.layers is not None:
            self.layers = [(k[indices], v[indices]) for k, v in self.layers]


class DroppingQwen(FastQwen):
    store = DroppingStore


class DroppingNemotron(Nemotron):
    store = DroppingStore


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "interface, model",
    [
        (FullSequence(), LLaDA),
        (PrefixCache(), FastLLaDA),
        (DualCache(), FastLLaDA),
        (BlockCache(new_cache=DroppingStore), SDAR),
        (BlockCausal(), LLaDA2),
        (HierarchicalCache(model_block_length=8), DroppingQwen),
        (HierarchicalCache(model_block_length=8, use_block_cache=True), DroppingQwen),
        (CausalContext(), DroppingNemotron),
    ],
    ids=("full", "prefix", "dual", "block", "block-causal", "hierarchical", "sub-blocks", "causal"),
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
    if isinstance(interface, (FullSequence, BlockCausal)):
        assert dropped.rows_fed == int(dropped.nfe.sum())


def test_transformers_cache_drops_rows():
    transformers = pytest.importorskip("transformers")
    assert hasattr(transformers.DynamicCache(), "batch_select_indices")


class SoFar(interfaces.Session):
    free_rows = True

    def logits(self, tokens, start, end):
        fed = tokens[:, :end]
        return self.checked(self.call(fed), fed)[:, start:end]


@dataclass(frozen=True)
class BlocksSoFar(interfaces.Interface):
    session = SoFar


def test_an_interface_of_ones_own():
    """A model that never sees the blocks to come writes what it writes when it is asked for a block at a time."""
    numbers = {"mask_id": MASK, "block_length": 4}
    for seed in SEEDS:
        text, calls = prompts(3, 5, seed), 0
        result = MaskedDiffusionSampler(Threshold(0.6), interface=BlocksSoFar(), **numbers).generate(
            LLaDA(seed), text, 12
        )
        for _ in range(3):
            block = MaskedDiffusionSampler(Threshold(0.6), **numbers).generate(LLaDA(seed), text, 4)
            text, calls = block.sequences, calls + block.calls
        assert torch.equal(result.sequences, text)
        assert result.calls == calls


def test_bad_interfaces():
    with pytest.raises(ValueError, match="attention_mask"):
        FullSequence(attention_mask="3d")
    for kind in (BlockCache, BlockCausal):
        with pytest.raises(ValueError, match=kind.__name__):
            MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=None, interface=kind())
        with pytest.raises(ValueError, match="shift_logits"):
            kind(shift_logits=True)
    with pytest.raises(ValueError, match="shift_logits"):
        HierarchicalCache(shift_logits=False)
    with pytest.raises(ValueError, match="model_block_length"):
        HierarchicalCache(model_block_length=0)
    for block_length in (None, 5, 64):
        with pytest.raises(ValueError, match=f"block_length: .*got {block_length}"):
            MaskedDiffusionSampler(
                LowConfidence(), mask_id=MASK, block_length=block_length, interface=HierarchicalCache()
            )


@pytest.mark.parametrize("padding", ["a value", "NaN"])
def test_an_empty_prompt_in_a_padded_batch_is_what_it_is_alone(padding):
    """With shifted logits: what stands before its first token is padding, which says nothing."""

    def model(tokens, attention_mask=None, position_ids=None):
        output = stand_in(tokens, attention_mask=attention_mask, position_ids=position_ids)
        if attention_mask is not None and padding == "NaN":
            output.logits[~attention_mask[:, 0].any(-1)] = math.nan
        return output

    stand_in = Dream(1)
    sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=4, interface=DREAM)
    alone = sampler.generate(stand_in, [[]], 8)
    for rows in ([[], [1, 2, 3]], [[4], [], [1, 2, 3]]):
        result = sampler.generate(model, rows, 8)
        row = rows.index([])
        assert torch.equal(result.new_tokens[row], alone.new_tokens[0]) and not result.stuck.any()
