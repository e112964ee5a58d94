"""What differs between two runs in MLflow: settings, data, results.

python -m pipeline.compare "2026-11-01 09:30" 8d1f0c...
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from pipeline import cli, config as configuration
from stages.config.tracking import sqlite_file
from stages.errors import PixloomError, UserError, one_line, without_password

HELP = """\
Print what differs between two runs in MLflow: settings, data, results with their intervals of 95 %. Where
both workspaces are within reach, the scores of the images that both runs have are compared one by one, and a
run is called better only if the interval of the difference excludes zero."""

LONGEST = 64  # characters of a value
PAGE = 1000  # runs of an answer of MLflow


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.parser("pipeline.compare", HELP)
    p.add_argument("runs", nargs=2, metavar="RUN", help="the name or id of a run in the config's experiment")
    cli.add_config(p, configuration.located)
    return p


def find(client: Any, experiment: str, text: str) -> Any:
    """The pipeline run with this id or name. Raises UserError that lists the newest if there is not one."""
    runs, token = list[Any](), None
    while True:  # the steps of a run are runs too: thousands may be newer
        order = ["attributes.start_time DESC"]
        page = client.search_runs([experiment], max_results=PAGE, order_by=order, page_token=token)
        runs += [run for run in page if "mlflow.parentRunId" not in run.data.tags]
        if not (token := page.token):
            break
    named = [run for run in runs if text in (run.info.run_id, run.info.run_name)]
    if len(named) == 1:
        return named[0]
    there = ", ".join(f"{run.info.run_name} ({run.info.run_id})" for run in (named or runs)[:5])
    problem = f"{len(named)} runs have this name, take an id" if named else "there is no such run"
    raise UserError(f"{text}: {problem}; there are {there or 'none'}")


def settings(client: Any, run: Any) -> dict[str, str]:
    """The whole config of a run, by dotted key."""
    from stages.tracking.run import flatten  # noqa: PLC0415  after --help

    with tempfile.TemporaryDirectory() as folder:
        file = Path(client.download_artifacts(run.info.run_id, "config.yaml", folder))
        return flatten(yaml.safe_load(file.read_text(encoding="utf-8")))


def data(run: Any) -> dict[str, str]:
    """The data sets of a run: their name, and their digest with the pairs of each split."""
    return {d.dataset.name: f"{d.dataset.digest} {d.dataset.profile}" for d in run.inputs.dataset_inputs}


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Names whose values differ, with both values; "-" where there is none."""
    for name in sorted({*one, *other}):
        values = one.get(name, "-"), other.get(name, "-")
        if values[0] != values[1]:
            yield name, *values


def results(one: Any, other: Any) -> Iterator[tuple[str, str, str, str]]:
    """Metrics that differ, with their intervals, and by how much image by image."""
    from stages.scoring import table  # noqa: PLC0415
    from stages.scoring.metrics import lower_is_better  # noqa: PLC0415

    mine, theirs = one.data.metrics, other.data.metrics
    uri, other_uri = map(scores_of_images, (one, other))
    for name in sorted({*mine, *theirs}):
        if table.is_bound(name) or mine.get(name) == theirs.get(name):
            continue
        verdict, both = "", uri and other_uri and name in mine and name in theirs
        both = both and not name.startswith((*table.BASELINES, "target_", "sharpness"))  # none is a score
        if both and (apart := table.difference_of(other_uri, uri, name)) is not None:
            better = "second" if (apart.mean < 0) == lower_is_better(name) else "first"
            said = f"the {better} is better" if apart.excludes_zero else "no clear difference"
            verdict = f"{said}: {apart.mean:+.4g} ({apart.low:+.4g} to {apart.high:+.4g})"
        yield name, table.shown(mine, name) or "-", table.shown(theirs, name) or "-", verdict


def scores_of_images(run: Any) -> str:
    """The scores of a run's single images in its workspace; "" if it did not evaluate or they are gone."""
    from stages import storage  # noqa: PLC0415

    if folder := run.data.tags.get("pixloom.evaluation"):
        uri = storage.join(folder, "metrics.parquet")
        with suppress(PixloomError):  # of another machine, or a store that we have no right to read
            return uri if storage.exists(uri) else ""
    return ""


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text, in columns."""
    half = LONGEST // 2 - 2  # both ends are shown, since either may be what differs
    cut = [[t if len(t) <= LONGEST else f"{t[:half]}...{t[-half:]}" for t in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cut, strict=True)]
    lines = ("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)) for row in cut)
    return "\n".join(f"  {line}".rstrip() for line in lines)


def compared(client: Any, one: Any, other: Any) -> str:
    """What the command prints."""
    sections: dict[str, Sequence[Sequence[str]]] = {
        "settings": list(differing(settings(client, one), settings(client, other))),
        "data": list(differing(data(one), data(other))),
        "results": list(results(one, other)),
    }
    lines = [
        f"{place:<8}{run.info.run_name} ({run.info.run_id})"
        for place, run in (("first", one), ("second", other))
    ]
    for title, rows in sections.items():
        lines += ["", title, columns(rows) if rows else "  the same"]
    return "\n".join(lines) + "\n"


def run(options: argparse.Namespace) -> None:
    """Print the comparison. Raises UserError for a run that is not there and for MLflow that is away."""
    config = configuration.load(options.config, options.set, options.profile)
    from stages import storage  # noqa: PLC0415
    from stages.tracking.sender import connect  # noqa: PLC0415

    storage.configure(config.storage)
    uri = config.tracking.place(config.workspace)
    if (file := sqlite_file(uri)) is not None and not file.exists():
        raise UserError(f"tracking.uri: there is no {file}: nothing ran in {config.workspace} yet")
    try:
        client = connect(uri)
        experiment = client.get_experiment_by_name(config.tracking.experiment)
        if experiment is None:
            raise UserError(f"tracking.experiment: MLflow has no {config.tracking.experiment}")
        pair = [find(client, experiment.experiment_id, text) for text in options.runs]
        text = compared(client, *pair)
    except PixloomError:
        raise
    except Exception as error:  # MLflow, SQLAlchemy and requests each have their own
        raise UserError(f"tracking.uri: cannot use {without_password(uri)}: {one_line(error)}") from error
    sys.stdout.write(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    options = parser().parse_args(arguments)
    return cli.exit_code(lambda: run(options), stopped="nothing was changed")


if __name__ == "__main__":
    sys.exit(main())
