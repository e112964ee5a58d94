"""The doctor: what it says of stores, machines and MLflow."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import ray

from pipeline import config as configuration, doctor
from pipeline.cluster import result_folders
from pipeline.dag import steps
from stages import storage
from stages.config.ingest import LocationConfig
from stages.errors import UserError
from tests.stores.seaweed import SeaweedS3

VERSIONS = (ray.__version__, platform.python_version())


def lines(captured: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    """The mark and the name of each line."""
    return [
        (line[:4].strip(), line[6:].split(":")[1].strip()) for line in captured.readouterr().out.splitlines()
    ]


@pytest.mark.s3
def test_a_user_who_may_write_has_every_right_and_no_probe_is_left(
    s3_store: SeaweedS3, s3_bucket: str, client_options: None, capsys: pytest.CaptureFixture[str]
) -> None:
    storage.configure({"s3": s3_store.options()})
    folder = f"s3://{s3_bucket}/run"
    assert doctor.check_rights(folder, doctor.Report())
    assert [mark for mark, _ in lines(capsys)] == ["ok"] * 6
    assert not any("doctor" in name for name in s3_store.client().find(s3_bucket))
    assert not doctor.check_rights("s3://no-such-bucket-here/run", doctor.Report())
    assert "FAIL  workspace: put into s3://no-such-bucket-here/run: " in capsys.readouterr().out


@pytest.mark.s3
def test_a_user_who_may_only_read_is_told_which_rights_are_missing(
    s3_store: SeaweedS3, s3_bucket: str, client_options: None, capsys: pytest.CaptureFixture[str]
) -> None:
    s3_store.client().pipe_file(f"{s3_bucket}/photos/a.png", b"x" * 9)
    storage.configure({"s3": s3_store.options(read_only=True)})
    report = doctor.Report()
    location = LocationConfig(uri=f"s3://{s3_bucket}/photos", role="target")
    report.check("location", lambda: doctor.read_location(location))
    assert capsys.readouterr().out == (
        f"ok    location: can be listed and read (s3://{s3_bucket}/photos/a.png, 9 bytes)\n"
    )
    assert not doctor.check_rights(f"s3://{s3_bucket}/run", report)
    text = capsys.readouterr().out
    assert text.count("access denied, check credentials and permissions") == report.failed == 2
    assert "FAIL  workspace: put into" in text
    assert "FAIL  workspace: multipart" in text
    assert "ok    workspace: clock" in text


def test_a_local_workspace_and_location_are_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = doctor.Report()
    assert doctor.check_rights(str(tmp_path / "new"), report)
    assert list((tmp_path / "new").iterdir()) == []
    empty = LocationConfig(uri=str(tmp_path / "new"), role="target", pattern="{key}.png")
    assert not report.check("a", lambda: doctor.read_location(empty))
    assert "nothing in it matches the pattern '{key}.png'" in capsys.readouterr().out
    assert (report.checks, report.failed) == (5, 1)


def test_a_machine_is_judged_by_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "probe").write_bytes(b"probe")
    found = doctor.machine(str(tmp_path / "probe")) | {"free": 50.0}
    assert "sees the workspace" in doctor.judge(found, VERSIONS, gpu=False)
    unseen = doctor.machine(str(tmp_path / "other"))
    for change, why in (
        ({"free": 0.5}, "0.5 GB of its temporary folder"),
        ({"time": found["time"] - 3600}, "behind this machine's; set the clocks"),
        ({"versions": ("1.0", "3.9")}, "it has Ray 1.0 and Python 3.9"),
        ({"unseen": unseen["unseen"]}, "it does not see the workspace"),
    ):
        with pytest.raises(UserError, match=why):
            doctor.judge(found | change, VERSIONS, gpu=False)
    with pytest.raises(UserError, match="no GPU that nvidia-smi shows"):
        doctor.judge(found | {"gpu": ""}, VERSIONS, gpu=True)


def test_a_machine_without_a_driver_has_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed: no communication with the driver'\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor.machine(str(tmp_path / "probe"))["gpu"] == ""


def test_a_workspace_of_an_unknown_protocol_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    config = configuration.load("pipeline.yaml", ["workspace=nowhere://bucket/run"])
    for refuses in (
        lambda: doctor.check_rights(config.workspace, doctor.Report()),
        lambda: result_folders(config),
    ):
        with pytest.raises(UserError, match=r"^workspace: nowhere://bucket/run: Protocol not known: nowhere"):
            refuses()


def test_a_model_that_is_not_there_is_found(tmp_path: Path) -> None:
    config = configuration.load("pipeline.yaml", [f"infer.model={tmp_path}/none"])
    (infer,) = (step for step in steps(config) if step.name == "infer")
    with pytest.raises(UserError, match=r"infer\.model: .*none: there is no model\.json"):
        doctor._check_step(infer)
    config = configuration.load("pipeline.yaml", [f"pair.exclude={tmp_path}/none.csv"])
    with pytest.raises(UserError, match=r"pair\.exclude: "):
        doctor._check_step(steps(config)[1])


def test_a_failed_check_is_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = doctor.Report()

    def broken() -> str:
        raise OSError("no route")

    report.check("store", broken)
    monkeypatch.setattr(doctor, "examine", lambda _: report)
    assert doctor.main([]) == 2
    assert capsys.readouterr().err == "pipeline.yaml: 1 of 1 checks failed\n"
