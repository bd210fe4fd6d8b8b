"""Stand-ins that are called as published masked-diffusion models are, small enough to run thousands of times.

Two layers of attention, so that a stale cache shows. Positions are absolute. Parameters that nothing here passes are
left out; test_samplers_interfaces.py has the whole lists and says where they are from.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from dgemma_accel.samplers import DualCache, FullSequence, PrefixCache

VOCAB, MASK = 23, 22
SEEDS = range(8)
INTERFACES = {None: FullSequence(), "prefix": PrefixCache(), "dual": DualCache()}


def prompts(batch, length, seed):
    return torch.randint(0, MASK, (batch, length), generator=torch.Generator().manual_seed(seed))


class Attention(torch.nn.Module):
    """Core shared by the stand-ins: tokens at positions, optional past keys and values, optional mask."""

    # Keys and values in a cache are [B, H, L, D] (H is 1 here), or [B, L, D].
    heads = True

    def __init__(self, seed=0, width=16, sharpness=6.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape):
            return torch.nn.Parameter(torch.randn(*shape, generator=generator) * shape[0] ** -0.5)

        self.embedding = torch.nn.Parameter(torch.randn(VOCAB, width, generator=generator))
        self.place = torch.nn.Parameter(torch.randn(96, width, generator=generator) * 0.7)
        self.layers = torch.nn.ParameterList([weight(width, 4 * width) for _ in range(2)])
        self.head = torch.nn.Parameter(weight(width, VOCAB).detach() * sharpness)
        bias = torch.zeros(VOCAB)
        bias[MASK] = -30
        self.register_buffer("bias", bias)
        self.calls = []
        self.requires_grad_(False)  # so that a cache can be written in place

    @property
    def device(self):
        return self.embedding.device

    def core(self, tokens, positions, past=None, replace=None, mask=None, before=None):
        """(logits, new cache): layers of (key, value). With `replace` [B, N] the past is written in place.

        What is stored `before` all of that is read only.
        """
        self.calls.append(tuple(tokens.shape))
        h = self.embedding[tokens] + self.place[positions]
        cache = []
        for number, layer in enumerate(self.layers):
            q, k, v, gate = (h @ layer).chunk(4, -1)
            if self.heads:
                k, v = k[:, None], v[:, None]
            if past is not None and replace is None:
                k, v = (torch.cat([old, new], -2) for old, new in zip(past[number], (k, v)))
            elif past is not None:
                for old, new in zip(past[number], (k, v)):
                    for row in range(tokens.shape[0]):
                        old[row][..., replace[row], :] = new[row]
                k, v = past[number]
            cache.append((k, v))
            if before is not None:
                k, v = (torch.cat([old, new], -2) for old, new in zip(before[number], (k, v)))
            if not self.heads:
                k, v = k[:, None], v[:, None]
            scores = q[:, None] @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, -1e9)
            h = h + torch.tanh((scores.softmax(-1) @ v)[:, 0] * torch.sigmoid(gate))
        return torch.tanh(h) @ self.head + self.bias, cache


class LLaDA(Attention):
    """LLaDAModelLM: model(input_ids, attention_mask=None).logits, without a cache."""

    def forward(self, input_ids, attention_mask=None):
        mask, positions = None, torch.arange(input_ids.shape[1])
        if attention_mask is not None:
            # Absolute places would tell a padded row from the same row alone; rotary ones do not.
            positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)
            mask = attention_mask.bool()[:, None, None, :]
        return SimpleNamespace(logits=self.core(input_ids, positions, mask=mask)[0])


class FastLLaDA(Attention):
    """LLaDAModelLM of Fast-dLLM: with caches, and attention_mask has no effect."""

    def forward(
        self, input_ids, attention_mask=None, past_key_values=None, use_cache=False, replace_position=None
    ):
        past = 0 if past_key_values is None else past_key_values[0][0].shape[-2]
        if replace_position is None:
            positions = torch.arange(past, past + input_ids.shape[1])
        else:
            positions = replace_position[0].nonzero()[:, 0]
        logits, cache = self.core(input_ids, positions, past_key_values, replace_position)
        return SimpleNamespace(logits=logits, past_key_values=cache if use_cache else None)


class Dream(Attention):
    """DreamModel: model(tokens, attention_mask, position_ids).logits, one position to the left of what they predict."""

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        if isinstance(attention_mask, str):
            attention_mask = None
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])
        logits, _ = self.core(input_ids, position_ids, mask=attention_mask)
        return SimpleNamespace(logits=logits)


class FastDream(Attention):
    """DreamModel of Fast-dLLM: a cache [B, L, D], and replace_position counts with dual_cache only."""

    heads = False

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        dual_cache=False,
        replace_position=None,
    ):
        past = 0 if past_key_values is None else past_key_values[0][0].shape[1]
        end = past + input_ids.shape[1]
        if dual_cache:
            end = int(replace_position.nonzero()[:, 1].max()) + 1
        else:
            replace_position = None
        positions = torch.arange(end - input_ids.shape[1], end)
        logits, cache = self.core(input_ids, positions, past_key_values, replace_position)
        return SimpleNamespace(logits=logits, past_key_values=cache if use_cache else None)


class Store:
    """What SDAR's model needs of a DynamicCache."""

    def __init__(self):
        self.layers = None

    def get_seq_length(self):
        return 0 if self.layers is None else self.layers[0][0].shape[2]

    def crop(self, length):
        """As a DynamicCache of transformers, which from 5.24 on takes a number of tokens to remove, below zero."""
        assert length < 0
        self.layers = [(k[..., :length, :], v[..., :length, :]) for k, v in self.layers]

    def append(self, layers):
        old = [(k[..., :0, :], v[..., :0, :]) for k, v in layers] if self.layers is None else self.layers
        self.layers = [
            tuple(torch.cat(pair, -2) for pair in zip(before, after)) for before, after in zip(old, layers)
        ]


