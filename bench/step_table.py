"""What the step bench prints: the table of a context and the ratios within it."""

from __future__ import annotations

from . import step_trace, table
from .step_ways import AUTOREGRESSIVE, COMPILED_REFERENCE, REFERENCE, WAYS

# What published figures assume one step to write: 256 tokens in 16 steps, and the mean of natural text.
TOKENS_PER_STEP = (16, 19.7)


def step_lines(rows: list[dict]) -> list[str]:
    """The table of one context."""
    cells = [
        [
            "",
            "step",
            "floor",
            "multiple",
            "canvas",
            "launches",
            "host syncs",
            "extra memory",
            *step_trace.COMPONENTS,
        ]
    ]
    errors = []
    for row in rows:
        if row.get("error"):
            errors.append(f"  {row['variant']} failed: {row['error']}")
        if row["status"] != "ok":
            continue
        split = row["components_ms"] or {}
        cells.append(
            [
                row["variant"],
                table.duration(row["step_ms"] * 1e3),
                table.duration(row["floor_ms"] * 1e3),
                f"{row['floor_multiple']:.3g}x",
                besides(row),
                table.count(row["launches"]),
                table.count(row["host_syncs"]),
                table.size(row["peak_extra_bytes"]),
                *(
                    table.duration(split[name] * 1e3) if name in split else "-"
                    for name in step_trace.COMPONENTS
                ),
            ]
        )
    lines = table.columns(cells) + errors
    for line in speedups(rows):
        lines.append(f"  {line}")
    for row in rows:
        if row.get("head_peak_bytes") is not None:
            what = "head, sampler and self-conditioning together hold at most"
            lines.append(
                f"  {row['variant']}: {what} {table.size(row['head_peak_bytes'])} beyond weights and cache"
            )
        lines += kernel_lines(row)
    return lines


def kernel_lines(row: dict, shown: int = 12) -> list[str]:
    """Where a step's time on the device goes, by kernel: those that run side by side count in full each."""
    kernels = row.get("kernels")
    if not kernels:
        return []
    head = f"  {row['variant']}, kernels of a step"
    if row.get("canvas_launches") is not None:
        head += f"; a canvas besides its steps is {row['canvas_launches']:.0f} launches by the host"
    cells = [
        [f"    {name[:90]}", f"{times:.0f}x", table.duration(spent)] for name, times, spent in kernels[:shown]
    ]
    return [f"{head}:", *table.columns(cells)]


def besides(row: dict) -> str:
    """What a canvas takes besides its steps, to print."""
    spent = row.get("canvas_ms")
    return "-" if spent is None else table.duration(spent * 1e3)


def per_token(row: dict, tokens: float) -> float:
    """Milliseconds that a row of the batch takes for a token, at so many a step; with what a canvas takes besides its
    steps where that was measured."""
    besides = 0.0 if row.get("canvas_ms") is None else row["canvas_ms"] / row["canvas"]
    # A difference of measured times may come out below nothing.
    return row["step_ms"] / tokens + max(0.0, besides)


def rate(row: dict, tokens: float) -> float | None:
    """Tokens a second of the whole batch, canvases included; None where what they take was not measured."""
    each = per_token(row, tokens)
    return None if row.get("canvas_ms") is None or each <= 0 else row["batch"] * 1e3 / each


def speedups(rows: list[dict]) -> list[str]:
    """Ratios within one context: our steps against transformers', and every way against decoding token by token at a
    stated number of tokens a step, what a canvas takes besides included where it was measured."""
    good = {row["variant"]: row for row in rows if row["status"] == "ok"}
    lines = []
    for ours in (way for way in WAYS if way.ours and way.name in good):
        for theirs in (REFERENCE, COMPILED_REFERENCE):
            if theirs.name in good:
                mine, other = good[ours.name], good[theirs.name]
                line = (
                    f"{ours.name} against {theirs.name}: {other['step_ms'] / mine['step_ms']:.2f}x the speed"
                )
                if mine.get("launches") and other.get("launches"):
                    line += f", {other['launches'] / mine['launches']:.1f}x fewer launches"
                lines.append(line)
    for way in WAYS:
        rates = [rate(good[way.name], tokens) for tokens in TOKENS_PER_STEP] if way.name in good else [None]
        if None not in rates:
            each = zip(rates, TOKENS_PER_STEP)
            shown = ", ".join(f"{found:,.0f} tokens/s at {tokens:g} tokens a step" for found, tokens in each)
            lines.append(f"{way.name}, canvases included: {shown}")
    decoding = [good[way.name] for way in AUTOREGRESSIVE if way.name in good]
    if not decoding:
        return lines
    best = min(decoding, key=lambda row: row["step_ms"])
    for way in WAYS:
        if way.name in good:
            row = good[way.name]
            ratios = ", ".join(
                f"{best['step_ms'] / per_token(row, tokens):.2f}x at {tokens:g} tokens a step"
                for tokens in TOKENS_PER_STEP
            )
            lines.append(f"{way.name} against {best['variant']}: {ratios}")
    return lines


def window_line(model, context: int, rows: list[dict]) -> list[str]:
    window = model.config.text_config.sliding_window
    if context < window - 1 or COMPILED_REFERENCE.name not in {row["variant"] for row in rows}:
        return []
    return [
        f"  {COMPILED_REFERENCE.name}: its tokens are wrong from the sliding window of {window} on; a time only"
    ]
