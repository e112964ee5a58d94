"""Every error Pixloom raises on purpose.

PixloomError
├── UserError     the user's to mend: bad config, missing bucket, wrong credentials   exit 2, one line
└── StageError    a stage failed on good input: worker lost, too many rejects         exit 1, cause shown
"""

from __future__ import annotations


class PixloomError(Exception):
    """Base of the errors a run ends with; its text is one line a person can act on."""


class UserError(PixloomError):
    """The user's to mend. The message names the file and the dotted key, or the object, to look at."""


class StageError(PixloomError):
    """A stage failed. The message names the stage and what to look at; the cause is chained."""
