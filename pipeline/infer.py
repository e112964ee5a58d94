"""Generate images with a trained model, without a pipeline around it.

python -m pipeline.infer --model models/street --input s3://maps --output s3://generated
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, ValidationError

from pipeline.cluster import cluster
from pipeline.config import override
from pipeline.run import exit_code, log_to_stdout
from stages import infer, storage
from stages.base import Config, Resources
from stages.config.infer import InferConfig
from stages.config.tracking import TrackingConfig
from stages.errors import UserError

HELP = """\
Generate an image for every source in a folder, bucket, archive, shards folder or Parquet table of
{key, uri}. The same code as the pipeline's infer stage: killed anywhere, the same command goes on;
finished images are not generated again, and with nothing to do no cluster is started."""

EXAMPLES = """\
examples:
  python -m pipeline.infer --model workspace/train-joint-1a2b3c4d5e6f --input maps --output generated
  python -m pipeline.infer --model models:/street@champion --input s3://maps --output s3://generated \\
      --set format=jpeg --set quality=90 --set resources.infer_actors=8
  python -m pipeline.infer --model m --input day --output night --set stochastic=true --set samples=4

settings (--set) are those of the config's `infer` section, and `resources.*`, `storage.*`, `tracking.uri`
(where models:/ and runs:/ are looked up; else MLFLOW_TRACKING_URI, else ./workspace).

output: images/<key>.png, table/part-*.parquet with a row an input: checksum, size, seconds, seed, error.

exit codes: 0 done; 1 failed, what was done is kept; 2 yours to mend, one line says what; 130 stopped
"""


class Settings(Config):
    """What `--set` may set beside the stage's own settings."""

    infer: InferConfig
    resources: Resources = Resources()
    storage: Annotated[dict[str, dict[str, Any]], Field(default_factory=dict)]
    tracking: TrackingConfig = TrackingConfig()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m pipeline.infer",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", required=True, metavar="M", help="folder or URI, models:/name@alias, runs:/id")
    p.add_argument("--input", required=True, metavar="URI", help="where the sources are")
    p.add_argument("--output", required=True, metavar="URI", help="folder to write to")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    p.add_argument("--overwrite", action="store_true", help="forget what the output holds, start anew")
    return p


def settings(options: argparse.Namespace) -> Settings:
    """The options as settings. Raises UserError naming the one that is wrong."""
    values: dict[str, Any] = {"infer": {"input": options.input, "model": options.model}}
    values["infer"]["overwrite"] = options.overwrite
    sections = ("resources.", "storage.", "tracking.", "infer.")
    override(values, [text if text.startswith(sections) else f"infer.{text}" for text in options.set])
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]).removeprefix("infer.")
        raise UserError(f"--set {key}: {first['msg'].removeprefix('Value error, ')}") from error


def run(options: argparse.Namespace) -> None:
    """Generate, and say what came of it."""
    given = settings(options)
    storage.configure(given.storage)
    output = storage.absolute(options.output)
    work = infer.prepare(given.infer, output=output, tracking_uri=given.tracking.place("workspace"))
    if work.left:
        with cluster(given.resources, given.storage, {}):
            outcome = infer.finish(given.infer, given.resources, work, output)
    else:
        outcome = infer.finish(given.infer, given.resources, work, output)
    told = ", ".join(f"{name} {count:,}" for name, count in outcome.counts.items())
    sys.stdout.write(f"{told}\n{output}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    options = parser().parse_args(arguments)
    log_to_stdout()
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
