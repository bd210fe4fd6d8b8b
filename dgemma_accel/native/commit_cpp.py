"""`commit` on CPU threads, by the extension's host code."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.commit import CommitCall
from .commit_params import prepare
from .params import extension, missing_extension

FEATURES = {"device": {"cpu"}}

unavailable = missing_extension


def commit(call: CommitCall) -> tuple[Tensor, ...]:
    """As `reference.commit`."""
    params, result, alive = prepare(call)
    if result[2].numel() == 0:
        return result
    extension().commit_host(params, torch.get_num_threads())
    del alive
    return result
