"""Measure the code's shape against the limits it is held to; exit 1 if one is exceeded.

    python -m benchmarks.house

What a reader has to follow is the import closure of a module: every module of ours that it imports, directly
or not. Imports for type checkers alone and packages whose `__init__` is only a docstring do not count.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "stages")
WATCHED = (*PACKAGES, "benchmarks", "chaos", "cluster")
"""Folders whose code uses Ray by its public names alone."""
PRIVATE_IN_STRING = re.compile(r"ray(\.\w+)*\._\w+(\.\w+)*")
RAY_WORK = re.compile(r"ray\.(remote|data)\b")
MODELS_MAY_IMPORT = {"numpy", "pydantic", "safetensors", "stages", "torch", *sys.stdlib_module_names}
HEAVY = ("PIL", "mlflow", "numpy", "pandas", "pyarrow", "ray", "torch")


@dataclass(frozen=True)
class Module:
    """A module of ours: its file, its lines, its classes, and the modules that it names in imports."""

    path: Path
    lines: int
    classes: tuple[str, ...]
    imports: frozenset[str]
    only_docstring: bool


@dataclass(frozen=True)
class Figure:
    """A measured number, the most it may be, and the goal where that is still above it."""

    name: str
    value: int
    most: int
    detail: str = ""
    goal: int | None = None

    @property
    def holds(self) -> bool:
        return self.value <= self.most


def read_modules(root: Path) -> dict[str, Module]:
    """Every module below `root` that is in one of `PACKAGES`, by its dotted name."""
    modules = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
            modules[name] = Module(
                path=path,
                lines=len(text.splitlines()),
                classes=tuple(node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)),
                imports=frozenset(imported_names(tree)),
                only_docstring=all(
                    isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in tree.body
                ),
            )
    return modules


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names that code imports: of `from a import b` both `a` and `a.b`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.orelse:
                yield from imported_names(ast.Module([statement], []))
        else:
            yield from imported_names(node)


def closure(modules: Mapping[str, Module], start: str) -> dict[str, Module]:
    """The module and all modules of ours that it imports, directly or not, without docstring packages."""
    waiting, seen = [start], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in modules:
            continue
        seen.add(name)
        waiting += modules[name].imports
        waiting.append(name.rpartition(".")[0])  # Python runs a package before its modules
    return {name: modules[name] for name in sorted(seen) if not modules[name].only_docstring}


def packages_of(modules: Mapping[str, Module]) -> set[str]:
    """Top-level names of everything that these modules import."""
    return {name.partition(".")[0] for module in modules.values() for name in module.imports}


def repeated_classes(modules: Mapping[str, Module]) -> dict[str, list[str]]:
    """Class names that more than one definition has, with the modules."""
    places: dict[str, list[str]] = defaultdict(list)
    for name, module in modules.items():
        for one in module.classes:
            places[one].append(name)
    return {name: found for name, found in sorted(places.items()) if len(found) > 1}


def private_names_of_ray(root: Path) -> list[str]:
    """What code imports, reads, overrides or names in a string and is private in Ray, as `file:line: name`.

    An attribute counts if it is read from something that was imported from Ray, or from a call of it.
    """
    found = []
    for path in sorted(path for folder in WATCHED for path in (root / folder).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imports = [(node, name) for node in nodes for name in _names_of_ray(node)]
        local = {name for node, _ in imports for name in _bound_names(node)}
        uses = [(node, name) for node, name in imports if any(map(_is_private, name.split(".")))]
        for node in nodes:
            if isinstance(node, ast.Attribute) and _is_private(node.attr) and _root(node) in local:
                uses.append((node, ast.unparse(node)))
            elif isinstance(node, ast.ClassDef) and any(_root(base) in local for base in node.bases):
                for one in node.body:
                    if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) and _is_private(one.name):
                        uses.append((one, f"{node.name}.{one.name}"))
            elif isinstance(node, ast.Constant) and PRIVATE_IN_STRING.fullmatch(str(node.value)):
                uses.append((node, node.value))
        found += [f"{path.relative_to(root)}:{node.lineno}: {name}" for node, name in uses]  # type: ignore[attr-defined]
    return found


def ray_work_elsewhere(root: Path) -> list[str]:
    """Where code outside `stages/parallel` names `ray.remote` or `ray.data`, as `file:line: name`."""
    found = []
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        if root / "stages" / "parallel" in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [ast.unparse(node)] if isinstance(node, ast.Attribute) else _names_of_ray(node)
            found += [
                f"{path.relative_to(root)}:{node.lineno}: {name}"  # type: ignore[attr-defined]
                for name in names
                if RAY_WORK.match(name)
            ]
    return found


def _names_of_ray(node: ast.AST) -> list[str]:
    """Dotted names that an import statement takes from Ray."""
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in names if name.partition(".")[0] == "ray"]


def _bound_names(node: ast.AST) -> list[str]:
    """The names that an import statement defines in its module."""
    assert isinstance(node, ast.Import | ast.ImportFrom)
    return [alias.asname or alias.name.partition(".")[0] for alias in node.names]


def _root(node: ast.AST) -> str:
    """The name that an expression of attributes, calls and subscripts begins with, or ""."""
    while not isinstance(node, ast.Name):
        match node:
            case ast.Attribute(value=inner) | ast.Subscript(value=inner) | ast.Call(func=inner):
                node = inner
            case _:
                return ""
    return node.id


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def lines_of(modules: Mapping[str, Module], prefix: str = "") -> int:
    """Lines of the modules whose names begin so."""
    return sum(module.lines for name, module in modules.items() if name.startswith(prefix))


def figures(root: Path = ROOT) -> tuple[Figure, ...]:
    """Every number with its limit."""
    modules = read_modules(root)
    train, config = closure(modules, "stages.train"), closure(modules, "pipeline.config")
    loose = [path.stem for path in (root / "stages").glob("*.py") if path.stem != "__init__"]
    heavy = sorted(packages_of(config) & set(HEAVY))
    models = {name: module for name, module in modules.items() if name.startswith("stages.models")}
    foreign = sorted(packages_of(models) - MODELS_MAY_IMPORT)
    repeated, private = repeated_classes(modules), private_names_of_ray(root)
    work = ray_work_elsewhere(root)
    return (
        Figure("loose modules in stages/", len(loose), 11),
        Figure("modules to follow stages/train.py", len(train), 63, goal=28),
        Figure("lines to follow stages/train.py", lines_of(train), 11_371, goal=6_500),
        Figure("modules imported to read a YAML", len(config), 14),
        Figure("heavy packages imported to read a YAML", len(heavy), 0, ", ".join(heavy)),
        Figure(
            "class names that exist twice",
            len(repeated),
            0,
            "; ".join(f"{name} in {', '.join(places)}" for name, places in repeated.items()),
        ),
        Figure("lines of pipeline/ and stages/", lines_of(modules), 27_419, goal=18_000),
        Figure("packages foreign to stages/models/", len(foreign), 0, ", ".join(foreign)),
        Figure("private names of Ray", len(private), 0, "; ".join(private)),
        Figure("ray.remote, ray.data elsewhere", len(work), 0, "; ".join(work)),
        Figure("lines of stages/models/step.py", lines_of(modules, "stages.models.step"), 459),
        Figure("lines of stages/tracking/", lines_of(modules, "stages.tracking"), 1_057, goal=549),
    )


def main() -> int:
    """Print the table. Returns 1 if a limit is exceeded."""
    measured = figures()
    for one in measured:
        mark = "" if one.holds else "  TOO MANY" + (f": {one.detail}" if one.detail else "")
        goal = "" if one.goal is None else f"  (goal {one.goal:,})"
        print(f"{one.name:<40} {one.value:>7,} of {one.most:>6,}{goal}{mark}")
    return 0 if all(one.holds for one in measured) else 1


if __name__ == "__main__":
    sys.exit(main())
