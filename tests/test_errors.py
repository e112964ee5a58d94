"""How errors become lines that can be shown to anybody."""

from __future__ import annotations

import pytest

from stages.errors import cause, one_line, without_password


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://me:geheim@host:5000/x", "https://host:5000/x"),
        ("postgresql://me:ge/heim@host/db", "postgresql://host/db"),
        (
            "postgresql://host/db?user=me&password=geheim&ssl=1",
            "postgresql://host/db?user=me&password=&ssl=1",
        ),
        ("https://host/a.tar?X-Amz-Signature=abc&x=1", "https://host/a.tar?X-Amz-Signature=&x=1"),
        ("tar://in/side::https://host:80/a@b.tar", "tar://in/side::https://host:80/a@b.tar"),
        ("tar://::s3://bucket/a@b.tar: c@d", "tar://::s3://bucket/a@b.tar: c@d"),
    ],
)
def test_a_uri_is_shown_without_what_is_secret(uri: str, shown: str) -> None:
    assert without_password(uri) == shown


def test_the_text_of_another_package_is_shown_without_passwords() -> None:
    error = ConnectionError("API request to http://me:geheim@host/api failed")
    assert one_line(error) == "API request to http://host/api failed"
    assert cause(error) == "ConnectionError: API request to http://host/api failed"


def test_a_cause_without_a_text_does_not_hide_what_says_more() -> None:
    error = OSError("the actor died\nModuleNotFoundError: No module named 'mine'")
    error.__cause__ = RuntimeError()
    assert cause(error) == "OSError: ModuleNotFoundError: No module named 'mine'"
