"""Plots of result files: percent of the roofline by op, and the time of a step by context as stacked bars."""

from __future__ import annotations

from pathlib import Path

from .environment import folder_name
from .measured import fastest, newest_cases, newest_steps
from .schema import COMPONENTS

PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999")
COLORS = dict(zip((*COMPONENTS, "whole step"), PALETTE))


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    # The same results give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "dgemma-accel"
    import matplotlib.pyplot as pyplot

    return pyplot


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    return path


def origin(*sources: dict) -> str:
    """The device and every commit that the figures come from, as all plots are labelled."""
    commits = {
        (facts["commit"] or "unknown commit")[:10] + ("" if facts["clean"] else ", changed tree"): None
        for facts in sorted(sources, key=lambda facts: facts["date"])
    }
    return f"{sources[0]['device']}, {'; '.join(commits)}"


def ops(results: list[dict], folder: Path) -> list[Path]:
    """One plot a device: the fastest right backend of every case against the roofline."""
    pyplot = _pyplot()
    written = []
    by_device: dict[str, dict[str, tuple[dict, dict]]] = {}
    for (_, *key), rows in newest_cases(results).items():
        best = fastest(rows)
        if best is not None:
            label = " ".join(part for part in key if part) + f" ({best[0]['backend']})"
            by_device.setdefault(folder_name(best[1]), {})[label] = best
    for device, best in sorted(by_device.items()):
        figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.28 * len(best)))
        reached = [row["roofline_percent"] for row, _ in best.values()]
        bars = axes.barh(range(len(best)), reached, color=PALETTE[0])
        axes.bar_label(bars, fmt="%.1f%%", padding=2, fontsize=7)
        axes.set_yticks(range(len(best)), best, fontsize=7)
        axes.invert_yaxis()
        # A copy is not the fastest way to read: what only reads may pass its bandwidth.
        axes.set_xlim(0, max(105, 1.08 * max(reached)))
        axes.set_xlabel("percent of the measured roofline")
        axes.set_title(origin(*(facts for _, facts in best.values())), fontsize=9)
        written.append(_save(figure, folder / f"roofline-{device}.svg"))
        pyplot.close(figure)
    return written


def settled(results: list[dict], folder: Path) -> list[Path]:
    """One plot a device: time and error of soft_embedding against the fraction of settled rows, a line a tolerance.

    The backend is the fastest at the first case; results without such rows give no plot.
    """
    written = []
    for result in results:
        rows = [row for row in result["rows"] if "settled" in row.get("detail", {}) and row["status"] == "ok"]
        if result["kind"] != "ops" or len({row["detail"]["settled"] for row in rows}) < 2:
            continue
        pyplot = _pyplot()
        first = [row for row in rows if row["case"] == rows[0]["case"]]
        backend = min(first, key=lambda row: row["median_us"])["backend"]
        figure, (times, errors) = pyplot.subplots(1, 2, figsize=(9, 3.2))
        tolerances = sorted({row["detail"]["tolerance"] for row in rows})
        for color, tolerance in zip(PALETTE, tolerances):
            line = [r for r in rows if r["backend"] == backend and r["detail"]["tolerance"] == tolerance]
            line.sort(key=lambda row: row["detail"]["settled"])
            share = [100 * row["detail"]["settled"] for row in line]
            times.plot(
                share, [row["median_us"] for row in line], "o-", color=color, label=f"tolerance {tolerance:g}"
            )
            errors.plot(share, [row["detail"]["relative_error"] for row in line], "o-", color=color)
        times.set_ylim(bottom=0)
        times.set_ylabel("microseconds")
        times.legend(fontsize=7)
        errors.set_yscale("log")
        errors.set_ylabel("largest error / largest element")
        for axes in (times, errors):
            axes.set_xlabel("percent of rows settled")
        figure.suptitle(
            f"soft_embedding ({backend}) {rows[0]['shape']}: {origin(result['environment'])}", fontsize=9
        )
        written.append(
            _save(figure, folder / f"soft_embedding-settled-{folder_name(result['environment'])}.svg")
        )
        pyplot.close(figure)
    return written


def steps(results: list[dict], folder: Path) -> list[Path]:
    """One plot a device and model: a group of bars a context, a bar a variant, its components stacked."""
    pyplot = _pyplot()
    written = []
    by_model: dict[tuple[str, str], list[tuple[dict, dict]]] = {}
    for (_, model, *_), (row, facts) in newest_steps(results).items():
        if row["status"] == "ok" and not row["variant"].startswith("autoregressive"):
            by_model.setdefault((model, folder_name(facts)), []).append((row, facts))
    for (model, device), measured in by_model.items():
        rows = [row for row, _ in measured]
        figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.4 * len(rows)))
        for position, row in enumerate(rows):
            start, split = 0.0, row["components_ms"]
            if split and sum(split.values()) > 0:
                # The split comes from a run with marks in it; its shares are laid over the time without them.
                scale = row["step_ms"] / sum(split.values())
                pieces = [(name, split[name] * scale) for name in COMPONENTS]
            else:
                pieces = [("whole step", row["step_ms"])]
            for name, width in pieces:
                axes.barh(position, width, left=start, color=COLORS[name])
                start += width
            axes.plot([row["floor_ms"]] * 2, [position - 0.4, position + 0.4], color="black", linewidth=1)
        axes.set_yticks(range(len(rows)), [f"{row['context']}: {row['variant']}" for row in rows], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds a step (black: floor)")
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
        axes.legend(handles, COLORS, fontsize=7)
        axes.set_title(f"{model}: {origin(*(facts for _, facts in measured))}", fontsize=9)
        written.append(_save(figure, folder / f"step-{model.split()[0]}-{device}.svg"))
        pyplot.close(figure)
    return written
