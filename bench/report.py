"""`python -m bench report`: the README's performance table and the plots, from the result files and nothing else."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from . import OPS, step_table, table
from .cases import BenchError
from .measured import device, disturbance, fastest, find_results, full_runs, newest_cases, newest_steps

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NOT_MEASURED = "not yet measured"
# One case of each shape stands in the README; all of them stand in bench/results/README.md.
HEADLINE = {
    "row_stats": ("half settled",),
    "top_k_top_p": ("top-p 0.95, T = 0.2", "top-p 0.95"),
    "head_stats": ("half settled",),
    "soft_embedding": ("half settled",),
    "commit": ("entropy bound, renoise",),
    "experts": ("uniform routing",),
    "feed_forward": ("bf16 experts",),
    "linears": ("sliding layer", "global layer", "sliding layer, FP8 weights"),
    "block_attention": ("",),
    "samplers": (
        "LLaDA low_confidence",
        "Fast-dLLM threshold",
        "Dream entropy",
        "Dream entropy, T = 0.2, top-p 0.95",
    ),
}


def mark(facts: dict) -> str:
    """Commit and date of a figure."""
    commit = (facts["commit"] or "?")[:10]
    return f"{commit}{'' if facts['clean'] else '+'} {facts['date'][:10]}"


def _against(row: dict) -> str:
    """The chain of the reference pipeline and the fastest other peer, each with its ratio."""
    timed = [peer for peer in row["peers"] if peer["ratio"]]
    if not timed:
        return ""
    chain = [
        peer for peer in timed if "transformers" in peer["variant"] or peer["variant"].startswith("cat, ")
    ]
    chosen = [min(chain, key=lambda peer: peer["ratio"])] if chain else []
    others = [peer for peer in timed if peer not in chosen]
    if others:
        chosen.append(min(others, key=lambda peer: peer["ratio"]))
    return "; ".join(f"{peer['ratio']:.3g}x {peer['peer']} ({peer['variant']})" for peer in chosen)


def op_table(results: list[dict], headline: bool, whole: bool = True) -> list[str]:
    """Markdown: a row for the fastest right backend of every case.

    whole: ops without a GPU result say so.
    """
    lines = [
        "| Op | Case | Device | Backend | Time | Roofline | Extra memory | Time of peers over ours | Commit, date |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    cases = newest_cases(results)
    for op in OPS:
        on_gpu = False
        for (name, of, shape, dtype, label), rows in sorted(cases.items(), key=lambda item: item[0][0]):
            if of != op or (headline and label not in HEADLINE[op]):
                continue
            on_gpu |= rows[0][1]["device_type"] == "cuda"
            title = f"{shape} {dtype} {label}".rstrip()
            best = fastest(rows)
            if best is None:
                lines.append(
                    f"| {op} | {title} | {name} | - | {rows[0][0]['status']} | | | | {mark(rows[0][1])} |"
                )
                continue
            row, facts = best
            lines.append(
                f"| {op} | {title} | {name} | {row['backend']} | {table.duration(row['median_us'])} | "
                f"{row['roofline_percent']:.1f}% | {table.size(row['peak_extra_bytes'])} | {_against(row)} | "
                f"{mark(facts)} |"
            )
        if whole and not on_gpu:
            lines.append(f"| {op} | | NVIDIA GPU | | {NOT_MEASURED} | | | | |")
    return lines


def steps_table(results: list[dict], whole: bool = True) -> list[str]:
    """Markdown: the newest row for every variant and context; a full model without one says so where it is `whole`."""
    lines = [
        "| Model | Context | Variant | Device | Step | Times the floor | A canvas besides | "
        f"Tokens/s at {step_table.TOKENS_PER_STEP[0]} a step | Launches | Host syncs | Commit, date |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    full = False
    for (name, model, *_), (row, facts) in newest_steps(results).items():
        full |= model.split()[0] == "full" and facts["device_type"] == "cuda"
        head = f"| {model} | {row['context']} | {row['variant']} | {name} |"
        if row["status"] != "ok":
            lines.append(f"{head} {row['status']} | | | | | | {mark(facts)} |")
            continue
        tokens = step_table.rate(row, step_table.TOKENS_PER_STEP[0])
        lines.append(
            f"{head} {table.duration(row['step_ms'] * 1e3)} | {row['floor_multiple']:.3g} | "
            f"{step_table.besides(row)} | {'-' if tokens is None else f'{tokens:,.0f}'} | "
            f"{table.count(row['launches'])} | {table.count(row['host_syncs'])} | {mark(facts)} |"
        )
    if whole and not full:
        lines.append(f"| full (26B-A4B) | | | NVIDIA GPU | {NOT_MEASURED} | | | | | | |")
    return lines


def busy_lines(results: list[dict]) -> list[str]:
    """One line for each CPU result that was taken while other programs wanted the cores."""
    lines = []
    for result in results:
        facts = result["environment"]
        loads = [clock["load"] for clock in result["clocks"].values() if clock and "load" in clock]
        if facts["device_type"] == "cpu" and loads and max(loads) > 1.5 * facts.get("threads", 1):
            shown = " to ".join(f"{load:.1f}" for load in loads)
            what = f"The {result['kind']} figures of {device(facts)} ({mark(facts)})"
            lines.append(f"{what} were taken on a busy machine, load average {shown}.")
    return lines


def every_case(results: list[dict]) -> str:
    """What stands in bench/results/README.md: all cases, and behind them the results that are bounds only."""
    lines = ["# Every measured case", "", *op_table(full_runs(results), headline=False)]
    bounds = [(disturbance(result), result) for result in results if not result["options"].get("quick")]
    bounds = [(reason, result) for reason, result in bounds if reason]
    if bounds:
        lines += [
            "",
            "# Bounds",
            "",
            "These count nowhere else: not in the README, not in a plot, not for `auto`.",
        ]
    for reason, result in bounds:
        of_ops = result["kind"] == "ops"
        rows = op_table([result], False, whole=False) if of_ops else steps_table([result], whole=False)
        lines += ["", reason, "", *rows]
    return "\n".join([*lines, ""])


def readme_section(results: list[dict], plots: list[Path], root: Path) -> str:
    results = full_runs(results)
    parts = [
        "Generated by `make report` from the files in `bench/results/`. A `+` marks a changed tree.",
        "\n".join(op_table(results, headline=True)),
        "\n".join(steps_table(results)),
    ]
    parts += ["\n".join(busy_lines(results))] if busy_lines(results) else []
    if plots:
        links = ((path.stem, Path(os.path.relpath(path, root)).as_posix()) for path in plots)
        parts.append("\n".join(f"![{name}]({link})" for name, link in links))
    return "\n\n".join(parts)


def replace_section(text: str, section: str) -> str:
    """The README with what stands between the markers replaced.

    Raises:
        BenchError: a marker is missing, doubled or in the wrong order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise BenchError(f"the README needs one line {BEGIN} and after it one line {END}")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{section}\n{END}{tail}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the README is not up to date"
    )
    options = parser.parse_args(arguments)
    try:
        found, problems = find_results(options.results)
        results = [result for _, result in found]
        for line in problems:
            print(f"bench report: {line}", file=sys.stderr)
        text = options.readme.read_text()
        drawn = [] if options.check else draw(results, options.results)
        plots = sorted((options.results / "plots").resolve().glob("*.svg")) if options.check else drawn
        new = replace_section(text, readme_section(results, plots, options.readme.resolve().parent))
    except OSError as error:
        print(f"bench report: {options.readme}: {error.strerror}", file=sys.stderr)
        return 2
    except BenchError as error:
        print(f"bench report: {error}", file=sys.stderr)
        return 2
    if options.check:
        if new != text:
            print(f"{options.readme} is not what `make report` writes", file=sys.stderr)
        return 2 if problems else int(new != text)
    options.readme.write_text(new)
    print(f"written {options.readme}")
    everything = options.results / "README.md"
    everything.parent.mkdir(parents=True, exist_ok=True)
    everything.write_text(every_case(results))
    print(f"written {everything}")
    return 2 if problems else 0


def draw(results: list[dict], folder: Path) -> list[Path]:
    """The plots of all results, fresh; none where matplotlib is missing."""
    try:
        from . import plots

        latest = full_runs(results)
        drawn = plots.ops(latest, folder / "plots") + plots.steps(latest, folder / "plots")
    except ImportError as error:
        print(f"bench report: no plots: {error}", file=sys.stderr)
        return []
    for old in (folder / "plots").glob("*.svg"):
        if old not in drawn:
            old.unlink()
    return sorted(path.resolve() for path in drawn)
