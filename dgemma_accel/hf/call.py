"""One call of `generate`: its options, and what its denoising steps report."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.row_stats import RowStats
from ..reference.philox import WORD_RENOISE_HIGH, WORD_RENOISE_LOW, below, random_words

# Offsets of the draws of canvas k start at k * CANVAS_STRIDE; its starting canvas has the last of them.
CANVAS_STRIDE = 1 << 32


def draw_seed() -> Tensor:
    """A 0-d int64 seed from torch's default generator, on the host: repeatable, and the device is not waited for."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")


@dataclass(eq=False)
class CanvasReport:
    """What the steps of one canvas left behind; nothing here waits for the device.

    steps: [B] int64, decoder passes of each row until it was finished. draft: [B, C] int64.
    counted: [B] bool, rows of which the loop of the original `generate` counts all these steps as one pass; those of
    others it does not count.
    confidence, entropy: [B, C] fp32 of the draft, from each row's last pass; None unless asked for.
    logprobs: [B, C, K] fp32 of the tokens asked for, likewise. ended: [B] bool, rows without a step, or None.
    """

    steps: Tensor
    counted: Tensor | None = None
    draft: Tensor | None = None
    confidence: Tensor | None = None
    entropy: Tensor | None = None
    logprobs: Tensor | None = None
    ended: Tensor | None = None


