"""What the result files of a folder hold: of two files with a case, or a step of a variant, the newer counts."""

from __future__ import annotations

from pathlib import Path

from . import schema
from .cases import BenchError

# (device, op, shape, dtype, case)
Key = tuple[str, str, str, str, str]
# (device, model, context, batch, variant)
StepKey = tuple[str, str, int, int, str]


def find_results(folder: Path) -> tuple[list[tuple[Path, dict]], list[str]]:
    """(result files under a folder, one line for each that is of another schema).

    Raises:
        BenchError: there is no such folder.
    """
    if not folder.is_dir():
        raise BenchError(f"{folder}: no such folder")
    found, problems = [], []
    for path in sorted(folder.rglob("*.json")):
        if path.name == "summary.json":
            continue
        try:
            found.append((path, schema.read(path)))
        except BenchError as error:
            problems.append(str(error))
    return found, problems


def device(facts: dict) -> str:
    if facts["device_type"] == "cpu":
        return f"{facts['device']} CPU, {facts.get('threads', '?')} threads, {facts['capability']}"
    return facts["device"]


# Memory of a GPU that others may hold while the bench has it to itself: a desktop, contexts of CUDA.
MEMORY_OF_OTHERS = 4 * 2**30


def disturbance(result: dict) -> str | None:
    """Why the figures of a result are bounds and not measurements: its note, or another process on the GPU."""
    if result.get("note"):
        return result["note"]
    held = [clock["others_bytes"] for clock in result["clocks"].values() if clock and "others_bytes" in clock]
    if held and max(held) > MEMORY_OF_OTHERS:
        return f"Taken while other processes held {max(held) / 1e9:.0f} GB of the GPU's memory."
    return None


def full_runs(results: list[dict]) -> list[dict]:
    """Those that speak for the device: not of a quick run, whose cases are smaller, and alone on a GPU."""
    return [
        result for result in results if not result["options"].get("quick") and disturbance(result) is None
    ]


def newest_cases(results: list[dict]) -> dict[Key, list[tuple[dict, dict]]]:
    """The rows of every case, each with the environment of its file."""
    found: dict[Key, list[tuple[dict, dict]]] = {}
    for result in sorted(results, key=lambda one: one["environment"]["date"]):
        if result["kind"] != "ops":
            continue
        fresh: dict[Key, list[tuple[dict, dict]]] = {}
        for row in result["rows"]:
            key = (device(result["environment"]), row["op"], row["shape"], row["dtype"], row["case"])
            fresh.setdefault(key, []).append((row, result["environment"]))
        found |= fresh
    return found


def newest_steps(results: list[dict]) -> dict[StepKey, tuple[dict, dict]]:
    """The row of every variant at every context, with the environment of its file; by device, model and context."""
    found: dict[StepKey, tuple[dict, dict]] = {}
    for result in sorted(results, key=lambda one: one["environment"]["date"]):
        for row in result["rows"] if result["kind"] == "step" else ():
            where = device(result["environment"]), result["options"]["model"], row["context"], row["batch"]
            found[(*where, row["variant"])] = row, result["environment"]
    return dict(sorted(found.items(), key=lambda item: item[0][:4]))


def fastest(rows: list[tuple[dict, dict]]) -> tuple[dict, dict] | None:
    """The right row of the least time; None where no backend was right."""
    right = [one for one in rows if one[0]["status"] == "ok"]
    return min(right, key=lambda one: one[0]["median_us"]) if right else None
