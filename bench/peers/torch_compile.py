"""The chains of `torch_chain` under torch.compile."""

from __future__ import annotations

import shutil

import torch
import torch.nn.functional as F

from ..cases import Case, Variant
from . import torch_chain

NAME = "torch_compile"
# Compiling takes longer than a quick run should.
SLOW_START = True


def unavailable(device: torch.device) -> str | None:
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler on a CPU"
    return None


def _compiled(function):
    return torch_chain.as_in_a_process_that_compiles(torch.compile(function, dynamic=False))


def variants(case: Case, inputs) -> list[Variant]:
    if case.op == "row_stats":
        step = _compiled(torch_chain.sampler_step)
        return [
            Variant(
                "transformers chain, compiled",
                lambda inputs: lambda: step(inputs.logits, inputs.temperature, inputs.softcap),
                lambda result: {"argmax": result[0], "entropy": result[2]},
                capturable=False,
            )
        ]
    if case.op == "commit" and inputs.state is not None:
        run = _compiled(torch_chain.decision)
        return [
            Variant("decision, compiled", lambda inputs: lambda: run(inputs), lambda r: {"committed": r[0]})
        ]
    if case.op == "soft_embedding":

        def conditioning(logits, weight, temperature, softcap):
            kept = (torch_chain.softcapped(logits, softcap) / temperature).to(weight.dtype)
            return kept.softmax(dim=-1, dtype=torch.float32).to(weight.dtype) @ weight

        run = _compiled(conditioning)
        return [
            Variant(
                "softcap, softmax, product, compiled",
                lambda inputs: lambda: run(inputs.logits, inputs.weight, inputs.temperature, inputs.softcap),
                lambda result: {"result": result},
            )
        ]
    if case.op == "head_stats":

        def head(hidden, weight, temperature, softcap):
            return torch_chain.sampler_step(F.linear(hidden, weight), temperature, softcap)

        run = _compiled(head)
        return [
            Variant(
                "linear and chain, compiled",
                lambda inputs: lambda: run(inputs.hidden, inputs.weight, inputs.temperature, inputs.softcap),
                lambda result: {"argmax": result[0]},
                capturable=False,
            )
        ]
    return []
