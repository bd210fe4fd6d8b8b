"""Train the tiny masked diffusion model of this folder from nothing, on a CPU.

The model is transformers' `ModernBertForMaskedLM`, a bidirectional masked language model, at a thousandth of its
width. It is trained as LLaDA is: every token of the answer is masked with probability t, t uniform in
(0, 1) for each example, and the masked ones are predicted with weight 1 / t. With --edits some of the
others are replaced by random characters and all are predicted, so that the model can also correct what it wrote.

    python train.py --output checkpoint
    python train.py --output checkpoint --resume checkpoint --edits 0.15 --steps 1500 --lr 1e-3

The result is an ordinary transformers checkpoint.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from data import BOS, CANVAS, EOS, MASK, PAD, masked_tokenizer, training_batches
from transformers import ModernBertConfig, ModernBertForMaskedLM

HIDDEN = 96
FIRST_CHARACTER = MASK - 95
EDIT_WEIGHT = 0.5


def build_model() -> ModernBertForMaskedLM:
    config = ModernBertConfig(
        vocab_size=MASK + 1,
        hidden_size=HIDDEN,
        intermediate_size=144,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        global_attn_every_n_layers=1,
        attention_dropout=0.0,
        embedding_dropout=0.0,
        mlp_dropout=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        cls_token_id=BOS,
        sep_token_id=EOS,
        # transformers would mask nothing in a smaller standard deviation than this width needs.
        initializer_range=HIDDEN**-0.5,
    )
    return ModernBertForMaskedLM._from_config(config, attn_implementation="sdpa")


def diffusion_loss(model, tokens: torch.Tensor, valid: torch.Tensor, edits: float) -> torch.Tensor:
    size = tokens.shape[0]
    # Spread evenly over a batch, which steadies the gradient.
    level = (torch.rand(1) + torch.arange(size) / size) % 1
    level = level.clamp_min(1 / CANVAS)[:, None]
    target = tokens[:, -CANVAS:]
    masked = torch.rand(size, CANVAS) < level
    wrong = torch.rand(size, CANVAS) < edits
    random_tokens = torch.randint(FIRST_CHARACTER, MASK, target.shape)
    noised = tokens.clone()
    noised[:, -CANVAS:] = torch.where(masked, MASK, torch.where(wrong, random_tokens, target))
    logits = model(noised, attention_mask=valid.long()).logits[:, -CANVAS:]
    loss = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    weight = masked / level
    if edits:
        weight = torch.where(masked, weight, EDIT_WEIGHT)
    return (loss * weight).sum() / (size * CANVAS)


def learning_rate(step: int, progress: float, peak: float, warmup: int = 100) -> float:
    """Half a cosine over the whole run, after a short rise."""
    return peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(args: argparse.Namespace) -> ModernBertForMaskedLM:
    tokenizer = masked_tokenizer()
    model = ModernBertForMaskedLM.from_pretrained(args.resume) if args.resume else build_model()
    model.train()
    parameters = list(model.parameters())
    print(f"{sum(p.numel() for p in parameters):,} parameters", flush=True)
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    batches = training_batches(tokenizer, args.batch_size, args.seed)
    running, started = 0.0, time.monotonic()
    for step in range(args.steps):
        minutes = (time.monotonic() - started) / 60
        # On a slow machine the run ends by the clock, with the learning rate down as well.
        progress = max(step / args.steps, minutes / args.minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress, args.lr)
        loss = diffusion_loss(model, *next(batches), args.edits)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % args.log_every == 0:
            print(f"step {step + 1:5d}  loss {running:.4f}  {minutes:.1f} min", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=60, help="end earlier if this time is over")
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    parser.add_argument("--edits", type=float, default=0.0, help="share of visible tokens that are replaced")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=100)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = train(args)
    model.save_pretrained(args.output)
    masked_tokenizer().save_pretrained(args.output)


if __name__ == "__main__":
    main()
