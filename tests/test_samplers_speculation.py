"""`SelfSpeculation` against the published loop and against autoregressive decoding, on a stand-in of the model."""

import pytest
import torch
from samplers_models import MASK, SEEDS, FastLLaDA, Nemotron, prompts

from dgemma_accel.samplers import SelfSpeculation


def read(model, tokens, past=None, last=False):
    """(the causal mode's logits behind tokens, the cache that holds them), adapters off."""
    modes(model, causal=True)
    output = model.encoder(input_ids=tokens, past_key_values=past, use_cache=True, use_causal_mask=True)
    modes(model, causal=False)
    return model.diffusion_head(output.last_hidden_state), output.past_key_values


def modes(model, causal):
    for layer in model.encoder.layers:
        layer.self_attn.diffusion_lm = not causal
    for module in model.modules():
        if hasattr(module, "_disable_adapters"):
            module._disable_adapters = causal


def linear_spec_generate(model, prompt, new, block, tau=0.0, stop=-1):
    """The published loop, greedy: (tokens behind the prompt, evaluations)."""
    logits, past = read(model, prompt)
    nfe, text = 1, [int(logits[0, -1].argmax())]
    while len(text) < new and stop not in text:
        stored = past.get_seq_length()
        draft = torch.full((1, block), MASK)
        draft[0, 0] = text[-1]
        while bool((masked := draft == MASK).any()):
            hidden = model.encoder(input_ids=draft, past_key_values=past, use_cache=False).last_hidden_state
            nfe += 1
            probability, token = torch.softmax(model.diffusion_head(hidden).double(), -1).max(-1)
            probability = torch.where(masked, probability, -1.0)
            taken = masked & (probability >= tau)
            if not taken.any():
                taken[0, probability[0].argmax()] = True
            draft[taken] = token[taken]
        logits, past = read(model, draft, past)
        nfe += 1
        said = logits[0].argmax(-1).tolist()
        accepted = 0
        while accepted < block - 1 and said[accepted] == draft[0, accepted + 1]:
            accepted += 1
        text += said[: accepted + 1]
        if surplus := past.get_seq_length() - (stored + accepted + 1):
            past.crop(-surplus)
    text = text[:new]
    return text[: text.index(stop) + 1] if stop in text else text, nfe


def autoregressive(model, prompt, new):
    text, past = [], None
    tokens = prompt
    for _ in range(new):
        logits, past = read(model, tokens, past)
        tokens = logits[:, -1:].argmax(-1)
        text.append(int(tokens))
    return text


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("block", [1, 2, 8])
def test_the_published_loop(block, tau):
    agreed = 0
    for seed in SEEDS:
        prompt = prompts(1, 1 + seed, seed)
        expected, nfe = linear_spec_generate(Nemotron(seed), prompt, 20, block, tau)
        model = Nemotron(seed)
        result = SelfSpeculation(mask_id=MASK, block_length=block, threshold=tau).generate(model, prompt, 20)
        assert result.new_tokens[0].tolist() == expected == autoregressive(Nemotron(seed), prompt, 20)
        assert int(result.nfe) == result.calls == result.rows_fed == nfe == len(model.calls)
        assert not result.stuck.any() and not result.ended.any()
        assert all(layer.self_attn.diffusion_lm for layer in model.encoder.layers)
        agreed += nfe < 1 + 2 * 19
    # Some drafts were right, or the comparison says nothing of what follows from it.
    assert agreed or tau or block == 1


def test_ends_where_the_published_loop_does():
    ended = 0
    for seed in range(16):
        prompt, stop = prompts(1, 5 + seed % 4, seed), seed % 7
        expected, nfe = linear_spec_generate(Nemotron(seed), prompt, 24, 8, stop=stop)
        writer = SelfSpeculation(mask_id=MASK, block_length=8, eos_id=stop, pad_id=21)
        result = writer.generate(Nemotron(seed), prompt, 24)
        assert result.new_tokens[0].tolist() == expected + [21] * (24 - len(expected))
        assert bool(result.ended) == (expected[-1] == stop) and int(result.nfe) == nfe
        ended += bool(result.ended)
    assert ended > 4


