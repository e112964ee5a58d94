"""The edge of the program: what is wrong in a config is one line that names file and key."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline import config as configuration
from pipeline.session import as_yaml
from stages.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
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
        ("resources.train_workers=9", ("train.phases.0.batch", "9")),
        ("storage.s3.secret=abc", ("storage", "secret", "environment")),
        ("storage.s3.client_kwargs.aws_session_token=abc", ("aws_session_token",)),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_file(override: str, names: tuple[str, ...]) -> None:
    messages = refused(override)
    assert messages.startswith(f"{YAML}: ")
    for name in names:
        assert name in messages


def test_a_key_that_is_wrong_by_an_override_says_so_without_the_value() -> None:
    assert refused("trian.seed=3") == f"{YAML}: trian: there is no such key (by --set trian.seed)"
    assert refused("storage.s3.secret=abc").count("abc") == 0


def test_a_misspelt_section_is_named_before_the_one_that_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "misspelt.yaml"
    file.write_text(Path(YAML).read_text().replace("\nshard:", "\nshrad:"))
    assert refused(path=str(file)) == f"{file}: shrad: there is no such key (and 1 more)"


@pytest.mark.parametrize("override", ["train.seed", "=1", "train.phases.9.epochs=1", "train.seed.deep=1"])
def test_a_set_that_leads_nowhere_is_refused(override: str) -> None:
    assert "--set" in refused(override)


@pytest.mark.parametrize("value", ["{key}.png", "{split}/{key}.png", "{key}"])
def test_a_pattern_that_is_not_quoted_is_told_so(tmp_path: Path, value: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"extends: {YAML}\ningest: {{locations: [{{uri: a, role: source, pattern: {value}}}]}}\n")
    for path, settings in ((YAML, [f"ingest.locations.0.pattern={value}"]), (str(file), [])):
        with pytest.raises(UserError, match=re.escape('quote text with {braces}: "{key}.png"')):
            configuration.load(path, settings)
    configuration.load(YAML, ['ingest.locations.0.pattern="{key}.png"'])


def test_variables_in_the_workspace_are_expanded_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    for workspace in ("$HOME/ws", "${HOME}/ws", "~/ws"):
        assert configuration.load(YAML, [f"workspace={workspace}"]).workspace == "/home/me/ws"
    with pytest.raises(UserError, match=r"no environment variable \$NOWHERE"):
        configuration.load(YAML, ["workspace=$NOWHERE/ws"])


LOCATIONS = (
    "workspace",
    "ingest.locations.0.uri",
    "ingest.locations.0.within",
    "ingest.locations.0.inventory",
    "pair.exclude",
    "train.vgg_weights",
    "train.lpips.backbone",
    "train.start_from",
    "infer.input",
    "infer.instance",
    "infer.model",
    "infer.style.picture",
    "evaluate.images",
    "evaluate.lpips.backbone",
    "evaluate.inception.weights",
    "evaluate.segmenter.weights",
    "report.others.pix2pix",
)


@pytest.mark.parametrize("key", LOCATIONS)
@pytest.mark.parametrize("empty", ["", " ", "$EMPTY", "file://"])
def test_an_empty_location_is_not_the_current_folder(
    key: str, empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMPTY", "")
    value = json.dumps([empty] if key.endswith("within") else empty)
    assert f"{key}" in (said := refused(f"{key}={value}"))
    assert "at least 1 character" in said or "an empty location" in said


@pytest.mark.parametrize(
    "workspace",
    ["zip://a::b", "tar://::x.tar", "https://host/x", "simplecache::s3://b/x", "a::b", "github://me:it@/x"],
)
def test_a_workspace_that_takes_no_files_is_refused(workspace: str) -> None:
    assert "workspace: a web server, an archive or a chain takes no files" in refused(
        f"workspace={workspace}"
    )


def test_the_workspace_of_a_config_that_names_none_is_a_folder_here(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    where = "{uri: /a, role: pair, pattern: '{key}.png'}"
    sections = f"ingest: {{locations: [{where}]}}\nshard: {{size: [64, 64]}}\n"
    file.write_text(f"extends: base/pix2pix.yaml\n{sections}")
    assert configuration.load(str(file)).workspace == str(Path("workspace").absolute())


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("train: {seed: 1}\ntrain: {seed: 2}\n")
    assert "twice.yaml" in refused(path=str(file))
    assert "'train' is twice" in refused(path=str(file))


@pytest.mark.parametrize(
    "text",
    [
        *("- a\n- b\n", "a: [", "\x00", "!!python/object/apply:os.system ['true']\n"),
        *("about: {title: 2026-13-45}\n", f"a: {'[' * 5000}", "profile: [1]\n"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    assert "odd.yaml" in refused(path=str(file))


def test_a_value_that_is_no_yaml_is_refused_and_not_shown() -> None:
    for value in ("2001-99-99", "[secret"):
        assert refused(f"about.title={value}") == "--set about.title: the value is not valid YAML"
    assert (
        refused("train.phases.².epochs=secret")
        == "--set train.phases.².epochs: ² is not a place in a list of 3"
    )


def test_sections_may_be_merged_by_an_anchor(tmp_path: Path) -> None:
    file = tmp_path / "merged.yaml"
    file.write_text("one: &base {a: 1, b: 2}\ntwo: {<<: *base, b: 3}\n")
    assert configuration.parse(file)["two"] == {"a": 1, "b": 3}


def test_a_password_in_a_uri_is_in_no_text_of_the_config() -> None:
    config = configuration.load(YAML, ["tracking.uri=http://me:secret@host/x", "about.title=a b@c"])
    text = as_yaml(config)
    assert "uri: http://host/x" in text
    assert "secret" not in text
    assert "a b@c" in text


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


RECIPES = sorted(
    path for name in ("", "pix2pix", "pix2pixhd") for path in (ROOT / "recipes" / name).glob("*.yaml")
)


def profiles(recipe: Path) -> list[str]:
    names = configuration.parse(recipe).get("profiles", {})
    return list(names)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_loads_in_every_profile(recipe: Path) -> None:
    assert len(RECIPES) >= 24
    for profile in [None, *profiles(recipe)]:
        assert configuration.load(str(recipe), profile=profile).train.phases


@pytest.mark.parametrize(
    "setting",
    ["tracking.model=team/street", "tracking.model='a:b'", "tracking.experiment=a/b", "tracking.model=a'b"],
)
def test_a_model_name_that_mlflow_refuses_is_refused_before_training(setting: str) -> None:
    assert re.search(
        r"tracking: MLflow cannot register a model as ['\"](team/street|a:b|a/b|a'b)['\"]", refused(setting)
    )
    assert configuration.load(YAML, ["tracking.experiment=a/b", "tracking.model=b"]).tracking.model == "b"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("target: labels", "kinds.target: networks generate colours, not labels"),
        ("target: instances", "kinds.target: networks generate colours, not instances"),
        ("source: instances", "kinds.source: instances is no kind of this role"),
        ("label: rgb", "kinds.label: rgb is no kind of this role"),
        ("instance: grey16", "kinds.instance: grey16 is no kind of this role"),
    ],
)
def test_a_kind_that_a_role_cannot_have_is_refused_before_anything_runs(kind: str, message: str) -> None:
    assert message in refused(f"shard.kinds={{{kind}}}", "shard.classes=4")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["shard.kinds={source: labels}", "shard.classes=4"], "shard.kinds.source: labels: with pair.derive"),
        (["shard.kinds={target: channels}", "shard.channels=4"], "target: channels: with pair.derive_source"),
        (["shard.kinds={target: lab_ab}", "pair.reverse=true"], "target: lab_ab: with pair.derive_source"),
    ],
)
def test_a_kind_that_no_source_is_derived_to_or_from_is_refused(settings: list[str], message: str) -> None:
    assert message in refused("pair.derive_source=grey", *settings)


PIX2PIX = "train.model={kind: pix2pix, levels: 3, discriminator_layers: 1}"
VGG, LPIPS = "train.vgg_weights=w", "train.lpips={backbone: w}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.losses={l1: 0, gan_weight: 0}"], "train: losses: every weight is 0, so the generator"),
        (
            ["train.losses={perceptual: 1}", VGG, "shard.kinds={target: lab_ab}"],
            "train.losses.perceptual: its network sees 1 or 3 channels, not lab_ab",
        ),
        (
            ["train.losses={lpips: 1}", LPIPS, "shard.kinds={target: channels}", "shard.channels=4"],
            "train.losses.lpips: its network sees 1 or 3 channels, not channels",
        ),
        (
            ["train.losses={lpips: 1}", LPIPS, "shard.size=[24, 24]"],
            "train.losses.lpips: needs images of 31 pixels a side; those of 'whole' are 24x24",
        ),
        (
            ["train.losses={perceptual: 1}", VGG, "shard.size=[8, 24]"],
            "train.losses.perceptual: needs images",
        ),
        (["train.select=ms_ssim"], "train.select: needs images of 176 pixels a side; those of 'whole' are"),
        (
            ["train.select=lpips", "evaluate.lpips={backbone: w}", "shard.size=[24, 24]"],
            "train.select: needs images of 31 pixels a side",
        ),
    ],
)
def test_losses_and_scores_that_the_images_cannot_have_are_refused_before_anything_runs(
    settings: list[str], message: str
) -> None:
    plain = ["shard.kinds={}", "shard.size=[64, 64]", "augment={}", PIX2PIX, "train.phases=null"]
    assert message in refused(*plain, *settings)


# -- keys of earlier versions -------------------------------------------------


def test_a_renamed_key_is_refused_with_its_new_name_wherever_it_is_set(tmp_path: Path) -> None:
    expected = "resources.pairs_at_once: this key is now resources.micro_batch"
    assert refused("resources.pairs_at_once=1") == f"{YAML}: {expected}"
    file = tmp_path / "old.yaml"
    file.write_text(f"extends: {YAML}\nresources: {{pairs_at_once: 1}}\n")
    assert refused(path=str(file)) == f"{file}: {expected}"
    file.write_text(f"extends: {YAML}\nprofile: a\nprofiles: {{a: {{resources: {{pairs_at_once: null}}}}}}\n")
    assert refused(path=str(file)) == f"{file}: {expected}"


@pytest.mark.parametrize("key", configuration.RENAMED)
def test_new_names_exist_and_old_names_do_not(key: str) -> None:
    def exists(dotted: str) -> bool:
        model: Any = configuration.PipelineConfig
        *sections, name = dotted.split(".")
        for section in sections:
            model = model.model_fields[section].annotation
        return name in model.model_fields

    assert exists(configuration.RENAMED[key])
    assert not exists(key)


# -- light: no Ray, no torch --------------------------------------------------

HEAVY = ("ray", "torch", "pyarrow", "numpy", "PIL", "pandas", "mlflow", "fsspec")
WATCH = """
import runpy, sys
sys.argv = ["pipeline.run", *sys.argv[1:]]
try:
    runpy.run_module("pipeline.run", run_name="__main__")
