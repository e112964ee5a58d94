"""Print the script that completes `pixloom` in a shell.

eval "$(pixloom completion bash)"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import shtab

from pipeline import cli
from pipeline.__main__ import VERBS, module


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.parser("pipeline.completion", 'Put `eval "$(pixloom completion bash)"` into ~/.bashrc.')
    p.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="the shell that will read the script")
    return p


def commands() -> argparse.ArgumentParser:
    """The parser of all verbs with all their options."""
    whole = argparse.ArgumentParser("pixloom")
    verbs = whole.add_subparsers()
    for verb, line in VERBS.items():
        verbs.add_parser(verb, help=line, parents=[module(verb).parser()], add_help=False)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    options = parser().parse_args(arguments)
    sys.stdout.write(shtab.complete(commands(), options.shell))
    return 0


if __name__ == "__main__":
    sys.exit(main())