@dataclass(eq=False)
class Call:
    """Options and reports of one `generate`.

    seed: 0-d int64, or None until the first canvas draws one. seed_given: it is the caller's.
    pinned: [B, C] bool, positions of the first canvas that keep their token, or None.
    max_steps: steps after which a canvas is taken as it is, or None.
    logprobs_of: [K] int64, tokens whose log-probabilities are reported, or None.
    put_draft: the streamer's, or None. needs_logits: it takes the logits of every step instead of a draft.
    drafts_taken: the accelerated sampler delivers the drafts of this canvas, so the original's loop does not.
    canvases_begun: by either sampler. steps_left: with the last step that the original took.
    leased: (bank, cache) of the buffers to give back.
    finished: [B] bool, rows that ended with an earlier canvas; None during the first.
    ended: the same where these write nothing but padding and nobody looks at their drafts, else None.
    given_mask: the caller's attention mask, which it may write.
    masks_on_host: attention masks of the device by id, with how often they were written and their values then.
    undisturbed: no code of the caller's is known to run while the call goes on, so the model stays as it was found.
    """

    seed: Tensor | None = None
    seed_given: bool = False
    pinned: Tensor | None = None
    max_steps: int | None = None
    with_confidence: bool = False
    with_steps: bool = False
    logprobs_of: Tensor | None = None
    put_draft: Callable | None = None
    needs_logits: bool = False
    drafts_taken: bool = False
    canvases_begun: int = 0
    steps_left: int = 0
    leased: list[tuple] = field(default_factory=list)
    finished: Tensor | None = None
    ended: Tensor | None = None
    given_mask: Tensor | None = None
    masks_on_host: dict[int, tuple[Tensor, int, Tensor]] = field(default_factory=dict)
    undisturbed: bool = False
    _found: dict[tuple, object] = field(default_factory=dict)
    reports: list[CanvasReport] = field(default_factory=list)

    def options_in_use(self) -> list[str]:
        """Names of the options that only the accelerated sampler knows."""
        given = {
            "seed": self.seed_given,
            "pinned": self.pinned is not None,
            "max_steps": self.max_steps is not None,
            "return_confidence": self.with_confidence,
            "return_steps": self.with_steps,
            "return_logprobs": self.logprobs_of is not None,
        }
        return [name for name, used in given.items() if used]

    @property
    def reporting(self) -> bool:
        return self.with_confidence or self.with_steps or self.logprobs_of is not None

    def mask_on_host(self, mask: Tensor) -> Tensor | None:
        """The values of a mask that are known on the host, unless it was written since."""
        _, written, host = self.masks_on_host.get(id(mask), (None, None, None))
        return host if host is not None and written == version(mask) else None

    def once(self, find: Callable, *arguments, on: Tensor | None = None):
        """`find(*arguments)`, a question about modules of the model; in an undisturbed call it is asked once.

        To go through the modules takes the host milliseconds, before each canvas.

        Args:
            on: a last argument, of which the answer depends on the device.
        """
        given = arguments if on is None else (*arguments, on)
        if not self.undisturbed:
            return find(*given)
        # Modules are known by identity, and whatever else is asked about has a hash.
        key = find, arguments, None if on is None else on.device
        if key not in self._found:
            self._found[key] = find(*given)
        return self._found[key]

    def forget(self, find: Callable, *arguments) -> None:
        """What `find(*arguments)` found may no longer be so."""
        self._found.pop((find, arguments, None), None)

    def disturb(self) -> None:
        """Code of the caller's runs after all, or may: from now on everything is asked each time."""
        self.undisturbed = False
        self._found.clear()

    def begin_canvas(self, batch: int, device: torch.device) -> int:
        """The offset of the first draw of the next canvas."""
        if self.seed is None:
            self.seed = draw_seed()
        self.reports.append(CanvasReport(torch.zeros(batch, dtype=torch.int64, device=device)))
        self.canvases_begun += 1
        return (self.canvases_begun - 1) * CANVAS_STRIDE

    def leave_step(self, cur_step: int) -> None:
        """The original takes the step with `cur_step` steps left, hands over its draft and counts it."""
        self.drafts_taken = False
        # No seed is drawn for it: its own noise is that of the generator.
        if cur_step >= self.steps_left:
            self.canvases_begun += 1
        self.steps_left = cur_step

    def starting_canvas(self, batch: int, length: int, vocab: int, device: torch.device) -> Tensor:
        """[B, C] int64 tokens drawn uniformly from the seed, for the canvas that begins next."""
        offset = (self.canvases_begun + 1) * CANVAS_STRIDE - 1
        rows = torch.arange(batch * length, device=device)
        words = random_words(self.seed, torch.tensor(offset, device="cpu"), rows)
        return below(words[WORD_RENOISE_HIGH], words[WORD_RENOISE_LOW], vocab).view(batch, length)

    def take_drafts(self) -> Callable | None:
        """Where drafts go from now on, if anywhere."""
        self.drafts_taken = True
        return self.put_draft

    def note_step(
        self, stats: RowStats, draft: Tensor, frozen: Tensor, logprobs: Tensor | None = None
    ) -> None:
        """Note a step in the report of its canvas; rows that were finished before it keep what they had."""
        if not self.reports:
            return
        report = self.reports[-1]
        report.steps = report.steps + ~frozen
        report.draft = draft
        noted = {"logprobs": logprobs}
        if self.with_confidence:
            noted |= {"confidence": stats.top1_prob, "entropy": stats.entropy}
        for name, now in noted.items():
            before = getattr(report, name)
            if now is not None and before is not None:
                now = torch.where(frozen.view(-1, *(1,) * (now.ndim - 1)), before, now)
            setattr(report, name, now)


def version(tensor: Tensor) -> int:
    """How often a tensor was written in place; of those of inference mode that is not counted."""
    return 0 if tensor.is_inference() else tensor._version


# A context variable keeps two threads that generate with one model apart.
_current: ContextVar[Call | None] = ContextVar("dgemma_accel_generate", default=None)


def active_call() -> Call | None:
    return _current.get()


class calling:
    """`with calling(call):` makes it the current call."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def __enter__(self) -> Call:
        self.token = _current.set(self.call)
        return self.call

    def __exit__(self, *_) -> None:
        _current.reset(self.token)
        while self.call.leased:
            bank, cache = self.call.leased.pop()
            bank.give_back(cache)
