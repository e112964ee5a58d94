"""Generate images with a trained model, without a pipeline around it.

python -m pipeline.infer --model models/street --input s3://maps --output s3://generated
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated, Any

from pydantic import Field, ValidationError

from pipeline import cli
from pipeline.config import override, refuse_renamed
from stages.base import Config, Resources
from stages.config.infer import InferConfig
from stages.config.locations import holds
from stages.config.tracking import TrackingConfig
from stages.errors import UserError, first_invalid

HELP = """\
Generate an image for every source in a folder, bucket, archive, shards folder or Parquet table of
{key, uri}. It is the pipeline's infer stage: the same command continues after a crash, finished images
are not generated again, and if nothing is left to do no cluster is started."""

EXAMPLES = f"""\
examples:
  python -m pipeline.infer --model workspace/train-joint-1a2b3c4d5e6f --input maps --output generated
  python -m pipeline.infer --model models:/street@champion --input s3://maps --output s3://generated \\
      --set format=jpeg --set quality=90 --set resources.infer_actors=8
  python -m pipeline.infer --model m --input day --output night --set stochastic=true --set samples=4

settings (--set) are those of the config's `infer` section, and `resources.*`, `storage.*`, `tracking.uri`
(where models:/ and runs:/ are looked up; else MLFLOW_TRACKING_URI, else ./workspace).

output: images/<key>.png, table/part-*.parquet with one row per input: checksum, size, seconds, seed, error.

{cli.EXIT_CODES}"""


class Settings(Config):
    """What `--set` may set: the stage's own settings and three other sections."""

    infer: InferConfig
    resources: Resources = Resources()
    storage: Annotated[dict[str, dict[str, Any]], Field(default_factory=dict)]
    tracking: TrackingConfig = TrackingConfig()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.parser("pipeline.infer", HELP, EXAMPLES)
    text = "folder or URI, models:/name@alias, runs:/id"
    p.add_argument("--model", required=True, type=cli.location, metavar="M", help=text)
    p.add_argument("--input", required=True, type=cli.location, metavar="URI", help="where the sources are")
    p.add_argument("--output", required=True, type=cli.output, metavar="URI", help="folder to write to")
    cli.add_settings(p, "change one setting")
    p.add_argument("--overwrite", action="store_true", help="generate again what the output folder holds")
    return p


def settings(options: argparse.Namespace) -> Settings:
    """The options as settings. Raises UserError naming the one that is wrong."""
    values: dict[str, Any] = {"infer": {n: getattr(options, n) for n in ("input", "model", "overwrite")}}
    sections = ("resources.", "storage.", "tracking.", "infer.")
    override(values, [text if text.startswith(sections) else f"infer.{text}" for text in options.set])
    refuse_renamed(values, "--set")
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise UserError(f"--set {first_invalid(error).removeprefix('infer.')}") from error


def run(options: argparse.Namespace) -> None:
    """Check the settings, then import what generates images: Ray and torch take seconds to load."""
    config = settings(options)
    from pipeline.cluster import cluster  # noqa: PLC0415
    from stages import infer, storage  # noqa: PLC0415
    from stages.inference.outputs import FOLDERS  # noqa: PLC0415
    from stages.storage.local import alone  # noqa: PLC0415

    storage.configure(config.storage)
    output = storage.absolute(options.output)
    for read in filter(None, (options.input, config.infer.instance)):
        if holds(read, output) or any(holds(storage.join(output, name), read) for name in FOLDERS):
            raise UserError(
                f"--output: what is written to {output} and what is read from {read} would be in one folder; "
                "name another"
            )
    with alone(output):
        with cli.planning(), storage.located(f"--output {options.output}"):
            storage.check_reachable({"--output": output, "--input": options.input})
            work = infer.prepare(
                config.infer,
                output=output,
                tracking_uri=config.tracking.place("workspace"),
                model_key="--model",
                input_key="--input",
            )
        with cluster(config.resources, config.storage, {}) if work.left else nullcontext():
            outcome = infer.finish(config.infer, config.resources, work, output)
    counts = ", ".join(f"{name} {count:,}" for name, count in outcome.counts.items())
    sys.stdout.write(f"{counts}\n{output}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    options = parser().parse_args(arguments)
    cli.log_to_stdout()
    return cli.exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