def test_prompts_of_different_lengths():
    rows = [prompts(1, length, length)[0] for length in (9, 2, 5)]
    writer = SelfSpeculation(mask_id=MASK, block_length=8, temperature=0.8)
    together = writer.generate(Nemotron(3), rows, 14, seed=5)
    assert together.sequences.shape == (3, 9 + 14) and together.prompt_length == 9
    for number, row in enumerate(rows):
        assert together.sequences[number, 9 - len(row) : 9].tolist() == row.tolist()
    assert torch.equal(writer.generate(Nemotron(3), rows, 14, seed=5).sequences, together.sequences)
    # A prompt's draws are its own, whatever comes before it.
    alone = writer.generate(Nemotron(3), rows[:1], 14, seed=5)
    assert torch.equal(alone.new_tokens[0], together.new_tokens[0])
    assert int(together.nfe.sum()) == together.calls


def test_equal_prompts_have_draws_of_their_own():
    writer = SelfSpeculation(mask_id=MASK, block_length=8, temperature=1.5)
    one, other = writer.generate(Nemotron(3), prompts(1, 5, 3).repeat(2, 1), 14, seed=5).new_tokens
    assert not torch.equal(one, other)


def test_draws_are_those_of_autoregressive_decoding():
    """The second token, whose draft is another distribution."""
    prompt, temperature = prompts(1, 4, 1), 1.5
    model = Nemotron(1)
    logits, _ = read(model, prompt)
    first = torch.softmax(logits[0, -1].double() / temperature, -1)
    each = torch.stack([
        torch.softmax(read(model, torch.cat([prompt, torch.tensor([[token]])], 1))[0][0, -1].double() / temperature, -1)
        for token in range(len(first))
    ])  # fmt: skip
    expected = first @ each
    draft = torch.full((1, 3), MASK)
    drafted = torch.zeros_like(expected)
    _, past = read(model, prompt)
    for token, probability in enumerate(first):
        draft[0, 0] = token
        hidden = model.encoder(input_ids=draft, past_key_values=past, use_cache=False).last_hidden_state
        drafted += probability * torch.softmax(hidden[0, 1].double() / temperature, -1)

    writer, counts = SelfSpeculation(mask_id=MASK, block_length=3, temperature=temperature), torch.zeros(23)
    for seed in range(300):
        counts[writer.generate(model, prompt, 2, seed=seed).new_tokens[0, 1]] += 1
    counts /= counts.sum()
    # Total variation: what 300 draws leave, and what another distribution would be off by.
    assert 0.5 * (counts - expected).abs().sum() < 0.2
    assert 0.5 * (drafted - expected).abs().sum() > 0.9


class Adapted(Nemotron):
    """With an adapter as PEFT puts them in: it acts unless its switch is off."""

    def __init__(self, seed):
        super().__init__(seed)
        self.adapter = torch.nn.Module()
        self.adapter._disable_adapters = False

    def core(self, *args, **kwargs):
        logits, cache = super().core(*args, **kwargs)
        if not self.adapter._disable_adapters:
            # Other tokens, but never the mask, of which the published loop would not see the end.
            logits = torch.cat([logits[..., :MASK].flip(-1), logits[..., MASK:]], -1)
        return logits, cache


def test_adapters_act_on_drafts_only():
    for seed in SEEDS:
        prompt = prompts(1, 6, seed)
        model = Adapted(seed)
        writer = SelfSpeculation(mask_id=MASK, block_length=8)
        result = writer.generate(model, prompt, 20)
        expected, nfe = linear_spec_generate(Adapted(seed), prompt, 20, 8)
        assert result.new_tokens[0].tolist() == expected == autoregressive(Nemotron(seed), prompt, 20)
        assert int(result.nfe) == nfe
        assert model.adapter._disable_adapters is False