class SDAR(Attention):
    """SDARForCausalLM: past_key_values is read always and grows only with store_kv=True; a mask [1, L, past + L]."""

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        store_kv=False,
    ):
        mask = attention_mask.bool()
        assert mask.ndim == 3
        assert mask.shape[-1] == input_ids.shape[1] + past_key_values.get_seq_length()
        logits, cache = self.core(input_ids, position_ids, past_key_values.layers, mask=mask)
        if store_kv:
            past_key_values.layers = cache
        return SimpleNamespace(logits=logits)


class LLaDA2(Attention):
    """LLaDA2MoeModelLM: the blocks so far, under a mask [B, 1, N, N] that is added to the scores."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        assert attention_mask.shape == (len(input_ids), 1, *2 * input_ids.shape[1:]) and not use_cache
        assert attention_mask.dtype == self.embedding.dtype
        visible = attention_mask == 0
        assert bool((visible | (attention_mask == -torch.inf)).all())
        return SimpleNamespace(logits=self.core(input_ids, position_ids, mask=visible)[0])


class FastQwen(Attention):
    """Fast_dLLM_QwenForCausalLM: past_key_values is read always and grows only with update_past_key_values=True.

    A block sees itself and what is before it. With use_block_cache the block's own keys and values come back as
    block_past_key_values, and with those a part of it, which begins at replace_position, is written into them.
    """

    store = Store

    def forward(
        self,
        input_ids,
        attention_mask=None,
        past_key_values=None,
        use_cache=None,
        logits_to_keep=0,
        update_past_key_values=False,
        block_size=32,
        use_block_cache=False,
        block_past_key_values=None,
        replace_position=None,
    ):
        assert attention_mask is None and use_cache
        past = self.store() if past_key_values is None else past_key_values
        stored, length = past.get_seq_length(), input_ids.shape[1]
        replace, mask = None, None
        if block_past_key_values is not None:
            replace = torch.zeros(len(input_ids), block_past_key_values[0][0].shape[2], dtype=torch.bool)
            replace[:, replace_position : replace_position + length] = True
        else:
            block = torch.arange(stored + length) // block_size
            mask = block[stored:, None] >= block[None]
        first = stored + (replace_position or 0)
        logits, cache = self.core(
            input_ids, torch.arange(first, first + length), block_past_key_values, replace, mask, past.layers
        )
        if update_past_key_values:
            past.append(cache)
        return SimpleNamespace(
            logits=logits[:, -logits_to_keep:],
            past_key_values=past,
            block_past_key_values=cache if use_block_cache else None,
        )


class Nemotron(Attention):
    """NemotronLabsDiffusionModel: one encoder whose attention is causal or sees all, and a head.

    past_key_values is read always, and grows where use_cache=True. The encoder's hidden states are logits here.
    """

    store = Store

    def __init__(self, seed=0, **kwargs):
        super().__init__(seed, **kwargs)
        attentions = [SimpleNamespace(diffusion_lm=True) for _ in self.layers]
        self.encoder = Encoder(self, [SimpleNamespace(self_attn=one) for one in attentions])
        self.diffusion_head = torch.nn.Identity()

    def forward(self, input_ids, attention_mask=None, past_key_values=None, **kwargs):
        output = self.encoder(input_ids=input_ids, past_key_values=past_key_values, **kwargs)
        return SimpleNamespace(
            logits=self.diffusion_head(output.last_hidden_state), past_key_values=output.past_key_values
        )


class Encoder:
    def __init__(self, model, layers):
        self.model, self.layers = model, layers

    def __call__(self, input_ids, past_key_values=None, use_cache=None, use_causal_mask=False):
        flags = {layer.self_attn.diffusion_lm for layer in self.layers}
        assert len(flags) == 1 and use_cache is not None
        causal = not flags.pop()
        assert causal == bool(use_causal_mask) or not use_cache
        past = self.model.store() if past_key_values is None and use_cache else past_key_values
        stored = 0 if past is None else past.get_seq_length()
        positions = torch.arange(stored, stored + input_ids.shape[1])
        mask = positions[:, None] >= torch.arange(len(positions) + stored)[None] if causal else None
        before = None if past is None else past.layers
        hidden, cache = self.model.core(input_ids, positions, mask=mask, before=before)
        if use_cache:
            past.append(cache)
        return SimpleNamespace(last_hidden_state=hidden, past_key_values=past)
