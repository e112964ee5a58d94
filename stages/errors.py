"""Every error Pixloom raises on purpose, and how any error becomes one line for a person.

PixloomError
├── UserError     the user can fix it: bad config, missing bucket, a store that is away  exit 2, one line
└── StageError    a stage failed on good input: worker lost, too many rejects            exit 1, cause shown
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

SECRET = re.compile(
    r"(?i)(?<=://)(?:[^/\s]*|[^/:@\s]*:(?!\d+/|:)[^@\s]*)@"
    r"|([?&][\w-]*(?:password|sig|signature|token)=)[^&\s]*",
)
"""User and password of a URI, also a password with a slash; a password or signature in its query."""

QUOTE = """quote text with {braces}: "{key}.png", in a shell '"{key}.png"'"""


class PixloomError(Exception):
    """Base of the errors a run ends with; its text is one line a person can act on."""


class UserError(PixloomError):
    """The user can fix it. The message names the file and the dotted key, or the object, to look at."""


class StageError(PixloomError):
    """A stage failed. The message names the stage and what to look at; the cause is chained."""


@contextmanager
def named(key: str) -> Iterator[None]:
    """Put the config key or option in front of a UserError's message."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def without_password(text: str) -> str:
    """A URI, or text with URIs, as it may be printed."""
    return SECRET.sub(r"\1", text)


def one_line(error: BaseException, *, limit: int = 300, kind: bool = False) -> str:
    """The first line of an error's text, at most `limit` characters; its type's name if it has no text.

    kind   put the type's name in front: `TimeoutError: no answer`
    """
    name = type(error).__name__
    lines = without_password(str(error)).splitlines()
    text = next((" ".join(line.split()) for line in lines if line.strip()), "")
    if not text:
        return name
    return f"{name}: {text}"[:limit] if kind else text[:limit]


def cause(error: BaseException) -> str:
    """The innermost reason of an error that Ray wrapped, as `Type: text` in one line."""
    if full := full_disk(error):
        return full
    failures = getattr(error, "worker_failures", None)  # of a Ray Train run
    if failures:
        rank, first = next(iter(failures.items()))
        return f"worker {rank}: {cause(first)}"
    error = innermost(error)
    lines = [line for line in without_password(str(error)).splitlines() if line.strip()] or [""]
    text = lines[0].partition(". ")[0] if "actor is dead" in lines[0] else lines[-1]
    text = text.partition("Worker exit detail")[0].strip()
    return f"{type(error).__name__}: {text}".removesuffix(": ")[:300]


def innermost(error: BaseException) -> BaseException:
    """What an error was raised from, to the last that has a text. Ray keeps what a task raised in `cause`."""
    while (inner := getattr(error, "cause", None) or error.__cause__) not in (None, error) and str(inner):
        error = inner
    return error


def first_invalid(error: ValidationError) -> str:
    """The most useful of pydantic's errors as `key: reason (and N more)`.

    Unknown keys come first: a misspelt key usually causes the missing-key errors.
    """
    errors = error.errors(include_url=False)
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "there is no such key"
    elif first["type"] == "missing":
        message = "is required"
    elif first["type"] == "string_type" and isinstance(first["input"], dict):
        message = f"expected text, found a section; {QUOTE}"
    elif not isinstance(first["input"], dict | list) and first["type"] != "value_error":
        message = f"{message}, got {first['input']!r}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return " ".join(f"{key + ': ' if key else ''}{message}{more}".split())


def full_disk(error: BaseException) -> str:
    """What to do if Ray says that its object store and the disk it spills to are full; else "".

    Ray's own text, however deep it is wrapped, ends in advice to call `df` and does not say for which folder.
    """
    text = str(error)
    if "Local disk is full" not in text:
        return ""
    machines = re.findall(r"\bip=([\w.:]+)", text)
    where = f" on {machines[-1]}" if machines else ""
    return (
        f"Ray's object store{where} is full, and so is the disk it spills to (/tmp/ray by default): free "
        "some space there, or start Ray with a larger --object-store-memory or another "
        "--object-spilling-directory"
    )
