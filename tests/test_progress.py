"""`progress`: every backend against a statement row by row in plain Python."""

import itertools

import pytest
import torch

from dgemma_accel.ops.progress import progress
from dgemma_accel.reference.progress import ProgressCall

OP = "progress"
MASK = 7


def literal(call: ProgressCall):
    """The specification in words: a row at a time, no tensor arithmetic."""
    rows = []
    for b in range(len(call.tokens)):
        before, after = call.tokens[b].tolist(), call.new_tokens[b].tolist()
        opened, entropy = call.open[b].tolist(), call.entropy[b].tolist()
        was_active, stuck = bool(call.active[b]), bool(call.stuck[b])
        left = any(o and t == call.mask_id for o, t in zip(opened, after))
        asked = [i for i, o in enumerate(opened) if o and (call.noise or before[i] == call.mask_id)]
        decidable = [i for i in asked if entropy[i] != float("inf")]
        done = not left if call.finished is None else bool(call.finished[b])
        if before == after:
            if call.ends_unchanged:
                done = True
            elif not decidable and (call.noise or left):
                done = True
        ends = was_active and (call.last or done)
        undecided = len(decidable) < len(asked) if call.noise else left
        rows.append((was_active and not ends, stuck or (ends and undecided), int(call.nfe[b]) + was_active))
    return rows


def random_call(generator, batch, length, *, flags, finished, device="cpu") -> ProgressCall:
    """Rows of every kind: changed or not, masked or not, with and without a distribution, ended before or not."""

    def chance(p, *shape):
        return torch.rand(shape, generator=generator) < p

    def often(*shape):
        # A row holds all, none, some or about one of a kind: that one decides about the row, wherever it is.
        share = torch.tensor([0.0, 0.5, 1.0, 1 / max(length, 1)])
        share = share[torch.randint(4, (batch, 1), generator=generator)]
        return torch.rand(shape, generator=generator) < share

    tokens = torch.randint(0, 9, (batch, length), generator=generator)
    tokens[often(batch, length)] = MASK
    new_tokens = tokens.clone()
    new_tokens[often(batch, length)] = 3
    entropy = torch.rand(batch, length, generator=generator)
    entropy[often(batch, length)] = float("inf")
    entropy[chance(0.05, batch, length)] = float("nan")
    call = ProgressCall(
        tokens=tokens,
        new_tokens=new_tokens,
        open=often(batch, length),
        entropy=entropy,
        active=chance(0.7, batch),
        stuck=chance(0.2, batch),
        nfe=torch.randint(0, 1 << 40, (batch,), generator=generator),
        finished=chance(0.5, batch) if finished else None,
        mask_id=MASK,
        noise=flags[0],
        ends_unchanged=flags[1],
        last=flags[2],
    )
    return ProgressCall(*(f.to(device) if isinstance(f, torch.Tensor) else f for f in call))


CASES = list(itertools.product((False, True), repeat=4))


@pytest.mark.parametrize("length", [1, 33, 256, 300])
def test_every_row_goes_on_or_ends_as_said(backend, device, length):
    generator = torch.Generator().manual_seed(length)
    seen = set()
    for *flags, finished in CASES:
        call = random_call(generator, 40, length, flags=flags, finished=finished, device=device)
        results = progress(call, backend)
        assert [result.dtype for result in results] == [torch.bool, torch.bool, torch.int64]
        rows = list(zip(*(result.tolist() for result in results)))
        assert rows == literal(call)
        seen |= {(tuple(flags), active, stuck) for active, stuck, _ in rows}
    # Rows that go on, end well and end stuck.
    assert len(seen) > 20


def test_no_rows_and_no_positions(backend, device):
    generator = torch.Generator().manual_seed(0)
    for batch, length in ((0, 8), (3, 0)):
        call = random_call(
            generator, batch, length, flags=(False, False, False), finished=False, device=device
        )
        assert list(zip(*(result.tolist() for result in progress(call, backend)))) == literal(call)


def test_tensors_with_gaps(backend, device):
    generator = torch.Generator().manual_seed(1)
    call = random_call(generator, 6, 20, flags=(False, False, False), finished=True, device=device)
    apart = ProgressCall(
        *(f.repeat_interleave(2, -1)[..., ::2] if isinstance(f, torch.Tensor) else f for f in call)
    )
    assert not apart.tokens.is_contiguous() and not apart.active.is_contiguous()
    for got, wanted in zip(progress(apart, backend), progress(call, backend)):
        assert torch.equal(got, wanted) and got.stride() == wanted.stride()


def test_a_large_mask_id_and_rows_far_into_the_batch(backend, device):
    """Numbers beyond 32 bits stay what they are."""
    tokens = torch.tensor([[2**40, 2**40 + 1], [5, 6]], device=device)
    yes, no = torch.ones(2, dtype=torch.bool, device=device), torch.zeros(2, dtype=torch.bool, device=device)
    call = ProgressCall(
        tokens, tokens, yes[:, None].expand(2, 2), torch.zeros(2, 2, device=device), yes, no,
        torch.zeros(2, dtype=torch.int64, device=device), None, 2**40 + 1, False, False, False,
    )  # fmt: skip
    active, stuck, nfe = progress(call, backend)
    assert active.tolist() == [True, False] and not stuck.any() and nfe.tolist() == [1, 1]
