"""Stand-ins with the forward signatures of published masked-diffusion models, small enough to run thousands of times.

Two layers of attention, so that a stale cache shows. Positions are absolute.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

VOCAB, MASK = 23, 22


class Attention(torch.nn.Module):
    """Core shared by the stand-ins: tokens at positions, optional past keys and values, optional mask."""

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

    @property
    def device(self):
        return self.embedding.device

    def core(self, tokens, positions, past=None, replace=None, mask=None):
        """(logits, new cache): layers of (key, value) [B, 1, L, D], as published code lays them out."""
        self.calls.append(tuple(tokens.shape))
        h = self.embedding[tokens] + self.place[positions]
        cache = []
        for number, layer in enumerate(self.layers):
            q, k, v, gate = (h @ layer).chunk(4, -1)
            k, v = k[:, None], v[:, None]
            if past is not None:
                old_k, old_v = past[number]
                if replace is not None:
                    old_k, old_v = old_k.clone(), old_v.clone()
                    for row in range(tokens.shape[0]):
                        old_k[row, :, replace[row]] = k[row]
                        old_v[row, :, replace[row]] = v[row]
                    k, v = old_k, old_v
                else:
                    k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
            cache.append((k, v))
            scores = q[:, None] @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, -1e9)
            h = h + torch.tanh((scores.softmax(-1) @ v)[:, 0] * torch.sigmoid(gate))
        return torch.tanh(h) @ self.head + self.bias, cache


class LLaDA(Attention):
    """LLaDAModelLM: model(input_ids, attention_mask=None).logits; the caches are those of Fast-dLLM's copy of it."""

    def forward(
        self, input_ids, attention_mask=None, past_key_values=None, use_cache=False, replace_position=None
    ):
        length = input_ids.shape[1]
        mask = None
        if attention_mask is not None:
            # Absolute places would tell a padded row from the same row alone; rotary ones do not.
            positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)
            mask = attention_mask.bool()[:, None, None, :]
        elif replace_position is not None:
            positions = replace_position[0].nonzero()[:, 0]
        elif past_key_values is not None:
            first = past_key_values[0][0].shape[2]
            positions = torch.arange(first, first + length)
        else:
            positions = torch.arange(length)
        logits, cache = self.core(input_ids, positions, past_key_values, replace_position, mask)
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


class Store:
    """What SDAR's model needs of a DynamicCache."""

    def __init__(self):
        self.layers = None

    def get_seq_length(self):
        return 0 if self.layers is None else self.layers[0][0].shape[2]


class SDAR(Attention):
    """SDARForCausalLM: past_key_values is read always and grows only with store_kv=True."""

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
        assert mask.shape[-1] == input_ids.shape[1] + past_key_values.get_seq_length()
        logits, cache = self.core(input_ids, position_ids, past_key_values.layers, mask=mask)
        if store_kv:
            past_key_values.layers = cache
        return SimpleNamespace(logits=logits)
