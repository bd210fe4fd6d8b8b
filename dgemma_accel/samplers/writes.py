"""Writes of `commit`: what becomes of candidates that are not committed."""

from __future__ import annotations

from dataclasses import dataclass, field

from .encoding import Write
from .numbers import check_field


@dataclass(frozen=True)
class Remask:
    """A candidate that is not committed becomes `mask_id` (>= 0)."""

    mask_id: int
    kind: Write = field(default=Write.REMASK, init=False, repr=False)

    def __post_init__(self) -> None:
        check_field(self, "mask_id", 0, 2**31 - 1, integer=True)

    @property
    def argument(self) -> int:
        return self.mask_id


@dataclass(frozen=True)
class Renoise:
    """A candidate that is not committed is drawn uniformly from [0, vocab_size) (Philox words 1 and 2)."""

    vocab_size: int
    kind: Write = field(default=Write.RENOISE, init=False, repr=False)

    def __post_init__(self) -> None:
        check_field(self, "vocab_size", 1, 2**31 - 1, integer=True)

    @property
    def argument(self) -> int:
        return self.vocab_size


@dataclass(frozen=True)
class Keep:
    """A candidate that is not committed keeps its token."""

    kind: Write = field(default=Write.KEEP, init=False, repr=False)

    @property
    def argument(self) -> int:
        return 0
