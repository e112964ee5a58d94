"""List the configs that come with Pixloom, or copy one here to edit.

python -m pipeline.recipes                          each with one line
python -m pipeline.recipes copy facades             -> facades.yaml
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from pipeline import cli
from pipeline.config import RECIPES, located
from stages import storage
from stages.errors import UserError

HELP = """\
List the configs that come with Pixloom, each with one line. Every command takes a name from this list
where it takes a config file, and so does the key `extends` in your own files."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.parser("pipeline.recipes", HELP)
    verbs = p.add_subparsers(dest="verb", metavar="copy")
    c = verbs.add_parser("copy", help="write a recipe to a file of your own")
    c.add_argument("name", metavar="NAME", help="a name from the list")
    c.add_argument("file", metavar="FILE", nargs="?", type=Path, help="what to write (default: NAME.yaml)")
    return p


def listed() -> Iterator[tuple[str, str]]:
    """Every recipe's name and the first sentence of its comment, without the parts that recipes extend."""
    for path in sorted(RECIPES.rglob("*.yaml")):
        name = path.relative_to(RECIPES).with_suffix("").as_posix()
        if not name.startswith(("base/", "data/")):
            comment = re.sub(r"\n[^#][\s\S]*|#", "", _text(path))
            yield name, " ".join(comment.split()).partition(". ")[0].rstrip(".")


def _text(path: Path) -> str:
    """A recipe without the line for editors, whose path holds only where the recipe is."""
    return re.sub(r"# yaml-language-server.*\n#\n", "", path.read_text(encoding="utf-8"))


def copy(name: str, file: Path | None) -> None:
    """Write a recipe that works from any folder: what it extends is named as a recipe."""
    source = Path(located(name))
    if not source.is_relative_to(RECIPES):
        raise UserError(f"{name}: no such recipe; `pixloom recipes` lists them")
    target = file or Path(source.name)
    if target.exists():
        raise UserError(f"{target}: exists; name another file")
    text = _text(source)
    names = yaml.safe_load(text).get("extends", [])
    inside = [
        (source.parent / one).resolve().relative_to(RECIPES).as_posix()
        for one in ([names] if isinstance(names, str) else names)
    ]
    schema = f"# yaml-language-server: $schema={RECIPES / 'pipeline.schema.json'}\n#\n"
    text = schema + re.sub(r"^extends: .*$", f"extends: [{', '.join(inside)}]", text, flags=re.M)
    storage.write_bytes(str(target), text.encode())
    sys.stdout.write(f"{target}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    options = parser().parse_args(arguments)
    if options.verb == "copy":
        return cli.exit_code(lambda: copy(options.name, options.file))
    recipes = dict(listed())
    width = max(map(len, recipes))
    sys.stdout.write("".join(f"{name:<{width}}  {line}\n" for name, line in recipes.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
