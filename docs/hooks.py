"""What the site has beyond docs/: pages from elsewhere in the repository, references, and llms.txt.

MkDocs calls the functions `on_*`. The Markdown stays as GitHub shows it: its links are the repository's, and
become the site's here.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from jinja2 import Environment
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.__main__ import VERBS, module  # noqa: E402 - the site is built from anywhere
from pipeline.config import PipelineConfig  # noqa: E402

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "cluster/README.md": "cluster.md",
    "recipes/README.md": "recipes.md",
}
"""Pages from outside of docs/, with their names in the site."""

PICTURES = {"benchmarks/history.png": "history.png"}

SUBCOMMANDS = {"convert": ("import", "export"), "recipes": ("copy",)}

PYTHON = {
    "Run a pipeline": ("pipeline.config.load", "pipeline.session.run"),
    "Models": (
        "stages.models.files.saved.load_model",
        "stages.models.files.saved.save_model",
        "stages.models.files.saved.LoadedModel",
    ),
    "Generate": ("stages.inference.translator.Translator",),
    "Data": (
        "stages.shards.dataset.load",
        "stages.shards.dataset.read_split",
        "stages.shards.dataset.DatasetSpec",
        "stages.images.decode.decode_image",
        "stages.images.kinds.ImageRejected",
    ),
    "Errors": ("stages.errors.UserError", "stages.errors.StageError"),
}
"""What a program may import, by the task."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    texts = {site: (ROOT / path).read_text() for path, site in PAGES.items()}
    texts["reference/config.md"] = "\n".join(config_reference())
    texts["reference/commands.md"] = "\n".join(command_reference())
    texts["reference/python.md"] = "\n".join(python_reference())
    for site, text in texts.items():
        files.append(File.generated(config, site, content=text))
    for path, site in PICTURES.items():
        files.append(File.generated(config, site, abs_src_path=str(ROOT / path)))
    return files


# -- links --------------------------------------------------------------------


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """The page with links of the site instead of the repository's; without links to files that it lacks."""
    here = page.file.src_uri
    source = next((path for path, site in PAGES.items() if site == here), f"docs/{here}")

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if ":" in target or not target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        site = (PAGES | PICTURES).get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if site is not None:
            return f"{text}({posixpath.relpath(site, posixpath.dirname(here) or '.')}{anchor})"
        if not (ROOT / path).exists():
            raise PluginError(f"{source}: {target} does not exist")
        return f"{text}({config.repo_url}/blob/main/{path})" if config.repo_url else text.strip("[]!")

    return re.sub(r"(!?\[[^]]*\])\(([^)\s#]*)(#[^)\s]*)?\)", link, markdown)


# -- references ---------------------------------------------------------------


def config_reference() -> Iterator[str]:
    """A table of keys for each section of a config file, from the types that check it."""
    schema = PipelineConfig.model_json_schema()
    definitions = schema["$defs"]
    yield "# Config\n\nEvery key of a config file. What is left out has its default.\n"
    yield from _section("", schema, definitions)


def _section(key: str, node: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[str]:
    if key:
        yield f"\n{'#' * (2 + key.count('.'))} {_title(key, node)}\n\n{node.get('description', '')}\n"
    yield "| key | value | default | |\n|---|---|---|---|"
    inner: list[tuple[str, Mapping[str, Any]]] = []
    for name, value in node["properties"].items():
        whole = f"{key}.{name}" if key else name
        parts = [definitions[part] for part in _references(value) if "properties" in definitions[part]]
        inner += [(whole, part) for part in parts]
        titles = [_title(whole, part) for part in parts]
        links = " or ".join(f"[{title}](#{slugify(case='lower')(title, '-')})" for title in titles)
        default = "" if parts or "default" not in value else f"`{_literal(value['default'])}`"
        cells = (f"`{name}`", links or _type(value, definitions), default, value.get("description", ""))
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    for whole, part in inner:
        yield from _section(whole, part, definitions)


def _title(key: str, node: Mapping[str, Any]) -> str:
    kind = node["properties"].get("kind", {}).get("const")
    return f"{key} ({kind})" if kind else key


def _references(node: Any) -> Iterator[str]:
    """The names of the types in a part of a schema."""
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].rpartition("/")[2]
        for name in ("anyOf", "oneOf", "items", "additionalProperties"):
            yield from _references(node.get(name))
    elif isinstance(node, list):
        for part in node:
            yield from _references(part)


