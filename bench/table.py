"""Results as text: the lines a run prints while it goes."""

from __future__ import annotations


def duration(microseconds: float | None) -> str:
    if microseconds is None:
        return "-"
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} us"


def size(count: float | None) -> str:
    if count is None:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def count(number: float | None) -> str:
    """A mean number of events: whole where it is large."""
    if number is None:
        return "-"
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def rate(per_second: float, unit: str) -> str:
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if per_second >= scale:
            return f"{per_second / scale:.3g} {prefix}{unit}"
    return f"{per_second / 1e6:.3g} M{unit}"


def columns(rows: list[list[str]], indent: str = "  ") -> list[str]:
    """Rows of cells, the first column flush left and the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines


HEADINGS = ["", "median", "p20", "p80", "roofline", "extra memory", "against"]


def case_lines(rows: list[dict]) -> list[str]:
    """The rows of one case: its title and floor, then every backend, then every peer with its ratio to the fastest."""
    first = rows[0]
    lines = [
        f"{first['op']} {first['shape']} {first['dtype']} {first['case']}".rstrip(),
        f"  {size(first['bytes'])}, {first['flops'] / 1e9:.3g} GFLOP: floor {duration(first['floor_us'])}"
        + ("" if first["cold_cache"] else " (inputs stay in the cache)"),
    ]
    cells, errors = [HEADINGS], []
    for row in rows:
        if row["status"] != "ok":
            errors.append(f"  {row['backend']} {row['status']}: {row['error']}")
            continue
        cells.append(
            [
                row["backend"],
                duration(row["median_us"]),
                duration(row["p20_us"]),
                duration(row["p80_us"]),
                f"{row['roofline_percent']:.1f}%",
                size(row["peak_extra_bytes"]),
                "",
            ]
        )
    right = [row for row in rows if row["status"] == "ok"]
    best = min(right, key=lambda row: row["median_us"]) if right else None
    for index, peer in enumerate(first["peers"]):
        name = f"{peer['peer']}: {peer['variant']}"
        if peer["status"] != "ok":
            errors.append(f"  {name} {peer['status']}: {peer['error']}")
            continue
        ratio = best["peers"][index]["ratio"] if best else None
        cells.append(
            [
                name,
                duration(peer["median_us"]),
                duration(peer["p20_us"]),
                duration(peer["p80_us"]),
                "",
                size(peer["peak_extra_bytes"]),
                f"{ratio:.3g}x {best['backend']}" if ratio else "",
            ]
        )
    return lines + columns(cells) + errors
