"""`python -m bench`: the command line. `--help` lists the commands."""

from __future__ import annotations

import importlib
import sys

from . import COMMANDS


def main(arguments: list[str]) -> int:
    """Exit status: 0, 1 for a wrong kernel or a failed part, 2 for what cannot be served, 3 for a budget too short."""
    if arguments and arguments[0] in COMMANDS:
        name, _ = COMMANDS[arguments[0]]
        module = importlib.import_module(f"bench.{name}")
        run = getattr(module, "sanitize" if arguments[0] == "sanitize" else "main")
        return run(arguments[1:])
    from .bench_ops import main as bench_ops

    return bench_ops(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
