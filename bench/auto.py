"""`python -m bench auto`: let measurements decide which kernel `backend="auto"` takes.

For each op and compute capability with a GPU result file, the kernel of the lowest geometric mean time comes
first, over the cases that both passed. Entries without a measurement stay as they are, resting on their budget.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

from dgemma_accel.backends import AUTO_FILE

from . import schema
from .cases import BenchError

RESULTS = Path(__file__).parent / "results"
KERNELS = ("cuda", "triton")


def measured(results: list[dict]) -> dict[tuple[str, str], dict[str, float]]:
    """{(op, compute capability): {backend: geometric mean microseconds}} of cases that all its kernels passed."""
    times: dict[tuple[str, str], dict[tuple, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        if result["kind"] != "ops" or result["environment"]["device_type"] != "cuda":
            continue
        capability = result["environment"]["capability"]
        for row in result["rows"]:
            if row["backend"] in KERNELS and row["status"] == "ok":
                case = row["shape"], row["dtype"], row["case"]
                times[row["op"], capability][case][row["backend"]] = row["median_us"]
    means = {}
    for key, cases in times.items():
        complete = [case for case in cases.values() if set(case) == set(KERNELS)]
        if complete:
            means[key] = {
                name: math.exp(sum(math.log(case[name]) for case in complete) / len(complete))
                for name in KERNELS
            }
    return means


def updated(table: dict, means: dict[tuple[str, str], dict[str, float]], device_of: dict[str, str]) -> dict:
    """The table with an entry for everything that was measured."""
    for (op, capability), by_backend in sorted(means.items()):
        first, second = sorted(KERNELS, key=by_backend.__getitem__)
        ratio = by_backend[second] / by_backend[first]
        basis = f"measured on {device_of[capability]}: {first} {ratio:.2f}x faster than {second}"
        table.setdefault(op, {})[capability] = {"order": [first, second, "reference"], "basis": basis}
    return table


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench auto", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=AUTO_FILE)
    options = parser.parse_args(arguments)
    results, status = [], 0
    # Older files first, so that a newer measurement of a case replaces an older one.
    for path in sorted(options.results.rglob("*.json")):
        try:
            results.append(schema.read(path))
        except BenchError as error:
            print(error)
            status = 2
    results.sort(key=lambda result: result["environment"]["date"])
    means = measured(results)
    devices = {result["environment"]["capability"]: result["environment"]["device"] for result in results}
    table = updated(json.loads(AUTO_FILE.read_text()), means, devices)
    options.output.write_text(json.dumps(table, indent=1) + "\n")
    print(
        f"{len(means)} measured entries in {options.output.name}"
        if means
        else "no GPU result with both kernels yet"
    )
    return status
