"""The edge of the program: what is wrong in a config is told in one line that names file and key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline import config as configuration
from stages.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
YAML = str(ROOT / "pipeline.yaml")


def refused(*overrides: str, path: str = YAML) -> str:
    with pytest.raises(UserError) as caught:
        configuration.load(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_config_at_the_top_of_the_repository_loads() -> None:
    config = configuration.load(YAML)
    assert [phase.name for phase in config.train.phases] == ["global", "local", "joint"]
    assert Path(config.workspace).is_absolute()


def test_a_loaded_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        configuration.load(YAML).train.seed = 1  # type: ignore[misc]


def test_set_changes_one_value_in_sections_and_lists() -> None:
    config = configuration.load(YAML, ["train.seed=7", "train.phases.1.epochs=9", "augment.mirror=true"])
    assert (config.train.seed, config.train.phases[1].epochs, config.augment.mirror) == (7, 9, True)


def test_set_reads_a_number_in_scientific_notation_without_a_point() -> None:
    config = configuration.load(YAML, ["train.phases.0.learning_rate=1e-4"])
    assert config.train.phases[0].learning_rate == 1e-4


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("train.sed=1", ("train.sed", "no such key")),
        ("train.phases.0.epochs=-1", ("train.phases.0.epochs", "-1")),
        ("train.phases.0.epochs=many", ("train.phases.0.epochs", "many")),
        ("ingest.locations=[]", ("ingest.locations",)),
        ("pair.max_reject_fraction=2", ("pair.max_reject_fraction",)),
        ("shard.classes=0", ("shard.classes",)),
        ("resources.train_workers=0", ("resources.train_workers",)),
        ("storage.s3.secret=abc", ("storage", "secret", "environment")),
        ("storage.s3.client_kwargs.aws_session_token=abc", ("aws_session_token",)),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_file(override: str, names: tuple[str, ...]) -> None:
    told = refused(override)
    assert told.startswith(f"{YAML}: ")
    for name in names:
        assert name in told


@pytest.mark.parametrize("override", ["train.seed", "=1", "train.phases.9.epochs=1", "train.seed.deep=1"])
def test_a_set_that_leads_nowhere_is_refused(override: str) -> None:
    assert "--set" in refused(override)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("train: {seed: 1}\ntrain: {seed: 2}\n")
    assert "twice.yaml" in refused(path=str(file))
    assert "'train' stands twice" in refused(path=str(file))


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00", "!!python/object/apply:os.system ['true']\n"])
def test_a_file_that_is_no_config_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    assert "odd.yaml" in refused(path=str(file))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "no such config file" in refused(path=str(tmp_path / "none.yaml"))


def test_a_config_extends_another_section_by_section(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: {YAML}\ntrain: {{seed: 5}}\n")
    config, base = configuration.load(str(file)), configuration.load(YAML)
    assert config.train.seed == 5
    assert config.train.phases == base.train.phases


def test_configs_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    assert "circle" in refused(path=str(tmp_path / "a.yaml"))


def test_the_published_schema_is_the_one_the_code_makes() -> None:
    assert (ROOT / "pipeline.schema.json").read_text() == configuration.schema(), "run `make schema`"
    assert json.loads(configuration.schema())["additionalProperties"] is False


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads(recipe: Path) -> None:
    assert configuration.load(str(recipe)).train.phases
