"""Autocast: the specification and its budgets say their dtypes themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def without_autocast(function: Callable) -> Callable:
    """Decorator: runs `function` as if the caller had no autocast, on any device."""

    @functools.wraps(function)
    def run(*arguments, **options):
        with torch._C._DisableAutocast():
            return function(*arguments, **options)

    return run
