"""The form of a result file, and the check that a file has it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from .cases import BenchError

SCHEMA = "dgemma-accel-bench/1"
KINDS = ("ops", "step")
STATUSES = ("ok", "wrong", "failed", "skipped")

# Fields that earlier files of the schema do not have.
LATER = frozenset({"canvas", "canvas_ms", "canvas_launches", "kernels", "head_peak_bytes", "threads"})
# The parts of a step.
COMPONENTS = ("attention", "experts", "head", "sampler", "self-conditioning", "rest")

_NUMBER = (int, float)
_OPTIONAL = (int, float, type(None))

ENVIRONMENT = {
    "device": str,
    "device_type": str,
    "capability": str,
    "threads": int,
    "driver": (str, type(None)),
    "cuda": (str, type(None)),
    "torch": str,
    "triton": (str, type(None)),
    "transformers": (str, type(None)),
    "commit": (str, type(None)),
    "clean": (bool, type(None)),
    "date": str,
}
TIMED = {
    "status": str,
    "error": (str, type(None)),
    "median_us": _OPTIONAL,
    "p20_us": _OPTIONAL,
    "p80_us": _OPTIONAL,
    "runs": (int, type(None)),
    "method": (str, type(None)),
    "peak_extra_bytes": (int, type(None)),
}
OP_ROW = {
    "op": str,
    "case": str,
    "shape": str,
    "dtype": str,
    "backend": str,
    "bytes": int,
    "flops": int,
    "floor_us": _NUMBER,
    "roofline_percent": _OPTIONAL,
    "cold_cache": bool,
    "peers": list,
    **TIMED,
}
PEER_ROW = {"peer": str, "variant": str, "ratio": _OPTIONAL, **TIMED}
# What a row of status "ok" has measured.
OP_MEASURED = ("median_us", "p20_us", "p80_us", "runs", "method", "roofline_percent")
PEER_MEASURED = OP_MEASURED[:-1]
STEP_MEASURED = ("step_ms", "floor_multiple")
STEP_ROW = {
    "variant": str,
    "context": int,
    "batch": int,
    "canvas": int,
    "steps": int,
    "status": str,
    "error": (str, type(None)),
    "step_ms": _OPTIONAL,
    "canvas_ms": _OPTIONAL,
    "canvas_launches": _OPTIONAL,
    "kernels": (list, type(None)),
    "components_ms": (dict, type(None)),
    "launches": _OPTIONAL,
    "host_syncs": _OPTIONAL,
    "peak_extra_bytes": (int, type(None)),
    "head_peak_bytes": (int, type(None)),
    "floor_ms": _NUMBER,
    "floor_multiple": _OPTIONAL,
}


def _is_a(value: object, kinds: type | tuple) -> bool:
    """isinstance, where True and False are no numbers."""
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    return type(value) in allowed if isinstance(value, bool) else isinstance(value, allowed)


def _is_finite(value: object) -> bool:
    """False for a number that no float holds; JSON as Python reads it has NaN and integers of any size."""
    if not isinstance(value, (int, float)):
        return True
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _numbers(where: str, value: object) -> list[str]:
    """What keeps a value from being an object of numbers."""
    fields = dict.fromkeys(value, _NUMBER) if isinstance(value, dict) else {}
    return _fields(where, value, fields)


def _fields(where: str, value: object, fields: dict, measured: tuple[str, ...] = ()) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where}: an object expected, got {type(value).__name__}"]
    problems = []
    for name, kinds in fields.items():
        if name not in value and name in LATER:
            continue
        if name not in value:
            problems.append(f"{where}: {name} is missing")
        elif not _is_a(value[name], kinds):
            problems.append(f"{where}: {name} has type {type(value[name]).__name__}")
        elif not _is_finite(value[name]):
            problems.append(f"{where}: {name} is no finite number")
    if value.get("status", "ok") not in STATUSES:
        problems.append(f"{where}: unknown status {value['status']!r}")
    elif value.get("status") == "ok":
        problems += [f"{where}: ok without {name}" for name in measured if value.get(name, 0) is None]
    return problems


def violations(result: object) -> list[str]:
    """What keeps a result from being one of this schema, one line each."""
    if not isinstance(result, dict):
        return [f"an object expected, got {type(result).__name__}"]
    if result.get("schema") != SCHEMA:
        return [f"schema {result.get('schema')!r} instead of {SCHEMA!r}"]
    if result.get("kind") not in KINDS:
        return [f"kind {result.get('kind')!r}, allowed are {', '.join(KINDS)}"]
    problems = _fields("environment", result.get("environment"), ENVIRONMENT)
    for name in ("ceilings", "clocks", "options"):
        if not isinstance(result.get(name), dict):
            problems.append(f"{name} is missing")
    if isinstance(result.get("clocks"), dict):
        for name, clock in result["clocks"].items():
            problems += _numbers(f"clocks.{name}", clock) if clock is not None else []
    facts = result.get("environment")
    if isinstance(facts, dict) and facts.get("device_type") == "cpu" and "threads" not in facts:
        problems.append("environment: threads is missing")
    if result["kind"] == "step" and isinstance(result.get("options"), dict):
        problems += _fields("options", result["options"], {"model": str})
        model = result["options"].get("model")
        if isinstance(model, str) and not model.strip():
            problems.append("options: model is empty")
    if not isinstance(result.get("note", ""), str):
        problems.append(f"note has type {type(result['note']).__name__}")
    if not isinstance(result.get("rows"), list) or not isinstance(result.get("problems"), list):
        return [*problems, "rows or problems are missing"]
    for number, row in enumerate(result["rows"]):
        where = f"rows[{number}]"
        form = (OP_ROW, OP_MEASURED) if result["kind"] == "ops" else (STEP_ROW, STEP_MEASURED)
        problems += _fields(where, row, *form)
        if not isinstance(row, dict):
            continue
        if result["kind"] == "step":
            problems += _of_a_step(where, row)
        elif isinstance(row.get("peers"), list):
            for index, peer in enumerate(row["peers"]):
                problems += _fields(f"{where}.peers[{index}]", peer, PEER_ROW, PEER_MEASURED)
    return problems


def _of_a_step(where: str, row: dict) -> list[str]:
    """What keeps the values of a step's row from going together."""
    problems = []
    if row.get("canvas_ms") is not None and "canvas" not in row:
        problems.append(f"{where}: canvas_ms without canvas")
    if isinstance(row.get("canvas", 1), int) and row.get("canvas", 1) < 1:
        problems.append(f"{where}: canvas is {row['canvas']}")
    split = row.get("components_ms")
    if isinstance(split, dict):
        inside = f"{where}.components_ms"
        problems += [f"{inside}: {name} is missing" for name in COMPONENTS if name not in split]
        problems += _numbers(inside, split)
    return problems


