"""What a user would run otherwise, one file each.

A peer module has

- `NAME`: the name that `--peer` takes,
- `unavailable(device)`: None, or one line that says why it cannot run here,
- `variants(case, inputs)`: the ways in which it computes a case, a list of `Variant`; empty for ops it does not
  have. It may raise `Skipped` with a reason,
- optionally `SLOW_START = True`: it compiles first, so a quick run leaves it out.

Modules are imported when the bench runs; what they stand for is imported in `unavailable` and later.
"""

from __future__ import annotations

import importlib
from types import ModuleType

MODULES = (
    "torch_chain",
    "published_samplers",
    "sdpa",
    "flex_attention",
    "torch_compile",
    "transformers",
    "vllm",
    "flashinfer",
    "liger",
    "cut_cross_entropy",
)


def load(names: list[str] | None = None) -> tuple[list[ModuleType], list[str]]:
    """The peer modules asked for (all of them by default), and one line for each name that is unknown."""
    problems = [
        f"unknown peer {name!r}; known are {', '.join(MODULES)}"
        for name in names or ()
        if name not in MODULES
    ]
    chosen = [name for name in MODULES if names is None or name in names]
    return [importlib.import_module(f"{__name__}.{name}") for name in chosen], problems


def missing(package: str, error: Exception) -> str:
    """The line for a peer whose package cannot be imported."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == package:
        return f"{package} is not installed"
    return f"{package} cannot be imported: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
