"""The whole run's configuration: one section a stage, plus where, how much and how it is tracked.

    files it extends  <-  the file  <-  one of its profiles  <-  --set a.b=c     ->  PipelineConfig, frozen

Each is merged over the one before: sections are merged, lists and values replaced, and a section whose keys
are numbers changes those items of a list (`phases: {0: {epochs: 5}, 2: null}`; null removes one). Every
mistake is found here, before any work, and reported in one line that names the file and the dotted key.
This module imports neither Ray nor torch, so that a mistake is reported at once.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, cast

import yaml
from pydantic import AfterValidator, Field, JsonValue, ValidationError, field_validator, model_validator

from stages.base import Config, Kind, Resources, Role, absolute
from stages.config.augment import AugmentConfig
from stages.config.evaluate import EvaluateConfig
from stages.config.infer import InferConfig
from stages.config.ingest import IngestConfig
from stages.config.locations import holds, writable
from stages.config.pair import PairConfig
from stages.config.report import ReportConfig
from stages.config.shard import ShardConfig
from stages.config.tracking import ARTIFACTS, TrackingConfig, sqlite_file
from stages.config.train import TrainConfig
from stages.errors import QUOTE, UserError, first_invalid

SECRET_WORDS = ("secret", "token", "password", "passwd", "credential", "access_key", "account_key", "sas")
SECRET_NAMES = ("key", "pass", "auth")

RECIPES = Path(__file__).resolve().parents[1] / "recipes"

RENAMED = {"resources.pairs_at_once": "resources.micro_batch", "infer.colors": "infer.palette"}
"""Keys of earlier versions, which are refused with their new name."""


class About(Config):
    """A description of the run for people: tags of its MLflow run."""

    title: Annotated[str, Field(description="The name of the application or the data set.")] = ""
    source: Annotated[
        tuple[str, ...], Field(description="Where the data set is published: one or more addresses.")
    ] = ()
    licence: Annotated[str, Field(description="The data set's licence, in one line.")] = ""

    def tags(self) -> dict[str, str]:
        """The tags that are not empty."""
        texts = {"title": self.title, "source": " ".join(self.source), "licence": self.licence}
        return {f"pixloom.{name}": text for name, text in texts.items() if text}


class PipelineConfig(Config):
    """A pipeline run. `about`, `resources`, `storage` and `tracking` never change a result."""

    about: Annotated[About, Field(description="A description of the run for people.")] = About()
    workspace: Annotated[
        str,
        AfterValidator(writable),
        Field(description="The folder of everything the run writes; any fsspec URI or a local path."),
    ] = "workspace"
    storage: Annotated[
        dict[str, dict[str, JsonValue]],
        Field(
            default_factory=dict,
            description="Client options by protocol, e.g. s3: {endpoint_url: ...}. Never credentials: these "
            "come from the environment.",
        ),
    ]
    resources: Annotated[Resources, Field(description="How much of the cluster to use.")] = Resources()
    tracking: Annotated[TrackingConfig, Field(description="Where runs are recorded.")] = TrackingConfig()
    ingest: Annotated[IngestConfig, Field(description="Where the images are.")]
    pair: Annotated[PairConfig, Field(description="What makes a pair, and its split.")] = PairConfig()
    shard: Annotated[ShardConfig, Field(description="How images are read and stored.")]
    augment: Annotated[AugmentConfig, Field(description="Random changes to pairs.")] = AugmentConfig()
    train: Annotated[TrainConfig, Field(description="The model, its losses and its phases.")]
    infer: Annotated[InferConfig, Field(description="What to generate.")] = InferConfig()
    evaluate: Annotated[EvaluateConfig, Field(description="What to score.")] = EvaluateConfig()
    report: Annotated[ReportConfig, Field(description="What the page shows.")] = ReportConfig()

    @field_validator("workspace")
    @classmethod
    def _independent_of_the_working_directory(cls, workspace: str) -> str:
        unknown = re.match(r"\$(\w+|\{[^}]*\})", os.path.expandvars(workspace))
        if unknown:
            raise ValueError(f"there is no environment variable {unknown[0]}")
        return absolute(workspace)

    @field_validator("storage")
    @classmethod
    def _holds_no_secret(cls, storage: dict[str, dict[str, JsonValue]]) -> dict[str, dict[str, JsonValue]]:
        for path, _ in _leaves(storage):
            name = path.rpartition(".")[2].lower()
            if name in SECRET_NAMES or any(word in name for word in SECRET_WORDS):
                raise ValueError(f"{path}: no secrets in the config; credentials come from the environment")
        return storage

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Self:
        self._check_workspace()
        self._check_derived()
        self.train.check_data(self.shard, self.augment, self.evaluate)
        self.train.check_resources(self.resources)
        if self.infer.model is None:
            self.infer.check_model(self.train.model.model_dump())
        return self

    def inputs(self) -> dict[str, str]:
        """The locations that a run reads, by the config's key."""
        uris = {f"ingest.locations.{n}.uri": one.uri for n, one in enumerate(self.ingest.locations)}
        others = {"infer.input": self.infer.input, "evaluate.images": self.evaluate.images}
        return uris | {key: uri for key, uri in others.items() if uri}

    def _check_derived(self) -> None:
        """Raise ValueError if the source cannot be derived, or not from such a target."""
        if self.pair.derive_source is None:
            return
        made: tuple[Kind, ...] = ("rgb", "grey", "lab_l")
        given: tuple[Kind, ...] = ("rgb", "grey", "grey16", "lab_ab")
        source, target = (given, made) if self.pair.reverse else (made, given)
        allowed: dict[Role, tuple[Kind, ...]] = {"source": source, "target": target}
        for role, kinds in allowed.items():
            kind = self.shard.kinds.get(role, "rgb")
            if kind not in kinds:
                raise ValueError(
                    f"shard.kinds.{role}: {kind}: with pair.derive_source it is one of {', '.join(kinds)}"
                )

    def _check_workspace(self) -> None:
        """Raise ValueError if an input location would hold the run's own results at its next run."""
        folders = {"workspace": self.workspace}
        database = sqlite_file(self.tracking.place(self.workspace))
        if self.tracking.enabled and database is not None:
            folders["tracking.uri"] = str(database.parent / ARTIFACTS)
        for name, folder in folders.items():
            for key, uri in self.inputs().items():
                if holds(uri, folder):
                    raise ValueError(
                        f"{name}: {folder} is in {key} ({uri}), so results would be read as images; "
                        "name a folder outside of it, or the folder of the images alone"
                    )


