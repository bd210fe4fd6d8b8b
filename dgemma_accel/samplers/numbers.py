"""Checks of what rules, strategies and samplers are made of: when they are made, by the name that the caller wrote."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

from ..ops import checks

Number = float | int | Tensor

# The most dimensions of a tensor parameter: one number, or one value per batch row.
SCALAR, PER_ROW = 0, 1
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
) -> None:
    """Raise unless a number is finite and lies in [low, high], or in (low, high] with `low_open`.

    A tensor's dtype and shape are checked here, its values only where it is on the CPU: reading another one would
    wait for its device, so there the ops check it, with `check=True`.

    Args:
        tensor: SCALAR where a 0-d tensor may be given too, PER_ROW where also one value per row [B]; None: no tensor.

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
        return
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        allowed = kind if tensor is None else f"{kind} or a tensor"
        raise TypeError(f"{name}: {allowed} expected, got {type(value).__name__}")
    # Written so that NaN is refused too.
    if not (low < value if low_open else low <= value) or not value <= high or math.isinf(value):
        raise ValueError(f"{name}: must be in {checks.interval(low, high, low_open=low_open)}, got {value}")


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
