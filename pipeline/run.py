"""Run the pipeline: from pairs of images in a bucket to a trained model, generated images and a report.

python -m pipeline.run                              pipeline.yaml, on this machine
ray job submit -- python -m pipeline.run            the same, on a cluster
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

if not __package__:
    sys.exit("start it as a module, from the repository's folder: python -m pipeline.run")

from pipeline import cli, config as configuration

HELP = """\
Run the pipeline: ingest -> pair -> shard -> train (phase by phase) -> infer -> evaluate -> report.

What is done is not done again: after a crash, or with another setting, the same command does only what
is missing. Every stage writes one folder in the workspace, named by a fingerprint of its config and
inputs; `--plan` shows all steps, what is to do, and why."""

EXAMPLES = f"""\
examples:
  python -m pipeline.run                                   the run that pipeline.yaml describes
  python -m pipeline.run -c recipes/facades.yaml           another application
  python -m pipeline.run -c facades --profile paper                    at the paper's size
  python -m pipeline.run --plan                            what would run, and why
  python -m pipeline.run --set train.seed=1 --set train.phases.0.epochs=20
  python -m pipeline.run --until shard                     prepare the data only
  python -m pipeline.run --only infer --set infer.model=s3://models/street --set infer.input=s3://maps
  ray job submit --working-dir . -- python -m pipeline.run   on a cluster

cluster:
  Inside a Ray job, or with RAY_ADDRESS set, the run joins that cluster; otherwise it starts Ray on this
  machine and stops it at the end. The config's `resources` say how much to use; they change no result.

{cli.EXIT_CODES}"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.parser("pipeline.run", HELP, EXAMPLES)
    cli.add_config(p, configuration.located)
    which = p.add_mutually_exclusive_group()
    which.add_argument("--until", metavar="STAGE", help="stop after this stage")
    which.add_argument("--only", metavar="STAGE", help="run this stage alone; its inputs must be done")
    p.add_argument(
        "--plan",
        action="store_true",
        help="print each step, why it is to do, and what it will take; run nothing",
    )
    p.add_argument("--machine", metavar="NAME", default="", help="with --plan: the price of such machines")
    text = "with --plan: your own price list, written like pipeline/prices.yaml"
    p.add_argument("--prices", type=cli.location, metavar="FILE", help=text)
    p.add_argument(
        "--schema", action="store_true", help="print the config's JSON schema (for editors) and exit"
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command_line = parser()
    options = command_line.parse_args(words)
    if (options.machine or options.prices) and not options.plan:
        command_line.error("--machine and --prices are for --plan")
    cli.log_to_stdout()
    if options.schema:
        sys.stdout.write(configuration.schema())
        return 0
    return cli.exit_code(lambda: run(options, command=shlex.join(["python", "-m", "pipeline.run", *words])))


def run(options: argparse.Namespace, *, command: str) -> None:
    """Check the config, then import what runs it: Ray and torch take seconds to load."""
    config = configuration.load(options.config, options.set, options.profile)
    from pipeline import session  # noqa: PLC0415

    sys.stdout.write(
        session.run(
            config,
            path=options.config,
            command=command,
            only=options.only,
            until=options.until,
            plan_only=options.plan,
            machine=options.machine,
            prices=options.prices,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