def load(path: str, overrides: Iterable[str] = (), profile: str | None = None) -> PipelineConfig:
    """Read a config file, choose a profile (None: the file's own choice), apply `a.b=c` (values are YAML).

    Raises UserError with one line that names the file, the dotted key, and `--set` or `--profile` if by them.
    """
    values, settings = read(path, profile), list(overrides)
    override(values, settings)
    return validated(values, path, settings)


def located(name: str, folder: Path = Path()) -> str:
    """The path of a config file in the folder, else of a recipe: `facades`, `base/pix2pix.yaml`."""
    places = folder / name, RECIPES / name, RECIPES / f"{name}.yaml"
    return str(next((place for place in places if place.is_file()), places[0]))


def read(path: str, profile: str | None = None) -> dict[str, Any]:
    """A config file's values, merged with the files it extends and its profile, not yet checked.

    profile   its name; None: the file's own choice
    """
    values = _read(Path(path), seen=())
    profiles = values.pop("profiles", {})
    default = values.pop("profile", None)
    if not isinstance(profiles, dict) or not all(isinstance(over, dict) for over in profiles.values()):
        raise UserError(f"{path}: profiles: expected sections by the profile's name")
    name = default if profile is None else profile
    if name is None:
        return values
    if isinstance(name, list | dict) or name not in profiles:
        names = f"there are {', '.join(map(str, profiles))}" if profiles else "there are none"
        place = f"{path}: profile" if profile is None else f"--profile {name}: {path}"
        raise UserError(f"{place}: no such profile, {names}")
    stated = {} if RECIPES in Path(path).resolve().parents else dict(_leaves(parse(Path(path))))
    for key, value in _leaves(profiles[name]):
        own = isinstance(value, dict) or f"profiles.{name}.{key}" in stated
        if not own and stated.get(key, value) != value:
            text = "%s: %s: the profile %s says %s, and that counts; write yours below `profiles: {%s: ...}`"
            logging.getLogger(__name__).warning(text, path, key, name, value, name)
    try:
        return cast(dict[str, Any], _merge(values, profiles[name]))
    except LookupError as error:
        raise UserError(f"{path}: profiles.{name}: {error.args[0]}") from None


def override(values: dict[str, Any], overrides: Iterable[str]) -> None:
    """Apply the command line's `a.b=c`, in place."""
    for one in overrides:
        dotted, equals, text = one.partition("=")
        if not equals or not dotted:
            raise UserError(f"--set {one}: expected key=value, e.g. --set train.seed=7")
        try:
            value = yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader
        except BAD_YAML as error:
            raise UserError(f"--set {dotted}: the value is not valid YAML{_advice(error)}") from error
        assign(values, dotted, value, said=f"--set {dotted}")


