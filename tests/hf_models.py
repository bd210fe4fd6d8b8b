"""Tiny DiffusionGemma models and the same noise for the original and the accelerated sampler."""

import contextlib

import pytest
import torch

from dgemma_accel.hf import call
from dgemma_accel.hf.naming import cache_argument
from dgemma_accel.reference.philox import below, random_words, uniform_from_word
from dgemma_accel.reference.row_stats import invert_cdf

transformers = pytest.importorskip("transformers")
generation = pytest.importorskip("transformers.models.diffusion_gemma.generation_diffusion_gemma")

VOCAB, WINDOW, CANVAS, IMAGE_TOKEN, PAD = 83, 16, 12, 7, 0


def tiny_config(expert_width=24, head_dims=(16, 32)):
    text = transformers.DiffusionGemmaTextConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=48, num_hidden_layers=3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"], num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dims[0], global_head_dim=head_dims[1], num_global_key_value_heads=1,
        sliding_window=WINDOW,
        max_position_embeddings=512, num_experts=4, top_k_experts=2, moe_intermediate_size=expert_width,
        final_logit_softcapping=30.0, use_bidirectional_attention="vision", initializer_range=0.125,
        pad_token_id=PAD, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    vision = transformers.Gemma4VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, patch_size=4, pooling_kernel_size=2, position_embedding_size=64, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.DiffusionGemmaConfig(
        text_config=text, vision_config=vision, boi_token_id=5, eoi_token_id=6, image_token_id=IMAGE_TOKEN,
        canvas_length=CANVAS, initializer_range=0.125, tie_word_embeddings=True,
    )  # fmt: skip


def tiny_model(dtype=torch.float32, *, peak=8.0, seed=0, attn_implementation="sdpa", **sizes):
    """Random weights, of `sizes` as in `tiny_config`; `peak` scales the logits, so that some positions are certain and
    others are not.

    Self-conditioning is weak: at full strength random weights amplify the rounding of each step tenfold, and after
    a few steps no two ways of adding up attention give the same tokens.
    """
    torch.manual_seed(seed)
    model = transformers.DiffusionGemmaForBlockDiffusion._from_config(
        tiny_config(**sizes), attn_implementation=attn_implementation
    )
    with torch.no_grad():
        model.model.decoder.norm.weight.fill_(peak)
        for layer in model.model.decoder.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight.fill_(layer.self_attn.head_dim**-0.25)
        model.model.decoder.self_conditioning.down_proj.weight.mul_(0.1)
    model.generation_config = generation.DiffusionGemmaGenerationConfig(
        max_new_tokens=2 * CANVAS, max_denoising_steps=8, t_min=0.4, t_max=0.8, stability_threshold=1,
        confidence_threshold=0.3, pad_token_id=PAD,
        sampler_config=generation.EntropyBoundSamplerConfig(entropy_bound=0.5),
    )  # fmt: skip
    return model.to(dtype).eval()


def prompt(batch, length, seed=0, left_padding=()):
    """(input_ids, attention_mask), row b padded by left_padding[b] on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, VOCAB, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row, padding in enumerate(left_padding):
        ids[row, :padding] = PAD
        mask[row, :padding] = 0
    return ids, mask


class Drafts:
    """A streamer that keeps the drafts it gets."""

    def __init__(self):
        self.values = []

    def put(self, value):
        pass

    def put_draft(self, value):
        self.values.append(value.clone())

    def end(self):
        pass


class SameNoise:
    """Lets the original sampler draw what ours draws: samples by inverting the CDF at our uniforms, our renoising."""

    def __init__(self, base=1):
        self.base, self.canvas, self.step = base, 0, 0

    def seed(self):
        return torch.tensor(self.base * 1_000_003)

    def words(self, rows):
        offset = (self.canvas - 1) * 2**32 + self.step
        return random_words(self.seed(), torch.tensor(offset), torch.arange(rows))

    def initial_canvas(self, sampler, batch_size, device):
        self.canvas, self.step = self.canvas + 1, 0
        generator = torch.Generator().manual_seed(self.base + self.canvas)
        shape = (batch_size, sampler.canvas_length)
        return torch.randint(sampler.vocab_size, shape, generator=generator).to(device)

    def multinomial(self, probabilities, num_samples):
        uniform = uniform_from_word(self.words(probabilities.shape[0])[0])
        return invert_cdf(probabilities, uniform.to(probabilities.device))[:, None]

    def renoise(self, sampler, accepted, cur_step):
        words = self.words(accepted.numel())
        fresh = below(words[1], words[2], sampler.vocab_size).view_as(accepted).to(accepted.device)
        self.step += 1
        return torch.where(sampler.accepted_token_mask, accepted, fresh)


@contextlib.contextmanager
def same_noise(base=1):
    """Within it every generate, original or accelerated, draws the noise of `base` from its beginning."""
    noise = SameNoise(base)
    sampler = generation.EntropyBoundSampler
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "initialize_canvas", lambda self, batch_size, device: noise.initial_canvas(
            self, batch_size, device))  # fmt: skip
        patch.setattr(sampler, "renoise_canvas", lambda self, canvas, step: noise.renoise(self, canvas, step))
        patch.setattr(torch, "multinomial", noise.multinomial)
        patch.setattr(call, "draw_seed", noise.seed)
        yield noise


def trace_without_inductor(monkeypatch):
    """Compiled steps are traced whole by dynamo and AOT autograd, and run without inductor."""
    right = torch.compile

    # Options are inductor's.
    def traced(function, *, options, **others):
        return right(function, backend="aot_eager", **others)

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()


def as_argument(cache):
    """`cache` under the name that the transformers installed gives it."""
    return {cache_argument(): cache}


def encode_in_turns(model, ids, turns, mask=None, cache=None):
    """(cache after the turns, hidden states of each), as `generate` fills it: masks made ahead, one call per turn."""
    cache = transformers.DynamicCache(config=model.config) if cache is None else cache
    encoder, done, states = model.model.encoder, cache.get_seq_length(), []
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        for length in turns:
            part = ids[:, done : done + length]
            positions = torch.arange(done, done + length)[None]
            done += length
            masks = encoder.create_masks_for_generate(
                config=model.config,
                inputs_embeds=torch.empty(*part.shape, 0),
                attention_mask=mask[:, :done].bool(),
                position_ids=positions,
                **as_argument(cache),
            )
            output = encoder(
                input_ids=part, attention_mask=masks, position_ids=positions, **as_argument(cache)
            )
            states.append(output.last_hidden_state)
    return cache, states


def generate(model, ids, mask=None, base=1, cache=None, **options):
    if cache is not None:
        options.update(as_argument(cache))
    if mask is not None:
        options["attention_mask"] = mask
    with same_noise(base):
        return model.generate(ids, **options)
