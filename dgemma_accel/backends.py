"""Which implementations exist, what each supports, and which one `auto` takes and why.

An implementation is a module with

- `FEATURES`: what it supports, a mapping from a requirement's name to the container of allowed values
  (a requirement that it does not name is not limited),
- `unavailable()`: None, or one line that says what is missing on this machine,
- a function with the op's name that takes the arguments of the op's `reference` function.

Modules are imported when a backend is first considered, so importing the package touches neither a GPU nor
a compiler.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

logger = logging.getLogger("dgemma_accel")

BACKENDS = ("reference", "cpp", "triton", "cuda")
ENVIRONMENT_VARIABLE = "DGEMMA_ACCEL_BACKEND"

# Implementations by op. An op that lacks a backend has no entry for it.
MODULES: dict[str, dict[str, str]] = {
    "row_stats": {
        "reference": "dgemma_accel.backends_reference",
        "cpp": "dgemma_accel.native.row_stats_cpp",
        "triton": "dgemma_accel.triton_kernels.row_stats",
        "cuda": "dgemma_accel.native.row_stats_cuda",
    },
    "top_k_top_p": {
        "reference": "dgemma_accel.backends_reference",
        "cpp": "dgemma_accel.native.top_k_top_p_cpp",
        "triton": "dgemma_accel.triton_kernels.top_k_top_p",
        "cuda": "dgemma_accel.native.top_k_top_p_cuda",
    },
    "commit": {
        "reference": "dgemma_accel.backends_reference",
        "cpp": "dgemma_accel.native.commit_cpp",
        "triton": "dgemma_accel.triton_kernels.commit",
        "cuda": "dgemma_accel.native.commit_cuda",
    },
    "progress": {
        "reference": "dgemma_accel.backends_reference",
        "cpp": "dgemma_accel.native.progress_cpp",
        "triton": "dgemma_accel.triton_kernels.progress",
        "cuda": "dgemma_accel.native.progress_cuda",
    },
    "block_attention": {
        "reference": "dgemma_accel.backends_reference",
        "cpp": "dgemma_accel.native.block_attention_cpp",
        "triton": "dgemma_accel.triton_kernels.block_attention",
        "cuda": "dgemma_accel.native.block_attention_cuda",
    },
    "head_stats": {
        "reference": "dgemma_accel.backends_reference",
        "cpp": "dgemma_accel.native.head_stats_cpp",
        "triton": "dgemma_accel.triton_kernels.head_stats",
        "cuda": "dgemma_accel.native.head_stats_cuda",
    },
    "soft_embedding": {
        "reference": "dgemma_accel.backends_reference",
        "cpp": "dgemma_accel.native.soft_embedding_cpp",
        "triton": "dgemma_accel.triton_kernels.soft_embedding",
        "cuda": "dgemma_accel.native.soft_embedding_cuda",
    },
    "experts": {
        "reference": "dgemma_accel.backends_reference",
        "triton": "dgemma_accel.triton_kernels.experts",
        "cuda": "dgemma_accel.native.experts_cuda",
    },
    "feed_forward": {
        "reference": "dgemma_accel.backends_reference",
        "triton": "dgemma_accel.triton_kernels.feed_forward",
        "cuda": "dgemma_accel.native.feed_forward_cuda",
    },
    "quantize_rows": {
        "reference": "dgemma_accel.backends_reference",
        "triton": "dgemma_accel.triton_kernels.quantize_rows",
        "cuda": "dgemma_accel.native.quantize_rows_cuda",
    },
}

# Where the order by architecture comes from; `python -m bench auto` rewrites its measured entries.
AUTO_FILE = Path(__file__).with_name("auto.json")
HOST_ORDER = ("cpp", "reference")


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run the call."""


@dataclass(frozen=True)
class Implementation:
    op: str
    backend: str
    run: Callable
    module: ModuleType | None

    def missing(self, requirements: Mapping[str, object]) -> list[str]:
        """One line for each requirement that the implementation does not meet."""
        features = getattr(self.module, "FEATURES", {})
        lines = []
        for name, value in requirements.items():
            allowed = features.get(name)
            if allowed is not None and value not in allowed:
                lines.append(f"{name}: required {_show(value)}, supported {_show(allowed)}")
        return lines


@dataclass(frozen=True)
class Choice:
    """A backend and the reason for it."""

    implementation: Implementation
    reason: str


def _show(value: object) -> str:
    if isinstance(value, tuple):  # a compute capability
        return ".".join(map(str, value))
    if isinstance(value, (set, frozenset, list)):
        return "{" + ", ".join(sorted(_show(item) for item in value)) + "}"
    return str(value).removeprefix("torch.")


