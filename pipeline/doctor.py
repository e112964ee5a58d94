"""Check what a run needs before it costs anything: stores, rights, clocks, machines, MLflow, weights.

python -m pipeline.doctor [-c FILE]
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from pipeline import cli, config as configuration
from pipeline.config import PipelineConfig
from stages.config.ingest import IngestConfig, LocationConfig
from stages.errors import PixloomError, UserError, named, one_line

if TYPE_CHECKING:
    from pipeline.dag import Step

HELP = """\
Check, a line each, what a run with this config needs: every location can be listed and read; the workspace
can be listed and written, by a probe that is deleted again; clocks agree; every machine of the cluster has
the same Ray and Python, free disk, a GPU if one is asked for, and sees the workspace; MLflow can be written;
weights are there. Nothing is trained."""

EXAMPLES = f"""\
examples:
  python -m pipeline.doctor
  python -m pipeline.doctor -c recipes/facades.yaml --set workspace=s3://bucket/run

{cli.EXIT_CODES}"""

SKEW_S = 60.0  # S3 refuses requests whose clock is 15 minutes off
FREE_GB = 2.0  # of a machine's temporary folder, where Ray spills and files are unpacked
BATCHES = 20  # of a location, among which an object must match its pattern


class Report:
    """Prints a line for every check, and counts those that failed."""

    def __init__(self) -> None:
        self.checks = self.failed = 0

    def check(self, name: str, work: Callable[[], str]) -> bool:
        """Print what a check returned, or why it failed."""
        self.checks += 1
        try:
            text, mark = work(), "ok  "
        except Exception as error:  # a check says what is wrong, whatever it is
            text, mark = reason(error), "FAIL"
            self.failed += 1
        sys.stdout.write(f"{mark}  {cli.printable(f'{name}: {text}')}\n")
        sys.stdout.flush()
        return mark == "ok  "


def reason(error: Exception) -> str:
    """An error in one line, in the words of a run."""
    from stages.storage.retry import explain  # noqa: PLC0415

    if isinstance(error, PixloomError):
        return one_line(error)
    return explain(error) or one_line(error, kind=True)


# -- stores --------------------------------------------------------------------


def read_location(location: LocationConfig) -> str:
    """List a location until an object matches its pattern, and read that, as ingest and shard do."""
    from stages import ingest  # noqa: PLC0415
    from stages.objects.fetch import Object, Reader  # noqa: PLC0415

    units, config = ingest.cut_location(location), IngestConfig(locations=(location,))
    found = (ingest.unit_rows(config, 0, unit, requests=1) for unit in units)
    for objects, _, _ in islice(chain.from_iterable(found), BATCHES):
        for row in objects.slice(0, 1).to_pylist():
            data = Reader().read(Object(row["uri"], row["size"], row["etag"]))
            return f"can be listed and read ({row['uri']}, {len(data):,} bytes)"
    raise UserError(f"nothing in it matches the pattern {location.pattern!r}")


def check_rights(folder: str, report: Report) -> bool:
    """Try every right that the workspace needs, on a probe; whether all are there."""
    from stages import storage  # noqa: PLC0415

    with named("workspace"):
        fs, path = storage.filesystem(folder)
    uri = storage.join(folder, f".doctor-{uuid.uuid4().hex}")
    probe = storage.filesystem(uri)[1]

    def put() -> str:
        storage.write_bytes(uri, b"probe")
        return "an object can be written"

    def get() -> str:
        if storage.read_bytes(uri) != b"probe":
            raise OSError("another content came back than was written")
        return "it can be read back"

    def listing() -> str:
        if uri.rpartition("/")[2] not in storage.list_names(folder):
            raise OSError("what was just written is not listed")
        return "it is listed"

    def multipart() -> str:
        bucket, key, _ = fs.split_path(f"{probe}-parts")
        where = {"Bucket": bucket, "Key": key}
        upload = where | {"UploadId": fs.call_s3("create_multipart_upload", **where)["UploadId"]}
        try:
            part = fs.call_s3("upload_part", **upload, PartNumber=1, Body=b"probe")
            parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
            fs.call_s3("complete_multipart_upload", **upload, MultipartUpload=parts)
        except BaseException:
            with suppress(Exception):
                fs.call_s3("abort_multipart_upload", **upload)
            raise
        fs.rm_file(f"{probe}-parts")
        return "an object can be sent in parts"

    def delete() -> str:
        fs.rm_file(probe)
        return "it can be deleted"

    def clock() -> str:
        bucket = fs.split_path(path)[0]
        headers = fs.call_s3("head_bucket", Bucket=bucket)["ResponseMetadata"]["HTTPHeaders"]
        return agree(parsedate_to_datetime(headers["date"]).timestamp(), "the store's clock")

    failed = report.failed
    if report.check(f"workspace: put into {folder}", put):
        for name, work in (("get", get), ("list", listing), ("delete", delete)):
            report.check(f"workspace: {name}", work)
    if storage.speaks(fs, "s3"):
        report.check("workspace: multipart", multipart)
        report.check("workspace: clock", clock)
    return report.failed == failed


def agree(other: float, whose: str) -> str:
    """Compare a clock with this machine's. Raises UserError if they differ by more than `SKEW_S`."""
    skew = other - time.time()
    text = f"{whose} is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's"
    if abs(skew) > SKEW_S:
        raise UserError(f"{text}; set the clocks (NTP)")
    return text


