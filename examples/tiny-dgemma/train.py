"""Train the tiny DiffusionGemma of this folder from nothing, on a CPU.

The model learns the five tasks of ``tasks.py`` by uniform-noise diffusion, the noise its sampler
works with: some tokens of a canvas are replaced by tokens drawn uniformly from the vocabulary, and
the decoder predicts the clean canvas from what is left and from the prompt. Half of the batches are
self-conditioned: a first pass without gradient, on a noisier canvas, lends its logits to the second.

    python train.py

One CPU core needs about 15 minutes for the 3600 steps (0.25 s each). The result is an ordinary transformers
checkpoint: model, generation config and tokenizer, loadable with ``from_pretrained``.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from evaluate import exact_match, report
from tasks import TASKS, make_prompts, split_of
from tokenizer import BOI, BOS, EOI, EOS, IMAGE, PAD, VOCAB_SIZE, build_tokenizer
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    DynamicCache,
    Gemma4VisionConfig,
)
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSamplerConfig,
)

from dgemma_accel.hf.naming import cache_argument

CANVAS = 32
HIDDEN = 96
SLIDING_HEAD_DIM, GLOBAL_HEAD_DIM = 32, 64
T_MIN, T_MAX = 0.4, 0.8

# Sorting examples by length inside a pool of this many batches keeps the padding of a batch short.
POOL = 16
# Every generation starts from a canvas of pure noise, so that case gets a share of its own.
PURE_NOISE_SHARE = 0.4
# The long answers are the hard ones to get right from end to end.
TASK_SHARES = {"count": 3, "reverse": 1, "sort": 1, "add": 1, "copy": 2}
# Padding behind the end of an answer is easy and most of a short canvas; it should not drown the answer.
PADDING_WEIGHT = 0.1


def build_config() -> DiffusionGemmaConfig:
    """The real model's features at a thousandth of its width."""
    text = DiffusionGemmaTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=SLIDING_HEAD_DIM,
        global_head_dim=GLOBAL_HEAD_DIM,
        num_global_key_value_heads=1,
        sliding_window=16,
        max_position_embeddings=512,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1_000_000.0,
            },
        },
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=64,
        final_logit_softcapping=30.0,
        use_bidirectional_attention="vision",
        # Keeps activations at unit scale in a model this narrow, embeddings included.
        initializer_range=HIDDEN**-0.5,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )
    # The architecture requires a vision tower. This one is not trained.
    vision = Gemma4VisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        patch_size=4,
        pooling_kernel_size=2,
        position_embedding_size=64,
        max_position_embeddings=512,
    )
    return DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        boi_token_id=BOI,
        eoi_token_id=EOI,
        image_token_id=IMAGE,
        canvas_length=CANVAS,
        initializer_range=HIDDEN**-0.5,
        tie_word_embeddings=True,
    )


def build_generation_config() -> DiffusionGemmaGenerationConfig:
    """The real model's sampler, with fewer steps and room for two canvases."""
    return DiffusionGemmaGenerationConfig(
        max_new_tokens=2 * CANVAS,
        max_denoising_steps=24,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1),
        t_min=T_MIN,
        t_max=T_MAX,
        stability_threshold=1,
        confidence_threshold=0.005,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )


