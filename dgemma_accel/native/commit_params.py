"""`CommitParams` of a call, and the tensors of its result."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.commit import CommitCall
from ..samplers.rules import Measure, Select, Write
from .params import check_parameter, extension

MEASURES, SELECTS, WRITES = frozenset(Measure), frozenset(Select), frozenset(Write)


def prepare(call: CommitCall) -> tuple[object, tuple[Tensor, ...], CommitCall]:
    """(struct, result of `commit` not yet written, the call: keep its tensors while the struct is used)."""
    call = call.contiguous()
    tokens, device = call.tokens, call.tokens.device
    for name, value, known in (
        ("measure", call.measure, MEASURES),
        ("select", call.select, SELECTS),
        ("write", call.write, WRITES),
    ):
        if value not in known:
            raise ValueError(f"{name}: unknown value {value}")
    for parameter in (call.k, call.value, call.value2, call.seed, call.offset, call.confidence):
        check_parameter(parameter, device)

    batch, length = tokens.shape
    new_tokens = torch.empty_like(tokens)
    committed = torch.empty_like(tokens, dtype=torch.bool)
    num_committed = tokens.new_empty(batch)
    if call.finished is None:
        depth = 0
        new_draft, new_history = tokens.new_empty(0), tokens.new_empty(0)
        new_finished = tokens.new_empty(0, dtype=torch.bool)
    else:
        depth = call.history.shape[0]
        new_draft, new_history = torch.empty_like(call.draft), torch.empty_like(call.history)
        new_finished = torch.empty_like(call.finished)
    result = (new_tokens, committed, num_committed, new_draft, new_history, new_finished)
    has_confidence = call.confidence is not None
    # `CommitParams.FIELDS` names them.
    params = extension().CommitParams(batch, length, *call, depth, has_confidence, *result)
    return params, result, call
