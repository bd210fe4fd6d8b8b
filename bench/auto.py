"""`python -m bench auto`: let measurements decide which kernel `backend="auto"` takes.

For each op and compute capability (of attention, each head_dim too) with a GPU result file, the kernel of the lowest
geometric mean time comes first, over the cases that both passed. Entries without a measurement stay as they are,
resting on their budget.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from pathlib import Path

from dgemma_accel.backends import AUTO_FILE, MODULES

from .bench_ops import complain
from .cases import BenchError
from .measured import find_results, full_runs

RESULTS = Path(__file__).parent / "results"
KERNELS = ("cuda", "triton")


def _counts(result: dict) -> bool:
    of_ops_on_a_gpu = result["kind"] == "ops" and result["environment"]["device_type"] == "cuda"
    return of_ops_on_a_gpu and bool(full_runs([result]))


def device_of(results: list[dict]) -> dict[str, str]:
    """{compute capability: the device of it that was measured last}."""
    facts = [result["environment"] for result in results if _counts(result)]
    return {one["capability"]: one["device"] for one in sorted(facts, key=lambda one: one["date"])}


def group(row: dict) -> str:
    """What sets kernels of one op apart, as the table's keys name it; empty where one order serves the whole op."""
    found = re.search(r"\bD(\d+)\b", row["shape"]) if row["op"] == "block_attention" else None
    return f" head_dim {found[1]}" if found else ""


def measured(results: list[dict]) -> dict[tuple[str, str], dict[str, float]]:
    """{(op, key of the table): {backend: geometric mean microseconds}} of cases that all its kernels passed.

    Of several devices of one compute capability the one measured last counts, and no quick run does.
    """
    devices = device_of(results)
    times: dict[tuple[str, str], dict[tuple, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        facts = result["environment"]
        capability = facts["capability"]
        if not _counts(result) or facts["device"] != devices[capability]:
            continue
        for row in result["rows"]:
            if row["op"] in MODULES and row["backend"] in KERNELS and row["status"] == "ok":
                case = row["shape"], row["dtype"], row["case"]
                times[row["op"], capability + group(row)][case][row["backend"]] = row["median_us"]
    means = {}
    for key, cases in times.items():
        complete = [case for case in cases.values() if set(case) == set(KERNELS)]
        if complete:
            means[key] = {
                name: math.exp(sum(math.log(case[name]) for case in complete) / len(complete))
                for name in KERNELS
            }
    return means


def updated(table: dict, means: dict[tuple[str, str], dict[str, float]], devices: dict[str, str]) -> dict:
    """The table with an entry for everything that was measured."""
    for (op, key), by_backend in sorted(means.items()):
        first, second = sorted(KERNELS, key=by_backend.__getitem__)
        ratio = by_backend[second] / by_backend[first]
        basis = f"measured on {devices[key.split()[0]]}: {first} {ratio:.2f}x faster than {second}"
        table.setdefault(op, {})[key] = {"order": [first, second, "reference"], "basis": basis}
    return table


def file_text(table: dict) -> str:
    """The table as its file has it, an order on one line: what was not measured again gives no difference."""

    def entry(name: str, one: dict) -> str:
        inside = ",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in one.items())
        return f"  {json.dumps(name)}: {{\n{inside}\n  }}"

    ops = (
        f" {json.dumps(op)}: {{\n" + ",\n".join(entry(*item) for item in entries.items()) + "\n }"
        for op, entries in table.items()
    )
    return "{\n" + ",\n".join(ops) + "\n}\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench auto", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=AUTO_FILE)
    options = parser.parse_args(arguments)
    try:
        found, problems = find_results(options.results)
    except BenchError as error:
        complain(str(error))
        return 2
    print(*problems, sep="\n", end="\n" if problems else "")
    # Older files first, so that a newer measurement of a case replaces an older one.
    results = [result for _, result in found]
    results.sort(key=lambda result: result["environment"]["date"])
    means = measured(results)
    table = updated(json.loads(AUTO_FILE.read_text()), means, device_of(results))
    try:
        options.output.write_text(file_text(table))
    except OSError as error:
        complain(f"--output {options.output}: {error.strerror}")
        return 2
    print(
        f"{len(means)} measured entries in {options.output.name}"
        if means
        else "no GPU result with both kernels yet"
    )
    return 2 if problems else 0
