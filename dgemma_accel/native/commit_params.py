"""`CommitParams` of a call, and the tensors of its result."""

from __future__ import annotations

import torch
from torch import Tensor

from ..samplers.rules import Measure, Select, Write
from .params import address, extension, row_parameter


def prepare(
    tokens: Tensor,
    argmax: Tensor,
    sample: Tensor,
    entropy: Tensor,
    sample_prob: Tensor,
    top1_prob: Tensor,
    top2_prob: Tensor,
    candidates: Tensor | None,
    measure: int,
    select: int,
    flags: int,
    k: Tensor,
    value: Tensor,
    value2: Tensor,
    mask_id: int,
    write: int,
    write_argument: int,
    seed: Tensor,
    offset: Tensor,
    draft: Tensor | None,
    history: Tensor | None,
    finished: Tensor | None,
    confidence: Tensor | None,
):
    """(struct, result of `commit` not yet written, tensors that have to stay alive while the struct is used)."""
    device = tokens.device
    params = extension().CommitParams()
    params.batch, params.length = tokens.shape
    inputs = {
        "tokens": tokens, "argmax": argmax, "sample": sample, "entropy": entropy, "sample_prob": sample_prob,
        "top1_prob": top1_prob, "top2_prob": top2_prob, "candidates": candidates, "draft": draft,
        "history": history, "finished": finished,
    }  # fmt: skip
    inputs = {name: None if tensor is None else tensor.contiguous() for name, tensor in inputs.items()}
    for name, tensor in inputs.items():
        setattr(params, name, address(tensor))
    params.measure, params.select, params.write = Measure(measure), Select(select), Write(write)
    params.flags, params.mask_id, params.write_argument = int(flags), mask_id, write_argument
    numbers = {"k": k, "value": value, "value2": value2, "seed": seed, "offset": offset}
    for name, number in numbers.items():
        setattr(params, name, row_parameter(number, device))
    if confidence is not None:
        params.has_confidence = True
        params.confidence = row_parameter(confidence, device)

    batch = tokens.shape[0]
    new_tokens = torch.empty_like(inputs["tokens"])
    committed = torch.empty(tokens.shape, dtype=torch.bool, device=device)
    num_committed = torch.empty(batch, dtype=torch.int64, device=device)
    if finished is None:
        new_draft, new_history = tokens.new_empty(0), tokens.new_empty(0)
        new_finished = torch.empty(0, dtype=torch.bool, device=device)
    else:
        params.depth = history.shape[0]
        new_draft = torch.empty_like(inputs["draft"])
        new_history = torch.empty_like(inputs["history"])
        new_finished = torch.empty_like(inputs["finished"])
    result = (new_tokens, committed, num_committed, new_draft, new_history, new_finished)
    names = ("new_tokens", "committed", "num_committed", "new_draft", "new_history", "new_finished")
    for name, tensor in zip(names, result):
        setattr(params, name, tensor.data_ptr())
    return params, result, (inputs, numbers, confidence)