@functools.cache
def load(op: str, backend: str) -> tuple[Implementation | None, str | None]:
    """The implementation and None, or None and why there is none on this machine."""
    path = MODULES[op].get(backend)
    if path is None:
        return None, f"{op} has no {backend} implementation"
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        return None, f"{path} cannot be imported: {error}"
    reason = module.unavailable()
    if reason is not None:
        return None, reason
    return Implementation(op, backend, getattr(module, op), module), None


def requested(backend: str, op: str | None = None) -> str:
    """The backend asked for by argument, or by environment when the argument is "auto".

    The environment speaks for all ops at once, so it says nothing about an op that has no such implementation.
    """
    by_environment = backend == "auto"
    if by_environment:
        backend = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: must be one of {('auto', *BACKENDS)}, got {backend!r}")
    if by_environment and op is not None and backend not in MODULES[op]:
        return "auto"
    return backend


def choose(op: str, backend: str, requirements: Mapping[str, object]) -> Choice:
    """The implementation that a call takes.

    Args:
        op: name of the op.
        backend: "auto" or a backend's name.
        requirements: what the call needs; "device" ("cpu", "cuda") is always among them.

    Raises:
        BackendError: a named backend is missing here or does not support the call; the message says what is
            required, what is supported and what is missing.
    """
    backend = requested(backend, op)
    if backend != "auto":
        implementation, reason = load(op, backend)
        missing = [reason] if implementation is None else implementation.missing(requirements)
        if missing:
            raise BackendError(f"{op}: backend {backend!r} cannot run this call: " + "; ".join(missing))
        return Choice(implementation, "asked for")

    order, basis = auto_order(op, requirements)
    passed_over = []
    for name in order:
        implementation, reason = load(op, name)
        missing = [reason] if implementation is None else implementation.missing(requirements)
        if not missing:
            return Choice(implementation, "; ".join([basis, *passed_over]))
        passed_over.append(f"not {name}: {'; '.join(missing)}")
    raise BackendError(f"{op}: no backend can run this call: " + "; ".join(passed_over))


@functools.cache
def auto_table() -> dict:
    """{op: {key: {"order": [...], "basis": text}}} for NVIDIA GPUs.

    A key is a compute capability ("9.0"), one with a requirement of the call ("9.0 head_dim 512") that goes before it,
    or "default".
    """
    return json.loads(AUTO_FILE.read_text())


def auto_order(op: str, requirements: Mapping[str, object]) -> tuple[tuple[str, ...], str]:
    """The backends that `auto` tries, best first, and what the order rests on: a measurement or a budget."""
    if requirements["device"] == "cpu":
        return HOST_ORDER, "host"
    if requirements["device"] != "cuda":
        return ("reference",), f"no kernels for {requirements['device']}"
    entries = auto_table().get(op, {})
    major_minor = ".".join(map(str, requirements.get("compute_capability", ())))
    keys = [f"{major_minor} {name} {value}" for name, value in requirements.items()]
    entry = next((entries[key] for key in (*keys, major_minor, "default") if key in entries), None)
    if entry is None:
        return ("triton", "cuda", "reference"), "no entry for this op"
    return tuple(entry["order"]), entry["basis"]


_logged: set[tuple[str, str, str]] = set()


@functools.lru_cache(maxsize=1024)
def _chosen(op: str, backend: str, names: tuple[str, ...], values: tuple) -> Choice:
    return choose(op, backend, dict(zip(names, values)))


def pick(op: str, backend: str, requirements: Mapping[str, object]) -> Callable:
    """`choose`, remembered for the next call alike, saying once per op and device what `auto` took and why."""
    # The environment is asked at every call.
    name = requested(backend, op)
    choice = _chosen(op, name, tuple(requirements), tuple(requirements.values()))
    if backend != "auto":
        return choice.implementation.run
    key = (op, str(requirements["device"]), choice.implementation.backend)
    if key not in _logged:
        _logged.add(key)
        fell_back = choice.implementation.backend == "reference"
        logger.log(
            logging.WARNING if fell_back and requirements["device"] == "cuda" else logging.INFO,
            "%s on %s: backend %s (%s)",
            op,
            requirements["device"],
            choice.implementation.backend,
            choice.reason,
        )
    return choice.implementation.run


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) of a CUDA device, None for others."""
    if device.type != "cuda":
        return None
    # Without an index it is the current device, which may change.
    return torch.cuda.get_device_capability(device) if device.index is None else _capability(device)


def requirements(tensor: torch.Tensor, **needs: object) -> dict[str, object]:
    """What a call on the device of `tensor` needs there, with what else it needs."""
    if tensor.is_cpu:
        return {"device": "cpu", **needs}
    device = tensor.device
    capability = compute_capability(device)
    if capability is not None:
        needs["compute_capability"] = capability
    return {"device": device.type, **needs}
