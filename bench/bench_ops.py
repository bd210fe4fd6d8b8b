"""`python -m bench [OP ...]`: every case of the ops, checked, timed beside its peers, printed and written."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from . import COMMANDS, OPS, ceilings, environment, peers, schema, table
from .cases import BenchError, Case, Sizes
from .runner import NOT_REACHED, DeviceLost, Runner, exit_status, within

ALIASES = {"attention": "block_attention"}


def parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  python -m bench {name:10}{what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"Time ops beside their peers. OP: {', '.join(OPS[:5])},\n{', '.join(OPS[5:])}; default all.",
        epilog=f"other commands, each with a --help of its own:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ops", nargs="*", metavar="OP")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, fewer samples")
    parser.add_argument(
        "--note", metavar="TEXT", help="what disturbed the run: its figures then count as bounds only"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result file here")
    parser.add_argument("--save", action="store_true", help="write it to bench/results/<device>/ops.json")
    parser.add_argument(
        "--plot", type=Path, metavar="DIR", help="write the roofline and settled-rows plots here"
    )
    parser.add_argument("--peer", action="append", metavar="NAME", help="only these peers; 'none' for none")
    parser.add_argument("--backend", action="append", metavar="NAME", help="only these backends")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="start no further case after this time"
    )
    parser.add_argument(
        "--seconds", type=float, help="time for the samples of one variant (1; 0.2 with --quick)"
    )
    parser.add_argument("--rows", type=int, help="rows of a table instead of 256")
    parser.add_argument("--vocab", type=int, help="vocabulary instead of 262144")
    parser.add_argument("--batch", type=int, help="canvases, for block_attention and commit")
    parser.add_argument("--context", type=int, nargs="+", metavar="N", help="prefix lengths at head_dim 512")
    return parser


def pick_device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda: there is no NVIDIA GPU that PyTorch can use here")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def complain(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


def collect(names: list[str], device: torch.device, sizes: Sizes) -> tuple[list[Case], list[str]]:
    """(cases of the ops named, one line for each name that is unknown or asks for what cannot be)."""
    cases: list[Case] = []
    problems = []
    for name in names or OPS:
        op = ALIASES.get(name, name)
        if op not in OPS:
            problems.append(f"unknown op {name!r}; known are {', '.join(OPS)}")
            continue
        module_name = f"{__package__}.bench_{op}"
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name != module_name:
                raise
            print(f"{op}: no cases yet")
            continue
        try:
            found, lines = module.cases(device, sizes)
        except BenchError as error:
            problems.append(f"{op}: {error}")
            continue
        for line in lines:
            print(line)
        cases += found
    return cases, problems


def check_sizes(options: argparse.Namespace) -> list[str]:
    """Sizes below 1 and a time of 0 or less, each as one line; such an option is then ignored."""
    problems = []
    for name in ("rows", "vocab", "batch", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            problems.append(f"--{name}: must be at least 1, got {value}")
            setattr(options, name, None)
    if options.seconds is not None and not 0 < options.seconds < float("inf"):
        problems.append(f"--seconds: must be a time above 0, got {options.seconds:g}")
        options.seconds = None
    return problems


def main(arguments: list[str]) -> int:
    options = parser().parse_intermixed_args(arguments)
    has_time = within(options.budget)
    try:
        device = pick_device(options.device)
        schema.check_targets(options.json, options.plot)
    except BenchError as error:
        complain(str(error))
        return 2
    refused = check_sizes(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = Sizes(
        options.rows,
        options.vocab,
        options.batch,
        tuple(options.context) if options.context else None,
        options.quick,
    )
    wanted_peers = None if options.peer is None else [name for name in options.peer if name != "none"]
    modules, unknown = peers.load(wanted_peers)
    refused += unknown
    from dgemma_accel.backends import BACKENDS

    for name in options.backend or ():
        if name not in BACKENDS:
            refused.append(f"unknown backend {name!r}; known are {', '.join(BACKENDS)}")
    cases, problems = collect(options.ops, device, sizes)
    refused += problems
    if options.backend:
        there = sorted({variant.name for case in cases for variant in case.backends})
        if cases and not set(there) & set(options.backend):
            refused.append(
                f"--backend {', '.join(options.backend)}: what can be timed here is {', '.join(there)}"
            )
            cases = []
    for line in refused:
        complain(line)
    if not cases:
        return 2 if refused else 0

    facts = environment.describe(device)
    clocks_before = environment.clocks(device)
    print(f"{facts['device']} ({facts['capability']}), torch {facts['torch']}, triton {facts['triton']}")
    present = []
    for module in modules:
        reason = module.unavailable(device)
        if reason is None and options.quick and not options.peer and getattr(module, "SLOW_START", False):
            reason = "it compiles first, which a quick run leaves out"
        if reason is None:
            present.append(module)
        else:
            print(f"peer {module.NAME} skipped: {reason}")
    limits = ceilings.measure(device, options.quick)
    print(f"measured copy bandwidth {table.rate(limits.bandwidth, 'B/s')}")

    rows: list[dict] = []
    failures: list[str] = []
    result = {
        "schema": schema.SCHEMA,
        "kind": "ops",
        "environment": facts,
        "clocks": {"before": clocks_before, "after": None},
        "options": {"quick": options.quick, "ops": options.ops, "threads": torch.get_num_threads()},
        "rows": rows,
        **({"note": options.note} if options.note else {}),
    }
    for found, lines in run_cases(cases, device, limits, present, options, has_time):
        rows += found
        failures += lines
        result |= {"ceilings": limits.as_dict(), "problems": refused + failures}
        # What is there is there, should the time end or the device be lost.
        for path in targets(result, options):
            schema.write(result, path)
    for name, value in limits.flops.items():
        print(f"measured {name} matrix ceiling {table.rate(value, 'FLOP/s')}")
    result["clocks"]["after"] = environment.clocks(device)
    write_result(result, options)
    for line in failures:
        complain(line)
    return exit_status(refused, failures)


def progress(cases: list[Case]) -> tuple[Iterable[Case], Callable[[str], None]]:
    """(the cases, under a progress bar on a terminal that has tqdm; what prints a line beside it)."""

    def plain(line: str) -> None:
        print(line, flush=True)

    if not sys.stderr.isatty():
        return cases, plain
    try:
        from tqdm import tqdm
    except ImportError:
        return cases, plain
    # Through tqdm, or the bar and the table would write over each other.
    return tqdm(cases, unit="case", leave=False), lambda line: tqdm.write(line, file=sys.stdout)


def run_cases(
    cases, device, limits, present, options, has_time: Callable[[], bool]
) -> Iterator[tuple[list[dict], list[str]]]:
    """(rows, problems) of one case after the other, printed as they come."""
    bar, say = progress(cases)

    runner = Runner(
        device,
        limits,
        present,
        backends=set(options.backend) if options.backend else None,
        quick=options.quick,
        seconds=options.seconds,
        say=say,
    )
    lost = None
    for case in bar:
        if lost or not has_time():
            yield [], [f"{case.title}: {lost or f'{NOT_REACHED} of {options.budget:g} s'}"]
            continue
        if hasattr(bar, "set_description"):
            bar.set_description(case.title[:60])
        try:
            found, lines = runner.run(case)
        except DeviceLost as error:
            found, lines, lost = error.rows, error.problems, f"not reached: {error}"
        if found:
            say("")
            for line in table.case_lines(found):
                say(line)
        elif lines:
            say(lines[0])
        yield found, lines


def targets(result: dict, options: argparse.Namespace) -> list[Path]:
    """The result files that were asked for."""
    files = [options.json] if options.json else []
    if options.save:
        folder = environment.folder_name(result["environment"])
        files.append(environment.ROOT / "bench" / "results" / folder / "ops.json")
    return files


def write_result(result: dict, options: argparse.Namespace) -> None:
    for path in targets(result, options):
        schema.write(result, path)
        print(f"written {path}")
    if options.plot:
        from . import plots

        for path in plots.ops([result], options.plot) + plots.settled([result], options.plot):
            print(f"written {path}")