class Listener:
    def __init__(self):
        self.said, self.drafts = [], []

    def put(self, value):
        self.said.append(value)

    def put_draft(self, value):
        self.drafts.append(value)

    def end(self):
        self.said.append(None)


def test_a_streamer_hears_drafts_and_text():
    listener, prompt = Listener(), prompts(1, 5, 2)
    writer = SelfSpeculation(mask_id=MASK, block_length=8)
    result = writer.generate(Nemotron(2), prompt, 20, streamer=listener)
    first, *text, last = listener.said
    assert torch.equal(first, prompt) and last is None
    assert torch.equal(torch.cat(text, 1), result.new_tokens)
    assert len(listener.drafts) == len(text) - 1 and all(draft.shape == (1, 8) for draft in listener.drafts)


class Writer(Listener):
    def put(self, value):
        super().put(value.zero_())

    def put_draft(self, value):
        super().put_draft(value.zero_())


@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_what_a_streamer_is_given_is_its_own(threshold):
    prompt, writer = prompts(1, 5, 2), SelfSpeculation(mask_id=MASK, block_length=8, threshold=threshold)
    expected = writer.generate(Nemotron(2), prompt, 20)
    result = writer.generate(Nemotron(2), prompt, 20, streamer=Writer())
    assert torch.equal(prompt, prompts(1, 5, 2))
    assert torch.equal(result.sequences, expected.sequences) and torch.equal(result.nfe, expected.nfe)


@pytest.mark.parametrize("broken", ["nan", "mask"])
def test_a_position_without_a_token_ends_the_row(broken):
    class Broken(Nemotron):
        def core(self, tokens, positions, **kwargs):
            logits, cache = super().core(tokens, positions, **kwargs)
            at = positions == 8
            logits[:, at] = torch.nan if broken == "nan" else 50.0 * torch.eye(23)[MASK]
            return logits, cache

    result = SelfSpeculation(mask_id=MASK, block_length=4).generate(Broken(0), prompts(1, 5, 0), 20)
    written = autoregressive(Nemotron(0), prompts(1, 5, 0), 4)
    assert bool(result.stuck) and result.new_tokens[0].tolist() == written + [MASK] * 16


def test_switches_are_put_back_after_an_error():
    class Failing(Adapted):
        def core(self, *args, **kwargs):
            if len(self.calls) == 4:
                raise RuntimeError("broken")
            return super().core(*args, **kwargs)

    model = Failing(0)
    with pytest.raises(RuntimeError, match="broken"):
        SelfSpeculation(mask_id=MASK, block_length=4).generate(model, prompts(1, 5, 0), 20)
    assert all(layer.self_attn.diffusion_lm for layer in model.encoder.layers)
    assert model.adapter._disable_adapters is False


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"block_length": 0}, ValueError, "block_length"),
        ({"threshold": 1.5}, ValueError, "threshold"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": torch.ones(2)}, TypeError, "temperature"),
        ({"eos_id": MASK}, ValueError, "eos_id: must not be the mask"),
        ({"backend": "gpu"}, ValueError, "backend"),
    ],
)
def test_bad_arguments(options, error, text):
    with pytest.raises(error, match=text):
        SelfSpeculation(**{"mask_id": MASK} | options)


def test_bad_calls():
    writer = SelfSpeculation(mask_id=MASK, block_length=4)
    with pytest.raises(
        TypeError, match=r"model: SelfSpeculation\(\) needs its encoder.layers .* got FastLLaDA"
    ):
        writer.generate(FastLLaDA(0), prompts(1, 5, 0), 4)
    with pytest.raises(ValueError, match=r"prompt_ids\[1\]: at least one token"):
        writer.generate(Nemotron(0), [[1, 2], []], 4)
    with pytest.raises(ValueError, match="max_new_tokens"):
        writer.generate(Nemotron(0), prompts(1, 5, 0), 0)
    with pytest.raises(ValueError, match="streamer: one prompt"):
        writer.generate(Nemotron(0), prompts(2, 5, 0), 4, streamer=Listener())
