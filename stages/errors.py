"""Every error Pixloom raises on purpose.

PixloomError
├── UserError     the user's to mend: bad config, missing bucket, wrong credentials   exit 2, one line
└── StageError    a stage failed on good input: worker lost, too many rejects         exit 1, cause shown
"""

from __future__ import annotations

import re


class PixloomError(Exception):
    """Base of the errors a run ends with; its text is one line a person can act on."""


class UserError(PixloomError):
    """The user's to mend. The message names the file and the dotted key, or the object, to look at."""


class StageError(PixloomError):
    """A stage failed. The message names the stage and what to look at; the cause is chained."""


def full_disk(error: BaseException) -> str:
    """What to mend, if Ray says that it has no room: its object store is full and so is the disk; else "".

    Ray's own text, however deep it is wrapped, ends in advice to call `df` and does not say for which folder.
    """
    text = str(error)
    if "Local disk is full" not in text:
        return ""
    machines = re.findall(r"\bip=([\w.:]+)", text)
    where = f" on {machines[-1]}" if machines else ""
    return (
        f"Ray's object store{where} is full, and so is the disk it spills to (/tmp/ray, unless told of "
        "another): free some there, or start Ray with more --object-store-memory or another "
        "--object-spilling-directory"
    )
