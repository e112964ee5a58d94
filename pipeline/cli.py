"""What the commands share: argument types, log lines, signals and exit codes, without Ray and torch."""

from __future__ import annotations

import argparse
import logging
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from stages.config.locations import given, writable
from stages.errors import PixloomError, StageError, UserError, without_password

logger = logging.getLogger(__name__)

EXIT_CODES = """\
exit codes:
  0    everything that was asked for is done
  1    a stage failed; what was done is kept
  2    the command, the config, the data or a store must be seen to: one line names the file and key, or the
       object; what was done is kept
  130  stopped by Ctrl-C or SIGTERM; what was done is kept, and the same command continues
"""


def parser(module: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A command's parser, without its arguments. Help texts keep their line breaks."""
    program = f"python -m {module}"
    if Path(sys.argv[0]).stem == "pixloom":
        program, epilog = (
            re.sub(r"(?<!-- )python -m pipeline\.?", "pixloom ", text) for text in (program, epilog)
        )
    return argparse.ArgumentParser(
        prog=program.strip(),
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_settings(p: argparse.ArgumentParser, text: str = "change one setting, e.g. train.seed=7") -> None:
    """Add `--set KEY=VALUE`, which may be repeated."""
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)


def add_config(p: argparse.ArgumentParser, located: Callable[[str], str]) -> None:
    """Add `-c FILE`, `--profile` and `--set`. located: `pipeline.config.located`, which finds the file."""
    p.add_argument(
        "-c",
        "--config",
        default="pipeline.yaml",
        type=located,
        metavar="FILE",
        help="a file, or the name of a recipe (default: pipeline.yaml)",
    )
    p.add_argument(
        "--profile", metavar="NAME", help="one of the config's profiles (recipes have cpu and paper)"
    )
    add_settings(p)


def count(text: str, *, least: int = 1) -> int:
    """The argument type of a number of things."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def location(text: str, *, check: Callable[[str], str] = given) -> str:
    """The argument type of a location."""
    try:
        return check(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


output = partial(location, check=writable)
"""The argument type of a location that is written to."""


def size(text: str, *, least: int = 1, most: int = 99_999) -> tuple[int, int]:
    """The argument type of `WxH`: width and height in pixels."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None or not all(least <= int(side) <= most for side in match.groups()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not WIDTHxHEIGHT, e.g. 256x128, with sides from {least} to {most}"
        )
    return int(match[1]), int(match[2])


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_password(super().format(record))  # tracebacks have the texts of other packages


def log_to_stdout(line: str = "%(asctime)s  %(message)s") -> None:
    """Write our log lines to stdout, and only warnings of other packages."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, force=True)
    logging.getLogger().handlers[0].setFormatter(_Line(line, "%H:%M:%S"))
    for name in ("pipeline", "stages", "pixloom", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)


def exit_code(
    work: Callable[[], None], *, stopped: str = "what was done is kept, and the same command continues"
) -> int:
    """Do a command's work and return its exit code. An error becomes one line on stderr.

    stopped: what to say after "stopped; " on Ctrl-C and SIGTERM
    """
    stop_on_sigterm()
    try:
        work()
    except UserError as error:
        sys.stderr.write(f"{printable(str(error))}\n")
        return 2
    except PixloomError as error:
        logger.error("%s", printable(str(error)), exc_info=error.__cause__)
        sys.stderr.write(f"{printable(str(error))}\n")
        return 1
    except (KeyboardInterrupt, SystemExit):  # Ray, while it starts, exits on SIGTERM
        sys.stderr.write(f"stopped; {stopped}\n")
        return 130
    return 0


def printable(text: str) -> str:
    """The text as one line, without passwords. Names of objects may hold line breaks and terminal codes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in without_password(text))


@contextmanager
def planning() -> Iterator[None]:
    """Raises a StageError as UserError: a store that fails before any work is the user's to see to."""
    try:
        yield
    except StageError as error:
        raise UserError(str(error)) from error


def stop_on_sigterm() -> None:
    """Handle the first SIGTERM (`ray job stop`, schedulers) like Ctrl-C.

    Later ones are ignored: they would interrupt what is being put in order.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
