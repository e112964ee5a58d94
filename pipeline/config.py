"""The whole run's configuration: one section a stage, plus where, how much and how it is tracked.

    pipeline.yaml  ->  extends (deep merge)  ->  --set a.b=c  ->  PipelineConfig, typed and frozen

Everything wrong with it is found here, before any work, and told in one line that names file and dotted key.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, JsonValue, ValidationError, field_validator, model_validator

from stages.augment import AugmentConfig
from stages.base import Config, Resources
from stages.errors import UserError
from stages.evaluate import EvaluateConfig
from stages.infer import InferConfig
from stages.ingest import IngestConfig
from stages.pair import PairConfig
from stages.report import ReportConfig
from stages.shard import ShardConfig
from stages.storage import absolute
from stages.tracking import TrackingConfig
from stages.train import TrainConfig

SECRET_WORDS = ("secret", "token", "password", "passwd", "credential", "access_key", "account_key", "sas")
SECRET_NAMES = ("key", "pass", "auth")


class PipelineConfig(Config):
    """A pipeline run. Sections `resources`, `storage` and `tracking` never change a result."""

    workspace: Annotated[
        str, Field(description="folder of everything the run writes; any fsspec location")
    ] = "workspace"
    storage: Annotated[
        dict[str, dict[str, JsonValue]],
        Field(
            default_factory=dict,
            description="client options by protocol, e.g. s3: {endpoint_url: ...}; never credentials",
        ),
    ]
    resources: Resources = Resources()
    tracking: TrackingConfig = TrackingConfig()
    ingest: IngestConfig
    pair: PairConfig = PairConfig()
    shard: ShardConfig
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig
    infer: InferConfig = InferConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()

    @field_validator("workspace")
    @classmethod
    def _independent_of_the_working_directory(cls, workspace: str) -> str:
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
        self.train.check_data(self.shard, self.augment)
        return self


def load(path: str, overrides: Iterable[str] = ()) -> PipelineConfig:
    """Read a config file and apply `a.b=c` overrides (values are YAML).

    Raises UserError with one line that names the file (or `--set`) and the dotted key.
    """
    values = _read(Path(path), seen=())
    for override in overrides:
        _set(values, override)
    try:
        return PipelineConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {_first(error)}") from error


def schema() -> str:
    """The JSON schema of a config file, for editors."""
    model = PipelineConfig.model_json_schema()
    model["properties"]["extends"] = {
        "type": "string",
        "description": "a config file this one starts from; paths are relative to this file",
    }
    return json.dumps(model, indent=2, sort_keys=True) + "\n"


class _Loader(yaml.SafeLoader):
    """YAML without duplicate keys, which PyYAML would silently drop, and with 2e-4 read as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice in one section", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A file's values, merged over those of the file it extends."""
    if path.resolve() in seen:
        raise UserError(f"{path}: extends: the files extend each other in a circle")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506  a SafeLoader
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: expected sections (`ingest:`, `train:`, ...), found {type(values).__name__}"
        )
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: extends: expected the path of one config file")
    return _merge(_read(path.parent / base, (*seen, path.resolve())), values)


def _merge(base: Any, over: Any) -> Any:
    """`over` on top of `base`: sections are merged, lists and values replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: _merge(base[key], value) if key in base else value for key, value in over.items()}
    return over


def _set(values: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c`; a number in the path is a place in a list."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"--set {override}: expected key=value, e.g. --set train.seed=7")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not valid YAML") from error
    *parents, last = dotted.split(".")
    place: Any = values
    for part in parents:
        if isinstance(place, dict):
            place = place.setdefault(part, {})
            continue
        place = _item(place, part, override)
    if isinstance(place, dict):
        place[last] = value
    else:
        _item(place, last, override)
        place[int(last)] = value


def _item(place: Any, part: str, override: str) -> Any:
    if not isinstance(place, list):
        raise UserError(f"--set {override}: there is no section to set {part} in")
    if not part.isdigit() or int(part) >= len(place):
        raise UserError(f"--set {override}: {part} is not a place in a list of {len(place)}")
    return place[int(part)]


def _first(error: ValidationError) -> str:
    """The first thing wrong, as `dotted.key: what is wrong`, and how many more there are."""
    errors = error.errors(include_url=False)
    first = errors[0]
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "there is no such key"
    elif first["type"] == "missing":
        message = "is required"
    elif not isinstance(first["input"], dict | list) and first["type"] != "value_error":
        message = f"{message}, got {first['input']!r}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return " ".join(f"{key + ': ' if key else ''}{message}{more}".split())


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Every dotted key and its value."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        yield path, value
        if isinstance(value, Mapping):
            yield from _leaves(value, path + ".")