def check_targets(file: Path | None, folder: Path | None) -> None:
    """Raise before anything is measured if a result file and a folder for plots cannot be written there.

    Raises:
        BenchError: one is in the place of the other, or below a file, or nothing may be written there.
    """
    if file is not None and file.is_dir():
        raise BenchError(f"--json {file}: is a folder, a file is needed")
    for option, needed in (("--json", file and file.absolute().parent), ("--plot", folder)):
        if needed is None:
            continue
        there = next(one for one in (needed.absolute(), *needed.absolute().parents) if one.exists())
        if not there.is_dir():
            raise BenchError(f"{option}: {there} is a file, a folder is needed")
        if not os.access(there, os.W_OK):
            raise BenchError(f"{option}: nothing may be written in {there}")


def write(result: dict, path: Path) -> None:
    problems = violations(result)
    if problems:
        raise AssertionError(f"the bench made a result of another form: {problems[0]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # A run that is ended while it writes leaves what it wrote the last time.
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)


def read(path: Path) -> dict:
    """A result file.

    Raises:
        BenchError: it cannot be read, is not JSON or has another schema.
    """
    try:
        return parse(path.read_text(), path)
    except OSError as error:
        raise BenchError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BenchError(f"{path}: not JSON: {error}") from error


def parse(text: str, path: Path) -> dict:
    """The result that a file's text is.

    Raises:
        BenchError: it is not JSON or has another schema.
    """
    try:
        result = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BenchError(f"{path}: not JSON: {error}") from error
    problems = violations(result)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise BenchError(f"{path}: not a result file of this bench: {problems[0]}{more}")
    return result
