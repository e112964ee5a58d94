"""All commands under one name: `pixloom VERB` is `python -m pipeline.VERB`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from pipeline import cli

VERBS = {
    "init": "look at your images and write a config for them",
    "run": "the pipeline: from pairs of images to a trained model, generated images and a report",
    "plan": "what `run` would do, and why",
    "doctor": "check stores, rights, machines and MLflow before anything is spent",
    "infer": "generate images with a trained model",
    "convert": "import a published checkpoint; export a model",
    "sweep": "try a recipe with other settings and name the best",
    "compare": "what differs between two runs in MLflow: settings, data, results",
    "sample": "draw pairs to try the pipeline on",
    "recipes": "list the configs that come with Pixloom; copy one",
    "completion": "print the script that completes these commands in your shell",
}


def parser() -> argparse.ArgumentParser:
    """The command line, without the verbs' own options."""
    lines = "\n".join(f"  {verb:<12}{line}" for verb, line in VERBS.items())
    p = cli.parser("pipeline", "Image-to-image translation from pairs in object storage.", f"verbs:\n{lines}")
    p.add_argument("verb", choices=VERBS, metavar="VERB", help="see below; `VERB --help` has its options")
    p.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return p


def module(verb: str) -> Any:
    """The module with the verb's `parser` and `main`."""
    name = {"plan": "run", "sweep": "sweep.run"}.get(verb, verb)
    return importlib.import_module(f"pipeline.{name}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    options = parser().parse_args(arguments)
    words = ["--plan", *options.rest] if options.verb == "plan" else options.rest
    code: int = module(options.verb).main(words)
    return code


if __name__ == "__main__":
    sys.exit(main())