except SystemExit as error:
    code = error.code
ours = [name for name, module in sys.modules.items()
        if name.split(".")[0] in ("pipeline", "stages") and not hasattr(module, "__path__")]
heavy = [name for name in sys.modules if name in {heavy!r}]
sys.stderr.write(f"\\nRESULT {{code}} {{len(ours)}} {{heavy}}\\n")
"""


@pytest.mark.parametrize(
    ("words", "code"), [(["--help"], 0), (["--schema"], 0), (["--set", "trian.seed=1"], 2)], ids=str
)
def test_help_schema_and_a_misspelt_key_import_neither_ray_nor_torch(words: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCH.format(heavy=HEAVY), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    result = re.search(r"RESULT (\d+) (\d+) (.*)", done.stderr)
    assert result is not None, done.stderr
    assert int(result[1]) == code
    assert int(result[2]) <= 16  # 15 to read a YAML, and pipeline.cli
    assert result[3] == "[]"


def test_the_command_as_a_file_says_how_to_start_it() -> None:
    done = subprocess.run(
        [sys.executable, "pipeline/run.py"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "start it as a module, from the repository's folder: python -m pipeline.run"
    ]


PROFILED = """
extends: {base}
train: {{seed: 1}}
profile: small
profiles:
  small: {{train: {{seed: 2, phases: {{1: {{epochs: 9}}}}}}}}
  large: {{}}