def _literal(value: Any) -> str:
    """A value as YAML has it, in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()


def _type(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """The values that a part of a schema allows, in words."""
    if "$ref" in node:
        return _type(definitions[node["$ref"].rpartition("/")[2]], definitions)
    if "enum" in node or "const" in node:
        return ", ".join(f"`{_literal(value)}`" for value in node.get("enum", [node.get("const")]))
    if options := node.get("anyOf", node.get("oneOf")):
        return " or ".join(dict.fromkeys(_type(option, definitions) for option in options))
    if node.get("type") == "array":
        if "prefixItems" in node:
            return f"[{', '.join(_type(item, definitions) for item in node['prefixItems'])}]"
        return f"list of {_type(node.get('items', {}), definitions)}"
    if node.get("type") == "object":
        return f"mapping to {_type(node.get('additionalProperties') or {}, definitions)}"
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    ranges = [f"{sign} {node[name]:g}" for name, sign in limits.items() if name in node]
    words = {"string": "text", "boolean": "`true`, `false`", "null": "`null`"}
    return " ".join([words.get(node.get("type", ""), node.get("type", "anything")), *ranges])


def command_reference() -> Iterator[str]:
    """The help of every command."""
    yield "# Commands\n\n`pixloom VERB` and `python -m pipeline.VERB` are the same command.\n"
    with patch.dict("os.environ", COLUMNS="100"), patch.object(sys, "argv", ["pixloom"]):
        for verb in VERBS:
            if verb == "plan":
                yield f"\n## pixloom {verb}\n\n`pixloom {verb}` is the same as `pixloom run --{verb}`."
                continue
            for words in ([verb], *([verb, sub] for sub in SUBCOMMANDS.get(verb, ()))):
                yield f"\n{'#' * (1 + len(words))} pixloom {' '.join(words)}\n\n```text\n{_help(words)}```"


def _help(words: Sequence[str]) -> str:
    text = StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        module(words[0]).parser().parse_args([*words[1:], "--help"])
    return text.getvalue()


def python_reference() -> Iterator[str]:
    """The names that a program may import; mkdocstrings reads their docstrings."""
    yield "# Python\n\nWhat a program may import, and what it takes and returns.\n"
    for task, names in PYTHON.items():
        yield f"\n## {task}\n"
        for name in names:
            yield f"::: {name}\n"


# -- for programs that read ---------------------------------------------------


def on_env(env: Environment, *, config: MkDocsConfig, files: Files) -> Environment:
    """Add llms.txt, the pages with their first paragraphs, and llms-full.txt, their whole text."""
    pages = [file.page for file in files.documentation_pages() if file.page]
    order = re.findall(r"[\w/-]+\.md", str(config.nav))
    pages.sort(key=lambda page: order.index(page.file.src_uri))
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", "", "## Docs", ""]
    for page in pages:
        paragraphs = re.split(r"\n\s*\n", page.markdown or "")
        first = next((" ".join(text.split()) for text in paragraphs if re.match(r"[A-Z`]", text)), "")
        lines.append(f"- [{page.title}]({page.canonical_url or page.url}): {first}")
    texts = {
        "llms.txt": "\n".join(lines),
        "llms-full.txt": "\n\n".join(page.markdown or "" for page in pages),
    }
    for name, text in texts.items():
        files.append(File.generated(config, name, content=text))
    return env
