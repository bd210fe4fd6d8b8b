"""`python -m dgemma_accel doctor | generate`."""

from __future__ import annotations

import argparse
import sys

from .cli import doctor, generate
from .version import __version__


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dgemma_accel", description="Kernels for diffusion language models."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor.add_parser(commands)
    generate.add_parser(commands)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
