"""`CommitParams` of a call, and the tensors of its result."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.commit import CommitCall
from ..samplers.encoding import Measure, Select, Write
from .params import extension, row_parameter

MEASURES, SELECTS, WRITES = frozenset(Measure), frozenset(Select), frozenset(Write)


def prepare(call: CommitCall) -> tuple[object, tuple[Tensor, ...], CommitCall]:
    """(struct, result of `commit` not yet written, the call: keep its tensors while the struct is used)."""
    call = call.contiguous()
    tokens, device = call.tokens, call.tokens.device
    if call.measure not in MEASURES or call.select not in SELECTS or call.write not in WRITES:
        raise ValueError(
            f"measure, select or write: unknown value among {call.measure}, {call.select}, {call.write}"
        )
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
    by_value = call._replace(
        k=row_parameter(call.k, device),
        value=row_parameter(call.value, device),
        value2=row_parameter(call.value2, device),
        seed=row_parameter(call.seed, device),
        offset=row_parameter(call.offset, device),
        confidence=row_parameter(call.confidence, device),
    )
    # `CommitParams.FIELDS` names them.
    params = extension().CommitParams(batch, length, *by_value, depth, has_confidence, *result)
    return params, result, call
