"""A call is repeated while the store fails, and not where it refuses; then one error names the location."""

from __future__ import annotations

import errno

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from stages import storage
from stages.errors import StageError, UserError
from stages.storage import retry


def test_an_error_that_passes_is_tried_again_and_a_refusal_is_not() -> None:
    calls = []

    def fails_twice() -> int:
        calls.append(1)
        if len(calls) < 3:
            raise OSError("busy")
        return 7

    assert storage.retried(fails_twice, first_wait=0) == 7

    def refuses() -> int:
        calls.append(1)
        raise PermissionError

    calls.clear()
    with pytest.raises(UserError, match="s3://b/x: access denied"):
        storage.patiently(refuses, "s3://b/x", first_wait=0)
    assert len(calls) == 1


def test_only_errors_of_the_location_are_the_users() -> None:
    assert (
        retry.explain(PermissionError("no"))
        == "access denied, check credentials and permissions (PermissionError: no)"
    )
    assert retry.explain(KeyError("a bug")) is None
    assert "NoCredentialsError" in (retry.explain(NoCredentialsError()) or "")
    assert "\n" not in (retry.explain(OSError("two\nlines")) or "\n")
    with pytest.raises(UserError, match=r"^--input x: there is no such bucket"), storage.located("--input x"):
        raise FileNotFoundError
    with pytest.raises(KeyError), storage.located("--input x"):
        raise KeyError("a bug")


def test_missing_credentials_are_no_passing_trouble() -> None:
    assert not retry.passing(NoCredentialsError())
    assert retry.passing(EndpointConnectionError(endpoint_url="http://x"))


def test_our_own_faults_are_not_mistaken_for_the_stores() -> None:
    def wrong() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        storage.patiently(wrong, "x", 5, 0.001)


def test_waits_grow_but_stay_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)

    def away() -> None:
        raise ConnectionResetError("away")

    with pytest.raises(UserError, match=r"x: failed at each of 8 attempts: .*same command again"):
        storage.patiently(away, "x")
    assert len(waits) == retry.ATTEMPTS - 1
    assert 10 < sum(waits) < 60  # longer than a server's restart, not for ever


def test_a_store_that_is_away_is_known_by_what_its_client_wrapped() -> None:
    def raising(error: Exception, reason: Exception) -> Exception:
        try:
            raise error from reason
        except Exception as caught:
            return caught

    assert retry.away(raising(OSError("SlowDown"), ClientError({}, "GetObject")))
    assert not retry.away(raising(OSError("t.parquet: CRC differs"), ValueError("damaged")))


def test_attempts_end_with_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every attempt takes its whole timeout, eight of them would take hours."""
    now = iter(range(0, 100_000, 200))
    monkeypatch.setattr(retry.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(retry.time, "sleep", lambda _: None)
    calls = []

    def hangs() -> None:
        calls.append(1)
        raise TimeoutError("no answer")

    with pytest.raises(UserError, match="no answer"):
        storage.patiently(hangs, "x")
    assert len(calls) == 2


@pytest.mark.parametrize("error", [FileNotFoundError("none"), IsADirectoryError("a")])
def test_what_is_not_there_is_said_at_once(error: OSError) -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        storage.patiently(call, "x", first_wait=0)
    assert len(calls) == 1


def test_a_file_system_that_takes_no_files_refuses() -> None:
    def call() -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with pytest.raises(UserError, match=r"^/x: access denied.*Read-only file system"):
        storage.patiently(call, "/x", attempts=1)


def test_our_own_error_passes_unchanged() -> None:
    def call() -> None:
        raise UserError("pair.source_half: say which")

    with pytest.raises(UserError, match=r"^pair\.source_half: say which$"):
        storage.patiently(call, "x", first_wait=0)


def test_a_single_attempt_is_not_counted_in_the_message() -> None:
    def call() -> None:
        raise OSError("No space left")

    with pytest.raises(StageError, match=r"^/x: OSError: No space left$"):
        storage.patiently(call, "/x", attempts=1)


def test_an_error_without_a_text_is_named_by_its_kind() -> None:
    def call() -> None:
        raise TimeoutError

    with pytest.raises(UserError, match=r"attempts: cannot reach .*\(TimeoutError\)"):
        storage.patiently(call, "x", 2, 0)
