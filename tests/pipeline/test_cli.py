"""What commands share: sizes, exit codes, SIGTERM."""

from __future__ import annotations

import argparse
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest

import pipeline.convert
import pipeline.infer
import pipeline.init
import pipeline.run
import pipeline.sample
from pipeline import cli
from stages.errors import StageError, UserError


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def raising(error: BaseException) -> int:
    def work() -> None:
        raise error

    return cli.exit_code(work)


def test_a_size_is_width_times_height() -> None:
    assert cli.size("256x128") == (256, 128)
    assert cli.size("32x8192", least=32, most=8192) == (32, 8192)


@pytest.mark.parametrize("text", ["256", "x128", "0x5", "16x64", "-64x64", "64x64x3", "64X64"])
def test_another_text_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not WIDTHxHEIGHT"):
        cli.size(text, least=32, most=8192)


READS = [
    [pipeline.convert, "import", "--output", "x", "--generator"],
    [pipeline.convert, "import", "--output", "x", "--generator", "g", "--discriminator"],
    [pipeline.convert, "import", "--output", "x", "--generator", "g", "--encoder"],
    [pipeline.convert, "export", "--format", "onnx", "--size", "32x32", "--output", "x", "--model"],
    [pipeline.infer, "--model", "m", "--output", "x", "--input"],
    [pipeline.infer, "--input", "m", "--output", "x", "--model"],
    [pipeline.run, "--plan", "--prices"],
    [pipeline.init],
    [pipeline.init, "x"],
]
WRITES = [
    [pipeline.convert, "import", "--generator", "g", "--output"],
    [pipeline.convert, "export", "--format", "onnx", "--size", "32x32", "--model", "m", "--output"],
    [pipeline.infer, "--model", "m", "--input", "x", "--output"],
    [pipeline.sample],
]


@pytest.mark.parametrize("command", [*READS, *WRITES])
@pytest.mark.parametrize("empty", ["", " ", "file://"])
def test_an_empty_location_is_refused(
    command: list[Any], empty: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command[0].main([*command[1:], empty])
    assert re.search("error: argument .*: an empty location; name .*\n$", capsys.readouterr().err)


@pytest.mark.parametrize("command", WRITES)
@pytest.mark.parametrize("output", ["zip://a::b", "https://host/x", "filecache::s3://b/x"])
def test_an_output_that_takes_no_files_is_refused(
    command: list[Any], output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command[0].main([*command[1:], output])
    assert "takes no files; name a folder or a bucket\n" in capsys.readouterr().err


def test_a_users_error_is_exit_2_with_its_line_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(UserError("pipeline.yaml: train.seed: must be positive")) == 2
    assert capsys.readouterr().err == "pipeline.yaml: train.seed: must be positive\n"


def test_a_name_with_a_line_break_does_not_break_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(UserError("a\nb\x1b[2J größe 写真.png: not usable by name")) == 2
    assert capsys.readouterr().err == "a\\nb\\x1b[2J größe 写真.png: not usable by name\n"


def test_a_stages_error_is_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(StageError("shard failed")) == 1
    assert capsys.readouterr().err.endswith("shard failed\n")


def test_sigterm_ends_like_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.exit_code(lambda: os.kill(os.getpid(), signal.SIGTERM), stopped="nothing was written") == 130
    assert capsys.readouterr().err == "stopped; nothing was written\n"


def test_the_exit_that_ray_makes_of_sigterm_while_it_starts_is_no_other_end() -> None:
    assert raising(SystemExit(15)) == 130


def test_a_second_sigterm_does_not_interrupt_what_the_first_began(capsys: pytest.CaptureFixture[str]) -> None:
    order = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            order.append("put in order")

    assert cli.exit_code(work) == 130
    assert order
    assert capsys.readouterr().err.startswith("stopped; ")


def test_work_that_returns_is_exit_0() -> None:
    assert cli.exit_code(lambda: None) == 0


def test_passwords_are_in_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise OSError("no answer from http://me:geheim@host/api")
    except OSError as cause:
        error = StageError("register: https://me:geheim@host:5000/x did not take it")
        error.__cause__ = cause
    cli.log_to_stdout()
    assert raising(error) == 1
    said = "".join(capsys.readouterr())
    assert said.count("//host") >= 3  # the log's line, the traceback, the line on stderr
    assert "geheim" not in said
