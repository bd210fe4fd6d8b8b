"""`python -m bench`: the command line.

python -m bench [OP ...]     time ops beside their peers
python -m bench step         time a whole denoising step
python -m bench report       write the README's table and the plots from result files
python -m bench tune OP      search tile shapes for this GPU
python -m bench auto         let result files decide which kernel `auto` takes
python -m bench gpu          all that needs a GPU, inside a time budget
python -m bench sanitize     the gpu tests under compute-sanitizer
"""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "step": "bench_step",
    "report": "report",
    "tune": "tune",
    "auto": "auto",
    "gpu": "gpu",
    "sanitize": "gpu",
}


def main(arguments: list[str]) -> int:
    """Exit status: 0, 1 for a wrong kernel or a failed part, 2 for what cannot be served, 3 for a budget too short."""
    if arguments and arguments[0] in COMMANDS:
        module = importlib.import_module(f"bench.{COMMANDS[arguments[0]]}")
        run = getattr(module, "sanitize" if arguments[0] == "sanitize" else "main")
        return run(arguments[1:])
    from .bench_ops import main as bench_ops

    return bench_ops(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
