"""`ProgressParams` of a call, and the tensors of its result."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.progress import ProgressCall
from .params import extension


def prepare(call: ProgressCall) -> tuple[object, tuple[Tensor, ...], ProgressCall]:
    """(struct, result of `progress` not yet written, the call: keep its tensors while the struct is used)."""
    call = call.contiguous()
    active, nfe = call.active, call.nfe
    result = (torch.empty_like(active), torch.empty_like(active), torch.empty_like(nfe))
    # `ProgressParams.FIELDS` names them.
    return extension().ProgressParams(*call.tokens.shape, *call, *result), result, call
