"""Tile shapes by architecture.

One JSON file per architecture; each op has a list of entries `{"when": {...}, "use": {...}}`, and the first entry
all of whose `when` values equal the call's is taken. A value that is a list means "one of these", a missing key
means "any". `try` beside `use` lists shapes that `python -m bench tune` compares with it. Files are read when a kernel
is first launched, never at import, and nothing is tuned inside a call.
"""

from __future__ import annotations

import functools
import json
from importlib import resources

# Compute capability to the file with its tile shapes; a capability without a file takes the newest file of
# the same major version that is not newer than itself, else `default`.
FILES = {(8, 0): "sm_80", (8, 9): "sm_89", (9, 0): "sm_90", (10, 0): "sm_100", (12, 0): "sm_120"}
DEFAULT = "default"


def name_for(capability: tuple[int, int] | None) -> str:
    """The configuration file of a compute capability; None (no CUDA device) takes the default."""
    if capability is None:
        return DEFAULT
    older = [c for c in FILES if c[0] == capability[0] and c <= tuple(capability)]
    # sm_86 and sm_87 have the shared memory of sm_89, not that of sm_80.
    if older == [(8, 0)] and tuple(capability) != (8, 0):
        return FILES[(8, 9)]
    return FILES[max(older)] if older else DEFAULT


@functools.cache
def read(name: str) -> dict:
    """The configuration of one architecture, {op: [{"when": ..., "use": ...}, ...]}."""
    return json.loads(resources.files(__package__).joinpath(f"{name}.json").read_text())


def _fits(when: dict, call: dict) -> bool:
    return all(
        call[key] in value if isinstance(value, list) else call[key] == value for key, value in when.items()
    )


@functools.cache
def _select(name: str, op: str, call: tuple[tuple[str, object], ...]) -> dict:
    for entry in read(name)[op]:
        if _fits(entry["when"], dict(call)):
            return entry["use"]
    raise LookupError(f"configs/{name}.json: no entry of {op} for {dict(call)}")


def select(op: str, capability: tuple[int, int] | None, **call) -> dict:
    """The tile shape of a call of `op`: the first entry whose conditions hold for `call`."""
    return _select(name_for(capability), op, tuple(sorted(call.items())))


def shipped() -> list[tuple[str, str, dict, dict]]:
    """Every configuration in the package: (file name, op, when, use)."""
    names = (*FILES.values(), DEFAULT)
    return [
        (name, op, entry["when"], entry["use"])
        for name in names
        for op, entries in read(name).items()
        for entry in entries
    ]