# -- machines ------------------------------------------------------------------


def machine(probe: str) -> dict[str, Any]:
    """What a machine of the cluster has; run there as a task."""
    import ray  # noqa: PLC0415

    from stages import storage  # noqa: PLC0415

    gpu = ""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        gpu = "" if asked.returncode else asked.stdout.strip()  # without a driver it prints why not
    try:
        seen = "" if storage.read_bytes(probe) == b"probe" else "the probe there has another content"
    except Exception as error:
        seen = reason(error)
    free = shutil.disk_usage(tempfile.gettempdir()).free / 2**30
    versions = (ray.__version__, platform.python_version())
    return {"versions": versions, "gpu": gpu, "free": free, "time": time.time(), "unseen": seen}


def judge(found: Mapping[str, Any], versions: tuple[str, str], *, gpu: bool) -> str:
    """What a machine has, in a line. Raises UserError for what keeps a run from working there."""
    if tuple(found["versions"]) != versions:
        raise UserError(
            f"it has Ray {' and Python '.join(found['versions'])}, this one {' and '.join(versions)}"
        )
    if found["unseen"]:
        raise UserError(f"it does not see the workspace ({found['unseen']}); use a bucket or a shared folder")
    if found["free"] < FREE_GB:
        raise UserError(f"{found['free']:.1f} GB of its temporary folder are free; {FREE_GB:.0f} are needed")
    if gpu and not found["gpu"]:
        raise UserError("resources.gpu is true, and it has no GPU that nvidia-smi shows")
    agree(found["time"], "its clock")
    cards = found["gpu"].replace("\n", "; ") or "no GPU"
    ray_version, python = found["versions"]
    return f"Ray {ray_version}, Python {python}, {cards}, {found['free']:.0f} GB free, sees the workspace"


def check_machines(config: PipelineConfig, report: Report) -> None:
    """A line for every machine of the cluster."""
    import ray  # noqa: PLC0415

    from pipeline.cluster import cluster, result_folders  # noqa: PLC0415
    from stages import storage  # noqa: PLC0415
    from stages.parallel.cluster import on_every_node  # noqa: PLC0415

    versions = (ray.__version__, platform.python_version())
    probe = storage.join(config.workspace, f".doctor-{uuid.uuid4().hex}")
    storage.write_bytes(probe, b"probe")
    try:
        with cluster(config.resources, config.storage, result_folders(config)):
            gpu = bool(config.resources.gpu)
            for name, answer in on_every_node(machine, probe, timeout_s=120):
                report.check(f"machine {name}", lambda one=answer: judge(one(), versions, gpu=gpu))  # type: ignore[misc]
    finally:
        storage.remove(probe)


# -- the command ---------------------------------------------------------------


def examine(config: PipelineConfig) -> Report:
    """Make all checks and print them."""
    from pipeline.dag import steps  # noqa: PLC0415
    from stages import storage  # noqa: PLC0415
    from stages.tracking.run import probe  # noqa: PLC0415

    report = Report()
    storage.configure(config.storage)
    for index, location in enumerate(config.ingest.locations):
        report.check(f"ingest.locations.{index}: {location.uri}", partial(read_location, location))
    writable = check_rights(config.workspace, report)
    for step in steps(config)[1:]:  # what ingest reads is looked at above
        if step.check is not None or step.digest is not None:
            report.check(step.name, partial(_check_step, step))
    if config.tracking.enabled:
        report.check("tracking", lambda: f"{probe(config.tracking, config.workspace)} can be written")
    if writable:
        check_machines(config, report)
    return report


def _check_step(step: Step) -> str:
    if step.digest is not None:
        step.digest()
    if step.check is not None:
        step.check({})
    return "the weights and files it names are there"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.parser("pipeline.doctor", HELP, EXAMPLES)
    cli.add_config(p, configuration.located)
    return p


def run(options: argparse.Namespace) -> None:
    """Check everything. Raises UserError if a check failed."""
    config = configuration.load(options.config, options.set, options.profile)
    report = examine(config)
    if report.failed:
        raise UserError(f"{options.config}: {report.failed} of {report.checks} checks failed")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    options = parser().parse_args(arguments)
    return cli.exit_code(lambda: run(options), stopped="nothing was changed")


if __name__ == "__main__":
    sys.exit(main())
