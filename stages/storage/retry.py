"""The one retry policy: a call to a store is repeated while the store fails, not where it refuses.

The waits between attempts add up to 13 to 26 s. s3fs also retries within each attempt: a store that refuses
connections is given up after one to two minutes, longer than a server's restart takes.
"""

from __future__ import annotations

import errno
import logging
import lzma
import random
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from stages.errors import PixloomError, StageError, UserError, one_line

logger = logging.getLogger(__name__)
Value = TypeVar("Value")

ATTEMPTS = 8
FIRST_WAIT = 0.25  # seconds; doubled each time, at most LONGEST_WAIT
LONGEST_WAIT = 10.0
LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)
CLIENTS = ("botocore", "aiobotocore", "aiohttp", "asyncio", "obstore", "urllib3")
PATIENCE = 300.0  # seconds after which no new attempt starts: each may take as long as the client's timeouts
WHEN_BACK = "what was done is kept: start the same command again when the store answers"


def misconfigured(error: BaseException) -> bool:
    """Whether an S3 client sends nothing, for a wrong option or bucket's name. By name: it loads slowly."""
    return type(error).__name__ in (
        "ParamValidationError",
        "ProfileNotFound",
        "ConfigNotFound",
        "ConfigParseError",
        "InvalidConfigError",
        "NoRegionError",
        "InvalidRegionError",
    )


def refusal(error: BaseException) -> bool:
    """Whether a store refuses these credentials, or takes no file: nothing that another attempt changes."""
    read_only = isinstance(error, OSError) and error.errno == errno.EROFS
    return isinstance(error, PermissionError) or read_only or "Credential" in type(error).__name__


def passing(error: BaseException) -> bool:
    """Whether another attempt may succeed: the network or the store failed, and did not refuse."""
    if isinstance(error, LASTING) or refusal(error) or misconfigured(error):
        return False
    damage = OSError | EOFError | tarfile.TarError | zlib.error | lzma.LZMAError
    return isinstance(error, damage) or _client(error) in CLIENTS


def unreachable(error: BaseException) -> bool:
    """Whether a client got no answer at all."""
    return type(error).__name__.endswith(("ConnectionError", "ConnectorError", "TimeoutError", "SSLError"))


def away(error: BaseException) -> bool:
    """Whether the network or a store failed, and not this machine or what was read. Clients wrap errors."""
    chain: BaseException | None = error
    while chain is not None:
        if unreachable(chain) or isinstance(chain, ConnectionError) or _client(chain) in CLIENTS:
            return True
        chain = chain.__cause__
    return False


def _client(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def retried(call: Callable[[], Value], *, attempts: int = ATTEMPTS, first_wait: float = FIRST_WAIT) -> Value:
    """The call's value; the call is repeated after growing, random waits while the store fails.

    Raises the last attempt's error, or the first one that no other attempt would change.
    """
    started = time.monotonic()
    for attempt in range(attempts - 1):
        try:
            return call()
        except Exception as error:
            if not passing(error) or time.monotonic() - started > PATIENCE:
                raise
            logger.info("%s; retrying", one_line(error, kind=True))
            wait = min(first_wait * 2**attempt, LONGEST_WAIT)
            time.sleep(wait * random.uniform(0.5, 1))  # noqa: S311 - scatters retries, changes no result
    return call()


def patiently(
    call: Callable[[], Value], uri: str, attempts: int = ATTEMPTS, first_wait: float = FIRST_WAIT
) -> Value:
    """As `retried`, with errors that name the location.

    Raises FileNotFoundError if there is no such object, UserError if the store refuses access or was away at
    every attempt, StageError if what was read is damaged or this machine failed.
    """
    try:
        return retried(call, attempts=attempts, first_wait=first_wait)
    except PixloomError:
        raise
    except Exception as error:
        if refusal(error) or misconfigured(error):
            raise UserError(f"{uri}: {explain(error)}") from error
        if passing(error):
            tried = f"failed at each of {attempts} attempts: " if attempts > 1 else ""
            if away(error):
                raise UserError(f"{uri}: {tried}{explain(error)}; {WHEN_BACK}") from error
            raise StageError(f"{uri}: {tried}{explain(error)}") from error
        raise


def explain(error: BaseException) -> str | None:
    """What keeps a location from being used, in one line with advice; None if that is our own fault."""
    text = one_line(error, kind=True)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "there is no such bucket, folder or file"
    if refusal(error):
        return f"access denied, check credentials and permissions ({text})"
    if unreachable(error):
        return f"cannot reach the store, check the endpoint and the network ({text})"
    if isinstance(error, ImportError | ValueError):  # fsspec names the package to install
        return one_line(error)
    return text if passing(error) or misconfigured(error) else None


@contextmanager
def located(place: str) -> Iterator[None]:
    """Raises errors that the user can fix as UserError that begins with `place`; ours as they are."""
    try:
        yield
    except PixloomError:
        raise
    except Exception as error:
        text = explain(error)
        if text is None:
            raise
        raise UserError(f"{place}: {text}") from error
