"""`python -m bench gpu`: everything that needs a GPU, part by part inside a time budget; `sanitize` beside it.

Parts run as processes of their own with a time limit each, so that one which hangs or crashes leaves the others
theirs. Time that a part leaves over goes to those after it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import INCOMPLETE, OPS

ROOT = Path(__file__).resolve().parent.parent
ALIASES = {"attention": "block_attention", "ops": OPS}
# Seconds that a part has at least where they are left: importing PyTorch alone takes a few.
LEAST = 20.0
NO_GPU = "no NVIDIA GPU that PyTorch can use is present; nothing was run"


@dataclass(frozen=True)
class Part:
    """A command, what it is called, the share of the time it may take, and environment variables of its own."""

    name: str
    command: tuple[str, ...]
    weight: float
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def result(self) -> str | None:
        """The name of its result file."""
        after = self.command[1:]
        return next((Path(file).name for name, file in zip(self.command, after) if name == "--json"), None)


@dataclass(frozen=True)
class Outcome:
    """How a part ended. status: "ok", "failed", "incomplete", "timeout" or "no time left"."""

    name: str
    status: str
    code: int | None
    seconds: float


def device_facts() -> dict | None:
    """{"name", "capability"} of the first GPU, None where PyTorch or a GPU is missing."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    return {"name": torch.cuda.get_device_name(0), "capability": torch.cuda.get_device_capability(0)}


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def side_by_side(cores: int | None = None, installed: bool | None = None) -> tuple[str, ...]:
    """pytest's options for tests in several processes, where pytest-xdist is installed.

    A test spends its time in the compiler (hundreds of variants of the Triton kernels), not on the GPU.
    """
    if installed is None:
        installed = _installed("xdist")
    workers = min(8, (os.cpu_count() or 1 if cores is None else cores) // 2)
    return ("-n", str(workers), "--dist", "worksteal") if installed and workers > 1 else ()


def with_limits(installed: bool | None = None) -> tuple[str, ...]:
    """pytest's options that end a test which hangs, where pytest-timeout is installed: its worker with it."""
    if installed is None:
        installed = _installed("pytest_timeout")
    return ("--timeout", "240", "--timeout-method", "thread") if installed else ()


def all_parts(capability: tuple[int, int], out: Path, python: str = sys.executable) -> list[Part]:
    """Every part in order. The results of op and step parts go to files under `out`."""
    major, minor = capability
    # Architecture-specific instructions (wgmma) are there only under the suffixed name.
    architecture = f"{major}{minor}" + ("a" if major == 9 else "")
    build = (python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", ".")
    pytest = (python, "-m", "pytest", "-m", "gpu", "-q", *with_limits())
    weights = {"block_attention": 2.0, "commit": 0.5, "feed_forward": 0.5, "linears": 0.3, "samplers": 0.5}
    parts = [
        # Without nvcc the host part is built and Triton's kernels are measured; doctor then says what is missing.
        Part("build", build, 3.5, (("DGEMMA_ACCEL_CUDA", "auto"), ("DGEMMA_ACCEL_CUDA_ARCHS", architecture))),
        Part("doctor", (python, "-m", "dgemma_accel", "doctor"), 0.2),
        # Without a limit PyTorch's compiler starts a process for each core in each of pytest's.
        Part(
            "test",
            (*pytest, *side_by_side()),
            5.0,
            (("TORCHINDUCTOR_COMPILE_THREADS", "2"),),
        ),
    ]

    for op in OPS:
        # A third of the usual time for samples: nine minutes are for all ops.
        arguments = ("--device", "cuda", "--seconds", "0.3", "--json", str(out / f"{op}.json"))
        parts.append(Part(op, (python, "-m", "bench", op, *arguments), weights.get(op, 1.0)))
    # A repeat takes eager ways, bound by the host at up to 0.1 s a step, through 17 steps. The share is for making the
    # weights, two compilations of about a minute and what is timed behind them.
    arguments = ("--model", "full", "--repeats", "2", "--json", str(out / "step-full.json"))
    parts.append(Part("step", (python, "-m", "bench", "step", *arguments), 8.0))
    return parts


def choose(parts: list[Part], names: list[str]) -> tuple[list[Part], list[str]]:
    """(the parts named, in their own order; one line for each unknown name). No names: all parts."""
    if not names:
        return parts, []
    known = {part.name for part in parts}
    wanted, problems = set(), []
    for name in names:
        found = ALIASES.get(name, name)
        found = {found} if isinstance(found, str) else set(found)
        if not found <= known:
            problems.append(
                f"unknown part {name!r}; known are {', '.join([*(part.name for part in parts), *ALIASES])}"
            )
            continue
        wanted |= found
    return [part for part in parts if part.name in wanted], problems


def with_budget(part: Part, seconds: float) -> tuple[str, ...]:
    """The command, told its time where it can end by itself and still write what it has."""
    if "bench" not in part.command:
        return part.command
    # The rest is for starting Python and the last case.
    return (*part.command, "--budget", f"{max(5.0, 0.8 * seconds):.0f}")


def run_process(
    command: tuple[str, ...], environment: Mapping[str, str], seconds: float, log: Path
) -> int | None:
    """Run, copying the output to the terminal and to a file; the exit status, None when the time was over."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    def copy_output() -> None:
        with log.open("w") as sink:
            for line in process.stdout:
                print(line, end="", flush=True)
                sink.write(line)
                sink.flush()

    # In a thread: the pipe stays open as long as anything that the process started holds it.
    reader = threading.Thread(target=copy_output, daemon=True)
    reader.start()
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        # Also where the user interrupts: it has a session of its own, which Ctrl-C does not reach.
        _end_group(process)
    reader.join(5)
    return code


def _end_group(process: subprocess.Popen) -> None:
    """End a process and what it started; what does not end, stuck in a driver say, is left behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)


def run_parts(
    parts: list[Part],
    seconds: float,
    out: Path,
    execute: Callable[..., int | None] = run_process,
    now: Callable[[], float] = time.monotonic,
    tell: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Run parts one after another, each within its share of what is left of `seconds`.

    tell: is given the outcomes so far after each part.
    """
    end = now() + seconds
    outcomes = []
    for position, part in enumerate(parts):
        left = end - now()
        share = left * part.weight / sum(other.weight for other in parts[position:])
        share = max(share, min(left, LEAST))
        if share < 1:
            outcomes.append(Outcome(part.name, "no time left", None, 0.0))
            continue
        print(f"\n== {part.name} (up to {share:.0f} s)", flush=True)
        begun = now()
        environment = os.environ | dict(part.environment)
        try:
            code = execute(with_budget(part, share), environment, share, out / f"{part.name}.log")
        except OSError as error:
            print(f"{part.name}: cannot be started: {error}")
            code = 127
        status = {None: "timeout", 0: "ok", INCOMPLETE: "incomplete"}.get(code, "failed")
        outcomes.append(Outcome(part.name, status, code, now() - begun))
        tell(outcomes)
    return outcomes


class Files:
    """What a run leaves in a folder: logs and result files of its parts, and nothing that was there before it.

    together: in one archive, into which the files of a part go when it has ended, for a place that takes only a few.
    """

    ARCHIVE = "results.zip"

    def __init__(self, out: Path, parts: list[Part], together: bool) -> None:
        self.out, self.together = out, together
        self.results = [part.result for part in parts if part.result]
        self.names = [*(f"{part.name}.log" for part in parts), *self.results]
        self.before = {name: self._written(name) for name in self.names}
        self.packed: dict[str, bytes] = {}

    def _written(self, name: str) -> int | None:
        path = self.out / name
        return path.stat().st_mtime_ns if path.is_file() else None

    def _fresh(self) -> list[str]:
        return [name for name in self.names if self._written(name) not in (None, self.before[name])]

    def gather(self) -> None:
        """Put what the parts have left so far into the archive, beside what it holds from earlier runs."""
        fresh = self._fresh() if self.together else []
        if not fresh:
            return
        self.packed |= {name: (self.out / name).read_bytes() for name in fresh}
        archive = self.out / self.ARCHIVE
        held: dict[str, bytes] = {}
        if archive.is_file():
            with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(archive) as old:
                held = {name: old.read(name) for name in old.namelist()}
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as new:
            for name, data in (held | self.packed).items():
                new.writestr(name, data)
        replace_file(archive, content.getvalue())
        for name in fresh:
            (self.out / name).unlink()
            self.before[name] = None

    def contents(self) -> list[tuple[Path, str]]:
        """(path, text) of each result file of this run."""
        texts = {name: data.decode(errors="replace") for name, data in self.packed.items()}
        texts |= {name: (self.out / name).read_text(errors="replace") for name in self._fresh()}
        return [(self.out / name, texts[name]) for name in self.results if name in texts]


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole: what is ended meanwhile leaves the one of before."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def summary_lines(outcomes: list[Outcome], files: Files) -> list[str]:
    """The parts with their outcome, then one line for each figure in the result files they left."""
    from . import schema, table
    from .cases import BenchError
    from .runner import NOT_REACHED

    lines = ["part  outcome"]
    for outcome in outcomes:
        code = f" (exit {outcome.code})" if outcome.code else ""
        lines.append(f"{outcome.name}: {outcome.status}{code}, {outcome.seconds:.0f} s")
    for path, text in files.contents():
        try:
            result = schema.parse(text, path)
        except BenchError as error:
            lines.append(str(error))
            continue
        lines += ["", *(line for line in result["problems"] if NOT_REACHED in line)]
        if result["kind"] == "step":
            for row in result["rows"]:
                if row["status"] == "ok":
                    line = (
                        f"step, context {row['context']}, {row['variant']}: {row['step_ms']:.2f} ms, "
                        f"{row['floor_multiple']:.2f}x the floor"
                    )
                    if row.get("canvas_ms") is not None:
                        line += f", a canvas {row['canvas_ms']:.2f} ms besides"
                    if row["launches"] is not None:
                        launches, syncs = (table.count(row[name]) for name in ("launches", "host_syncs"))
                        line += f", {launches} launches, {syncs} host syncs"
                    if row.get("head_peak_bytes") is not None:
                        line += f", {table.size(row['head_peak_bytes'])} for head to self-conditioning"
                    lines.append(line)
            continue
        for row in result["rows"]:
            title = f"{row['op']} {row['shape']} {row['dtype']} {row['case']}".rstrip()
            if row["status"] != "ok":
                lines.append(f"{title}, {row['backend']}: {row['status']}: {row['error']}")
                continue
            against = [
                f"{peer['ratio']:.2f}x {peer['peer']} ({peer['variant']})"
                for peer in row["peers"]
                if peer["ratio"]
            ]
            lines.append(
                f"{title}, {row['backend']}: {table.duration(row['median_us'])}, {row['roofline_percent']:.1f}% of the "
                f"roofline" + (f"; {', '.join(against)}" if against else "")
            )
    return lines


def output_folder(facts: dict) -> Path:
    """$OUT where it is set, else bench/results/<device>. The former gets few files: see `Files`."""
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"]).resolve()
    from .environment import folder_name

    return ROOT / "bench" / "results" / folder_name({"device": facts["name"], "device_type": "cuda"})


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description="Everything that needs a GPU.")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all parts together")
    parser.add_argument(
        "--parts", nargs="*", default=[], metavar="PART", help="build, doctor, test, an op, ops, step"
    )
    parser.add_argument("--list", action="store_true", help="print the parts and their commands, run nothing")
    return parser


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    if options.list:
        for part in all_parts((9, 0), Path("OUT")):
            assignments = [f"{name}={value}" for name, value in part.environment]
            print(f"{part.name}: {' '.join([*assignments, *with_budget(part, 60)])}")
        return 0
    facts = device_facts()
    if facts is None:
        print(f"bench gpu: {NO_GPU}", file=sys.stderr)
        return 2
    if options.minutes <= 0:
        print(f"bench gpu: --minutes: must be above 0, got {options.minutes:g}", file=sys.stderr)
        return 2
    out = output_folder(facts)
    out.mkdir(parents=True, exist_ok=True)
    parts, problems = choose(all_parts(facts["capability"], out), options.parts)
    for line in problems:
        print(f"bench gpu: {line}", file=sys.stderr)
    if parts and parts[0].name != "build" and not _installed("dgemma_accel.triton_kernels"):
        print("bench gpu: the package is not installed here, so it is built first")
        parts = [*choose(all_parts(facts["capability"], out), ["build"])[0], *parts]
    major, minor = facts["capability"]
    print(
        f"{facts['name']}, compute capability {major}.{minor}; {options.minutes:g} minutes; results in {out}"
    )
    files = Files(out, parts, together=bool(os.environ.get("OUT")))
    # After every part: what ends this process, too, leaves the summary of what had been done.
    outcomes = run_parts(
        parts, 60 * options.minutes, out, tell=lambda so_far: write_summary(so_far, files, facts)
    )
    print("\n== summary\n" + "\n".join(write_summary(outcomes, files, facts)))
    if problems:
        return 2
    return 0 if all(outcome.status == "ok" for outcome in outcomes) else 1


def write_summary(outcomes: list[Outcome], files: Files, facts: dict) -> list[str]:
    """Gather the files of the parts that have ended, write summary.md and summary.json; the summary's lines."""
    try:
        files.gather()
    except OSError as error:
        print(f"bench gpu: {files.ARCHIVE} cannot be written: {error}", file=sys.stderr)
    lines = summary_lines(outcomes, files)
    major, minor = facts["capability"]
    head = f"{facts['name']}, compute capability {major}.{minor}"
    items = [f"- {line}" if line else "" for line in lines]
    replace_file(files.out / "summary.md", ("\n".join([f"# {head}", "", *items]) + "\n").encode())
    record = {"device": head, "parts": [vars(outcome) for outcome in outcomes]}
    replace_file(files.out / "summary.json", (json.dumps(record, indent=1) + "\n").encode())
    return lines


# Tests that launch this package's CUDA kernels, and little else.
SANITIZED = (
    "native_cuda", "cuda_block_attention", "cuda_experts", "cuda_soft_embedding", "block_attention", "row_stats",
    "top_k_top_p", "commit",
)  # fmt: skip


def sanitize(arguments: list[str]) -> int:
    """The gpu tests of the CUDA kernels under compute-sanitizer, one tool after another; exit 2 without a GPU or it."""
    parser = argparse.ArgumentParser(prog="python -m bench sanitize", description=sanitize.__doc__)
    parser.add_argument("--tools", nargs="+", default=["memcheck", "racecheck", "initcheck", "synccheck"])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument(
        "--kernels",
        default="dgemma",
        help="only kernels with this in their names; '' for PyTorch's and Triton's too",
    )
    parser.add_argument("tests", nargs="*", default=[f"tests/test_{name}.py" for name in SANITIZED])
    options = parser.parse_args(arguments)
    facts = device_facts()
    if facts is None:
        print(f"bench sanitize: {NO_GPU}", file=sys.stderr)
        return 2
    checker = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if checker is None:
        print(
            "bench sanitize: compute-sanitizer (part of the CUDA toolkit) is not on the path", file=sys.stderr
        )
        return 2
    out = output_folder(facts)
    out.mkdir(parents=True, exist_ok=True)
    parts = sanitizer_parts(checker, options.tools, options.tests, options.kernels)
    outcomes = run_parts(parts, 60 * options.minutes, out)
    for outcome in outcomes:
        print(f"{outcome.name}: {outcome.status}, {outcome.seconds:.0f} s")
    return 0 if all(outcome.status == "ok" for outcome in outcomes) else 1


def sanitizer_parts(
    checker: str, tools: list[str], tests: list[str], kernels: str = "", python: str = sys.executable
) -> list[Part]:
    # PyTorch's caching allocator would hide an access past the end of a tensor inside its larger blocks.
    environment = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    only = ("--kernel-name", f"kernel_substring={kernels}") if kernels else ()
    pytest = (python, "-m", "pytest", "-m", "gpu and not capture", "-q", "-p", "no:cacheprovider", *tests)

    def command(tool: str) -> tuple[str, ...]:
        # PyTorch probes the device by calls that may fail.
        quiet = ("--report-api-errors", "no") if tool == "memcheck" else ()
        return (
            checker, "--tool", tool, *quiet, *only, "--error-exitcode", "1", "--target-processes", "all", *pytest,
        )  # fmt: skip

    return [Part(tool, command(tool), 1.0, environment) for tool in tools]