"""


def profiled(tmp_path: Path) -> str:
    file = tmp_path / "profiled.yaml"
    file.write_text(PROFILED.format(base=YAML))
    return str(file)


def test_a_profile_is_laid_over_its_file_and_set_over_the_profile(tmp_path: Path) -> None:
    path = profiled(tmp_path)
    assert configuration.load(path, profile="small").train.seed == 2
    assert configuration.load(path, profile="large").train.seed == 1
    assert configuration.load(path, ["train.seed=3"], profile="small").train.seed == 3


def test_the_file_says_which_profile_is_taken_where_none_is_named(tmp_path: Path) -> None:
    assert configuration.load(profiled(tmp_path)).train.seed == 2


def test_a_section_of_numbers_changes_places_of_a_list(tmp_path: Path) -> None:
    changed = configuration.load(profiled(tmp_path)).train.phases
    base = configuration.load(YAML).train.phases
    assert changed == (base[0], base[1].model_copy(update={"epochs": 9}), base[2])


def test_a_place_that_a_list_lacks_is_named(tmp_path: Path) -> None:
    file = tmp_path / "place.yaml"
    file.write_text(f"extends: {YAML}\ntrain: {{phases: {{7: {{epochs: 1}}}}}}\n")
    assert refused(path=str(file)) == f"{file}: 7 is not a place in a list of 3"


def test_a_value_that_an_inherited_profile_replaces_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = tmp_path / "mine.yaml"
    locations = "ingest: {locations: [{uri: a, role: pair}]}"
    mine.write_text(f"extends: base/pix2pix.yaml\n{locations}\nshard: {{size: [512, 512]}}\n")
    assert configuration.load(str(mine)).shard.size == (143, 143)
    (said,) = caplog.messages
    assert "mine.yaml: shard.size: the profile cpu says [143, 143]" in said
    with mine.open("a") as file:
        file.write("profiles: {cpu: {shard: {size: [512, 512]}, augment: {crop: null}}}\n")
    assert configuration.load(str(mine)).shard.size == (512, 512)
    assert len(caplog.messages) == 1


def test_an_unknown_profile_is_refused_with_the_names_of_the_others(tmp_path: Path) -> None:
    path = profiled(tmp_path)
    with pytest.raises(UserError, match=r"--profile big: .*no such profile, there are small, large"):
        configuration.load(path, profile="big")
    with pytest.raises(UserError, match=r"--profile cpu: .*there are none"):
        configuration.load(YAML, profile="cpu")


def test_of_several_files_the_later_extends_the_earlier(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.yaml").write_text(f"train: {{seed: {seed}}}\n")
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: [{YAML}, a.yaml, b.yaml]\n")
    assert configuration.load(str(file)).train.seed == 2


@pytest.mark.parametrize("text", ["extends: {a: b}", "extends: [1]", "profiles: []", "profiles: {cpu: 1}"])
def test_extends_and_profiles_of_another_form_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(f"{text}\n")
    assert text.partition(":")[0] in refused(path=str(file))
