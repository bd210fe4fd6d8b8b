"""From cases to rows: check every implementation, time those that are right against the peers, measure their memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from . import INCOMPLETE, memory, timing
from .cases import Case, Skipped, Variant, disagreement, dtype_name
from .ceilings import Ceilings

# Time for the samples of one variant; a variant that needs longer for three samples takes what it needs.
SECONDS = 1.0
QUICK_SECONDS = 0.2


# What a problem's line says of a case or a variant that no time was left for.
NOT_REACHED = "not reached within the budget"


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def blank(status: str, error: str | None) -> dict:
    return {
        "status": status,
        "error": error,
        "median_us": None,
        "p20_us": None,
        "p80_us": None,
        "runs": None,
        "method": None,
        "peak_extra_bytes": None,
    }


def timed(result: timing.Timing | Exception, extra: int | None) -> dict:
    if isinstance(result, Exception):
        return blank("failed", _one_line(result))
    return {
        "status": "ok",
        "error": None,
        "median_us": result.median,
        "p20_us": result.p20,
        "p80_us": result.p80,
        "runs": result.runs,
        "method": result.method,
        "peak_extra_bytes": extra,
    }


class DeviceLost(RuntimeError):
    """The device answers no more: an illegal access, say, ends all work of the process on it.

    rows, problems: what `Runner.run` has of the case.
    """

    def __init__(self, message: str, rows: list[dict], problems: list[str]) -> None:
        super().__init__(message)
        self.rows, self.problems = rows, [*problems, message]


class Runner:
    """Runs cases on one device.

    Args:
        peers: modules of bench.peers that are present.
        backends: the implementations to time, None for all that are present.
        seconds: time for the samples of one variant; None for the usual.
        say: takes each line that is worth telling at once.
    """

    def __init__(
        self,
        device: torch.device,
        ceilings: Ceilings,
        peers: list[ModuleType],
        *,
        backends: set[str] | None = None,
        quick: bool = False,
        seconds: float | None = None,
        say: Callable[[str], None] = print,
    ):
        self.device = device
        self.ceilings = ceilings
        self.peers = peers
        self.backends = backends
        self.seconds = seconds or (QUICK_SECONDS if quick else SECONDS)
        self.least = 2 if quick else 3
        self.say = say

    def run(self, case: Case) -> tuple[list[dict], list[str]]:
        """(one row for each backend, problems that make the run fail).

        Raises:
            DeviceLost: no other case can run in this process.
        """
        free = memory.available(self.device)
        if case.memory > free:
            line = (
                f"{case.title}: does not fit: needs {case.memory / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            )
            return [], [line]
        try:
            rows, problems = self._run(case)
        except torch.OutOfMemoryError as error:
            rows, problems = [], [f"{case.title}: does not fit: {_one_line(error)}"]
        except Exception as error:
            rows, problems = [], [f"{case.title}: {_one_line(error)}"]
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise DeviceLost(
                    f"the GPU was lost in {case.title}: {_one_line(error)}", rows, problems
                ) from error
        return rows, problems

    def _run(self, case: Case) -> tuple[list[dict], list[str]]:
        inputs = case.make(self.device, 0)
        problems: list[str] = []
        verdicts: dict[str, dict] = {}
        good: list[Variant] = []
        details: dict[str, dict] = {}
        for variant in case.backends:
            if self.backends is not None and variant.name not in self.backends:
                continue
            try:
                result = variant.prepare(inputs)()
                wrong = case.check(result, inputs)
                if case.detail is not None:
                    details[variant.name] = case.detail(result, inputs)
                del result
            except Exception as error:
                verdicts[variant.name] = blank("failed", _one_line(error))
                problems.append(f"{case.title}: {variant.name}: {_one_line(error)}")
                continue
            if wrong:
                more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
                verdicts[variant.name] = blank("wrong", wrong[0] + more)
                problems.append(f"{case.title}: {variant.name} is wrong: {wrong[0]}{more}")
            else:
                good.append(variant)

        peers = self._peers(case, inputs)
        runnable = {("", variant.name): variant for variant in good}
        runnable |= {(peer, variant.name): variant for peer, variant, verdict in peers if verdict is None}
        set_bytes = max(case.bytes, 1)
        spare = memory.available(self.device) - case.memory
        count = timing.input_sets(set_bytes, self.device, spare // 4)
        sets = [inputs, *(case.make(self.device, seed) for seed in range(1, count))]
        cold = count * set_bytes >= 2 * memory.cache_size(self.device)

        calls, extra, broken = {}, {}, {}
        for key, variant in runnable.items():
            try:
                prepared = [variant.prepare(one) for one in sets]
                extra[key] = memory.peak_extra(prepared[0], self.device)
            except Exception as error:
                broken[key] = timing.forget_frames(error)
                continue
            calls[key] = (prepared, variant.capturable)
        timings = timing.measure(calls, self.device, seconds=self.seconds, least=self.least) | broken

        peer_rows = [
            {"peer": peer, "variant": variant.name, "ratio": None}
            | (verdict or timed(timings[peer, variant.name], extra.get((peer, variant.name))))
            for peer, variant, verdict in peers
        ]
        floor = self.ceilings.floor(case.bytes, case.flops, _matrix_dtype(case))
        rows = []
        for variant in case.backends:
            if self.backends is not None and variant.name not in self.backends:
                continue
            measured = verdicts.get(variant.name) or timed(
                timings["", variant.name], extra.get(("", variant.name))
            )
            median = measured["median_us"]
            if measured["status"] == "failed" and variant.name not in verdicts:
                problems.append(f"{case.title}: {variant.name}: {measured['error']}")
            rows.append(
                {
                    "op": case.op,
                    "case": case.label,
                    "shape": case.shape,
                    "dtype": dtype_name(case.dtype),
                    "backend": variant.name,
                    "bytes": case.bytes,
                    "flops": case.flops,
                    "floor_us": floor,
                    "roofline_percent": 100 * floor / median if median else None,
                    "cold_cache": cold,
                    "peers": [
                        {**row, "ratio": row["median_us"] / median if median and row["median_us"] else None}
                        for row in peer_rows
                    ],
                    **({"detail": details[variant.name]} if variant.name in details else {}),
                    **measured,
                }
            )
        return rows, problems

    def _peers(self, case: Case, inputs: Any) -> list[tuple[str, Variant, dict | None]]:
        """(peer, variant, None if it may be timed else the row that says why not)."""
        expected = None
        found = []
        for module in self.peers:
            try:
                variants = module.variants(case, inputs)
            except Skipped as reason:
                self.say(f"  {module.NAME} skipped: {reason}")
                continue
            except Exception as error:
                self.say(f"  {module.NAME} failed: {_one_line(error)}")
                continue
            for variant in variants:
                try:
                    result = variant.prepare(inputs)()
                    if variant.outputs is not None and case.expected is not None:
                        expected = case.expected(inputs) if expected is None else expected
                        different = disagreement(variant.outputs(result), expected)
                        if different:
                            found.append((module.NAME, variant, blank("wrong", different[0])))
                            continue
                    del result
                except Exception as error:
                    found.append((module.NAME, variant, blank("failed", _one_line(error))))
                    continue
                found.append((module.NAME, variant, None))
        return found


def _matrix_dtype(case: Case) -> torch.dtype:
    return case.dtype if case.dtype.is_floating_point else torch.float32


def within(seconds: float | None) -> Callable[[], bool]:
    """A clock that says whether a budget, None for none, still has time."""
    end = None if seconds is None else time.monotonic() + seconds
    return lambda: end is None or time.monotonic() < end


def exit_status(refused: list[str], problems: list[str]) -> int:
    """2 for a request that cannot be served, 1 for what is wrong or failed, `INCOMPLETE`, or 0."""
    if refused or any("does not fit" in line for line in problems):
        return 2
    if any(NOT_REACHED not in line for line in problems):
        return 1
    return INCOMPLETE if problems else 0
