"""`progress` on the CPU, by the extension's host code."""

from __future__ import annotations

from torch import Tensor

from ..reference.progress import ProgressCall
from .params import extension, missing_extension
from .progress_params import prepare

FEATURES = {"device": {"cpu"}}

unavailable = missing_extension


def progress(call: ProgressCall) -> tuple[Tensor, ...]:
    """As `reference.progress`."""
    params, result, alive = prepare(call)
    extension().progress_host(params)
    del alive
    return result
