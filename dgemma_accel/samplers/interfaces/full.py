"""The whole sequence at every evaluation: LLaDA, Dream, masked language models of transformers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..numbers import check_flag
from .base import Interface, Session


class _FullSession(Session):
    free_rows = True

    def logits(self, tokens: Tensor, start: int, end: int) -> Tensor:
        kwargs = self.interface.padding_arguments(self.valid)
        for name in kwargs:
            if not self.takes(name):
                shifted = ", shift_logits=True" if self.interface.shift_logits else ""
                raise TypeError(
                    f"model: its forward takes no {name}, which a padded batch needs; "
                    f"interface=FullSequence(attention_mask=None{shifted}) runs prompts of different lengths in groups"
                )
        logits = self.checked(self.call(tokens, **kwargs), tokens)
        block = self.block_of(logits, start, end)
        if not kwargs or not self.interface.shift_logits or start == 0:
            return block
        # A row whose first token this is, an empty prompt in a padded batch, has nothing but padding before it.
        begins = ~self.valid[:, start - 1]
        if not bool(begins.any()):
            return block
        first = torch.where(begins[:, None], logits[:, start], block[:, 0])
        return torch.cat([first[:, None], block[:, 1:]], 1)


@dataclass(frozen=True)
class FullSequence(Interface):
    """model(tokens [B, N]) at every evaluation; where a batch is padded (on the left), with its mask.

    attention_mask: "2d" passes attention_mask [B, N] int64; "4d" [B, 1, N, N] bool; None passes none, and
        batches of different lengths are split instead, as a model needs it that ignores its mask (Fast-dLLM's
        LLaDA, and early revisions of LLaDA's own modeling_llada.py).
    position_ids: pass position_ids [B, N] that count from each row's first token.
    """

    attention_mask: str | None = "2d"
    position_ids: bool = False
    session = _FullSession

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self, "position_ids")
        if self.attention_mask not in ("2d", "4d", None):
            raise ValueError(f"attention_mask: must be '2d', '4d' or None, got {self.attention_mask!r}")

    @property
    def same_length(self) -> bool:
        return self.attention_mask is None

    def padding_arguments(self, valid: Tensor) -> dict[str, Tensor]:
        if bool(valid.all()):
            return {}
        arguments = {}
        if self.attention_mask == "2d":
            arguments["attention_mask"] = valid.long()
        elif self.attention_mask == "4d":
            arguments["attention_mask"] = valid[:, None, :, None] & valid[:, None, None, :]
        if self.position_ids:
            arguments["position_ids"] = (valid.long().cumsum(-1) - 1).clamp_min(0)
        return arguments


# As Dream's generation_utils.py calls it; padding has the position 1 there and 0 here, and nothing attends to it.
DREAM = FullSequence(shift_logits=True, attention_mask="4d", position_ids=True)