def build_model() -> DiffusionGemmaForBlockDiffusion:
    model = DiffusionGemmaForBlockDiffusion._from_config(
        build_config(), attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    # Attention logits are q.k without a 1/sqrt(head_dim), so the norms' weights must carry it.
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight.fill_(layer.self_attn.head_dim**-0.25)
    model.model.encoder.vision_tower.requires_grad_(False)
    model.model.encoder.embed_vision.requires_grad_(False)
    model.generation_config = build_generation_config()
    return model


class Batch(NamedTuple):
    prefix: torch.Tensor  # [B, L] prompt and committed canvases, padded on the left
    prefix_mask: torch.Tensor  # [B, L] bool, False on padding
    canvas: torch.Tensor  # [B, CANVAS] the clean canvas


def training_batches(tokenizer, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches without end; in each the prefixes have similar lengths."""
    rng = random.Random(seed)
    tasks, shares = [TASKS[name] for name in TASK_SHARES], list(TASK_SHARES.values())
    while True:
        examples = []
        while len(examples) < POOL * batch_size:
            prompt, answer = rng.choices(tasks, shares)[0](rng)
            if split_of(prompt) != "train":
                continue
            prefix = tokenizer(prompt).input_ids
            target = tokenizer(answer, add_special_tokens=False).input_ids + [EOS]
            # Any canvas of a long answer, with the ones before it as part of the prefix.
            start = CANVAS * rng.randrange(math.ceil(len(target) / CANVAS))
            canvas = target[start : start + CANVAS]
            examples.append((prefix + target[:start], canvas + [PAD] * (CANVAS - len(canvas))))
        # The random term varies which lengths meet, and so how much padding the model sees.
        examples.sort(key=lambda example: len(example[0]) + 4 * rng.random())
        starts = list(range(0, len(examples), batch_size))
        rng.shuffle(starts)
        for start in starts:
            prefixes, canvases = zip(*examples[start : start + batch_size], strict=True)
            length = max(map(len, prefixes))
            prefix = torch.tensor([[PAD] * (length - len(ids)) + ids for ids in prefixes])
            yield Batch(prefix, prefix != PAD, torch.tensor(canvases))


def diffusion_loss(
    model: DiffusionGemmaForBlockDiffusion, batch: Batch, self_condition: bool
) -> torch.Tensor:
    size, vocabulary = batch.canvas.shape[0], model.config.text_config.vocab_size
    level = torch.rand(size, 1)
    level = torch.where(torch.rand(size, 1) < PURE_NOISE_SHARE, 1.0, level)
    threshold = torch.rand(size, CANVAS)

    def noised(level: torch.Tensor) -> torch.Tensor:
        # One threshold for both passes: what is clean at a higher level stays clean at a lower one.
        random_tokens = torch.randint(vocabulary, batch.canvas.shape)
        return torch.where(threshold < level, random_tokens, batch.canvas)

    # The encoder runs once; both decoder passes read its cache.
    cache = DynamicCache(config=model.config.text_config)
    model.model.encoder(input_ids=batch.prefix, attention_mask=batch.prefix_mask, **{cache_argument(): cache})
    context = {
        cache_argument(): cache,
        "decoder_attention_mask": F.pad(batch.prefix_mask, (0, CANVAS), value=True),
    }
    previous = None
    if self_condition:
        with torch.no_grad():
            earlier = level + (1 - level) * torch.rand(size, 1)
            previous = model(decoder_input_ids=noised(earlier), **context).logits
            # Generation hands over logits already divided by the step's temperature.
            previous = previous / (T_MIN + (T_MAX - T_MIN) * torch.rand(size, 1, 1))
    logits = model(decoder_input_ids=noised(level), self_conditioning_logits=previous, **context).logits

    loss = F.cross_entropy(logits.transpose(1, 2), batch.canvas, reduction="none")
    weight = torch.where(batch.canvas == PAD, PADDING_WEIGHT, 1.0)
    return ((loss * weight).sum(1) / weight.sum(1)).mean()


def build_optimizers(model: DiffusionGemmaForBlockDiffusion, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for everything else.

    Norm weights get a higher rate: attention is as sharp as ``q_norm`` and ``k_norm`` let it be, and
    copying and reversing need it sharp. Muon needed two thirds of AdamW's steps.
    """
    embedding = model.model.decoder.embed_tokens.weight
    parameters = [p for p in model.parameters() if p.requires_grad]
    vectors = [p for p in parameters if p.ndim == 1]
    # Muon takes matrices only, so the stacked experts stay with AdamW.
    matrices = [p for p in parameters if p.ndim == 2 and p is not embedding]
    others = [embedding] + [p for p in parameters if p.ndim == 3]
    adamw = torch.optim.AdamW(
        [
            {"params": others, "lr": lr, "weight_decay": 0.02},
            {"params": vectors, "lr": 5 * lr, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    muon = torch.optim.Muon(matrices, lr=2.5 * lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


def schedule(step: int, steps: int, warmup: int = 100) -> float:
    """The share of the peak learning rate: linear warmup, then a cosine down to 1%."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def train(args: argparse.Namespace) -> DiffusionGemmaForBlockDiffusion:
    tokenizer = build_tokenizer()
    model = build_model().train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizers = build_optimizers(model, args.lr)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, args.steps))
        for optimizer in optimizers
    ]
    batches = training_batches(tokenizer, args.batch_size, args.seed)
    running, started = None, time.monotonic()
    for step in range(1, args.steps + 1):
        loss = diffusion_loss(model, next(batches), self_condition=random.random() < 0.5)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()

        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % args.log_every == 0:
            minutes = (time.monotonic() - started) / 60
            print(f"step {step:5d}  loss {running:.4f}  {minutes:.1f} min", flush=True)
        if step % args.check_every == 0 and step < args.steps:
            # Prompts of the training split: the held-out ones are for the end.
            model.eval()
            matches = exact_match(model, tokenizer, make_prompts(100, seed=1, split="train"))
            print("          " + report(matches, joiner="  "), flush=True)
            save(model, args.output)
            model.train()
    return model.eval()


def save(model: DiffusionGemmaForBlockDiffusion, folder: Path) -> None:
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--check-every", type=int, default=600)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    model = train(args)
    save(model, args.output)
    print(report(exact_match(model, build_tokenizer(), make_prompts(500, seed=0))))


if __name__ == "__main__":
    main()
