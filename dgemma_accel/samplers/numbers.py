"""Checks of what rules, strategies and samplers are made of: when they are made, by the name that the caller wrote."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from ..ops import checks

Number = float | int | Tensor

# The most dimensions of a tensor parameter: one number, or one value per batch row.
SCALAR, PER_ROW = 0, 1
# Of tokens and of steps: sums with one of them stay far within int64.
LONGEST = 2**31 - 1
_INTEGERS = (torch.int64, torch.int32)
_FLOATS = (*checks.FLOAT_DTYPES, torch.float64)


def check_number(
    name: str,
    value: Number,
    low: float,
    high: float = math.inf,
    *,
    integer: bool = False,
    low_open: bool = False,
    tensor: int | None = None,
) -> Number:
    """Raise unless a number lies in [low, high], or in (low, high] with `low_open`, and is one of int64 or fp32.

    A tensor's dtype and shape are checked here, its values only where it is on the CPU: reading another one would
    wait for its device, so there the ops check it, with `check=True`.

    Args:
        tensor: SCALAR where a 0-d tensor may be given too, PER_ROW where also one value per row [B]; None: no tensor.

    Returns:
        The value, a number of NumPy as Python's own.

    Raises:
        TypeError, ValueError: the value is of a wrong type, dtype or shape, or out of range.
    """
    kind = "an int" if integer else "a number"
    if isinstance(value, Tensor):
        if tensor is None:
            raise TypeError(f"{name}: {kind} expected, got a tensor")
        checks.has_dtype(name, value, _INTEGERS if integer else _FLOATS)
        if value.ndim > tensor:
            rows = " or one value per row [B]" if tensor == PER_ROW else ""
            raise ValueError(f"{name}: {kind}, a 0-d tensor{rows} expected, got shape {tuple(value.shape)}")
        if checks.may_keep_numbers(value):
            checks.values_in(name, value, low, high, low_open=low_open, high_open=math.isinf(high))
        return value
    number = checks.plain_number(value, integer)
    if number is None:
        allowed = kind if tensor is None else f"{kind} or a tensor"
        raise TypeError(f"{name}: {allowed} expected, got {type(value).__name__}")
    most = checks.INT64_MAX if integer else checks.FP32_MAX
    # Written so that NaN is refused too.
    if not (low < number if low_open else low <= number) or not number <= high or not number <= most:
        high = min(high, most) if most < number < math.inf else high
        raise ValueError(f"{name}: must be in {checks.interval(low, high, low_open=low_open)}, got {value}")
    return number


def check_field(owner: Any, name: str, low: float, high: float = math.inf, **options) -> None:
    """`check_number` of a field of a frozen dataclass, which holds what that returns from then on."""
    value = getattr(owner, name)
    number = check_number(name, value, low, high, **options)
    if number is not value:
        object.__setattr__(owner, name, number)


def check_flag(owner: Any, name: str) -> None:
    """Raise TypeError unless a field of a dataclass is True or False: a word such as "no" would count as True."""
    checks.is_bool(name, getattr(owner, name))


def token_id(name: str, value) -> int:
    """A token id as an int, whatever kind of integer it came as.

    Raises:
        TypeError, ValueError: no integer, or one outside [0, 2**31).
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name}: a token id (an int) expected, got {type(value).__name__}")
    if not 0 <= number < 2**31:
        raise ValueError(f"{name}: a token id in [0, 2**31) expected, got {number}")
    return number


def token_ids(name: str, value) -> int | tuple[int, ...]:
    """One token id as an int, or several as a tuple."""
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return tuple(token_id(name, one) for one in value)
    return token_id(name, value)


class SpecialTokens:
    """The fields mask_id, eos_id and pad_id of a frozen dataclass, which are its own."""

    mask_id: int
    eos_id: int | tuple[int, ...] | None
    pad_id: int | None

    def check_special_tokens(self) -> None:
        """Raise unless they are token ids, and neither of the other two the mask."""
        object.__setattr__(self, "mask_id", token_id("mask_id", self.mask_id))
        if self.eos_id is not None:
            object.__setattr__(self, "eos_id", token_ids("eos_id", self.eos_id))
        if self.pad_id is not None:
            object.__setattr__(self, "pad_id", token_id("pad_id", self.pad_id))
        for name, ids in (("eos_id", self.eos_ids), ("pad_id", (self.pad_id,))):
            if self.mask_id in ids:
                raise ValueError(f"{name}: must not be the mask, got mask_id = {self.mask_id}")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        if self.eos_id is None:
            return ()
        return (self.eos_id,) if isinstance(self.eos_id, int) else self.eos_id

    @property
    def padding(self) -> int:
        if self.pad_id is not None:
            return self.pad_id
        return self.eos_ids[0] if self.eos_ids else 0