def validated(values: Mapping[str, Any], path: str, overrides: Sequence[str] = ()) -> PipelineConfig:
    """The typed config. Raises UserError that names the file, a wrong key, and the override that set it.

    It never shows the override's value: one on the command line may be a secret.
    """
    refuse_renamed(values, path)
    try:
        return PipelineConfig.model_validate(values)
    except ValidationError as error:
        text = first_invalid(error)
        key = text.partition(":")[0]
        names = (one.partition("=")[0] for one in overrides)
        by = [name for name in names if f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.")]
        raise UserError(f"{path}: {text}{f' (by --set {by[0]})' if by else ''}") from error


def refuse_renamed(values: Mapping[str, Any], path: str) -> None:
    """Raise UserError with the new name if a key of an earlier version is used."""
    for key, _ in _leaves(values):
        if key in RENAMED:
            raise UserError(f"{path}: {key}: this key is now {RENAMED[key]}")


def schema() -> str:
    """The JSON schema of a config file, for editors."""
    model = PipelineConfig.model_json_schema()
    path = {"type": "string"}
    model["properties"] |= {
        "extends": {
            "anyOf": [path, {"type": "array", "items": path}],
            "description": "Files to start from, relative to this one, or names of recipes; later ones win.",
        },
        "profile": path | {"description": "The profile to use if the command line names none."},
        "profiles": {
            "type": "object",
            "additionalProperties": {"type": "object"},
            "description": "Sections to merge over this file's, by the name that --profile takes.",
        },
    }
    return json.dumps(model, indent=2, sort_keys=True) + "\n"


BAD_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""A date that no calendar has is a ValueError, brackets without end are a RecursionError."""


class _Loader(yaml.SafeLoader):
    """YAML without duplicate keys, of which PyYAML would silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        own = (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge")
        keys = [self.construct_object(key, deep=True) for key in own]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is twice in one section", node.start_mark
                )
        return super().construct_mapping(node, deep)


def parse(path: Path) -> dict[str, Any]:
    """A YAML file's sections. Raises UserError that names the file, in one line."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506  a SafeLoader
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file, nor a recipe (`pixloom recipes` lists them)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except BAD_YAML as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}{_advice(error)}") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: expected sections (`ingest:`, `train:`, ...), found {type(values).__name__}"
        )
    return values


def _advice(error: Exception) -> str:
    """What to do about text that YAML takes for a section: a pattern whose braces are not quoted."""
    mark = getattr(error, "problem_mark", None)
    near = mark.get_snippet() if mark is not None else ""
    return "; " + QUOTE if "{" in (near or "") else ""


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A file's values, merged over those of the file it extends."""
    if path.resolve() in seen:
        raise UserError(f"{path}: extends: the files extend each other in a circle")
    values = parse(path)
    names = values.pop("extends", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: extends: expected the path of a config file, or a list of such paths")
    merged: dict[str, Any] = {}
    try:
        for name in names:
            merged = _merge(merged, _read(Path(located(name, path.parent)), (*seen, path.resolve())))
        return cast(dict[str, Any], _merge(merged, values))
    except LookupError as error:
        raise UserError(f"{path}: {error.args[0]}") from None


def _merge(base: Any, over: Any) -> Any:
    """`base` with the values of `over`: sections are merged, lists and values replaced.

    A section whose keys are numbers changes those items of a list; null removes the item. Raises LookupError
    for an item that does not exist.
    """
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: _merge(base[key], value) if key in base else value for key, value in over.items()}
    if isinstance(base, list) and isinstance(over, dict) and over and all(isinstance(n, int) for n in over):
        if max(over) >= len(base) or min(over) < 0:
            raise LookupError(f"{max(over)} is not a place in a list of {len(base)}")
        merged = [_merge(value, over[n]) if n in over else value for n, value in enumerate(base)]
        return [value for n, value in enumerate(merged) if over.get(n, value) is not None]
    return over


def assign(values: dict[str, Any], dotted: str, value: Any, *, said: str) -> None:
    """Set `a.b` of a config's values, in place. A number is an index in a list; null removes the item.

    Raises UserError that begins with `said`, the text that asks for the change.
    """
    *parents, last = dotted.split(".")
    place: Any = values
    for part in parents:
        if isinstance(place, dict):
            if place.get(part) is None:  # `train: null`, or nothing there yet
                place[part] = {}
            place = place[part]
            continue
        place = _item(place, part, said)
    if isinstance(place, dict):
        place[last] = value
        return
    _item(place, last, said)
    place[int(last) : int(last) + 1] = [] if value is None else [value]


def _item(place: Any, part: str, said: str) -> Any:
    if not isinstance(place, list):
        raise UserError(f"{said}: there is no section to set {part} in")
    if not part.isdecimal() or int(part) >= len(place):
        raise UserError(f"{said}: {part} is not a place in a list of {len(place)}")
    return place[int(part)]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Every dotted key and its value."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        yield path, value
        if isinstance(value, Mapping):
            yield from _leaves(value, path + ".")
