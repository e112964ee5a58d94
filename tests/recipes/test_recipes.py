"""No recipe can rot: each is parsed, planned in every profile, and trained two steps on data of its kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import learning, results
from pipeline import config as configuration
from pipeline.config import PipelineConfig
from pipeline.dag import steps
from pipeline.runner import plan
from pipeline.sweep.config import load as load_sweep
from pipeline.sweep.trials import make_trials
from stages import evaluate, infer, ingest, pair, shard
from stages.base import Resources
from stages.config.train import jobs
from stages.models.files.saved import load_model
from stages.shards import dataset
from stages.tracking.run import Run
from tests.support.recipes import HEIGHT, WIDTH, draw, picture, tiny

ROOT = Path(__file__).resolve().parents[2]
PROFILES = ("cpu", "paper")
RECIPES = sorted(
    path
    for path in (ROOT / "recipes").rglob("*.yaml")
    if path.parent.name not in ("base", "data", "sweeps") and not path.is_symlink()
)
SWEEPS = sorted((ROOT / "recipes" / "sweeps").glob("*.yaml"))

Prepare = Callable[[PipelineConfig], str]

every_recipe = pytest.mark.parametrize(
    "recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes").with_suffix(""))
)
every_profile = pytest.mark.parametrize("profile", PROFILES)
every_sweep = pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)


def named(name: str, profile: str) -> PipelineConfig:
    return configuration.load(str(ROOT / "recipes" / f"{name}.yaml"), profile=profile)


# -- what they say ------------------------------------------------------------


@every_profile
@every_recipe
def test_a_recipe_loads_and_says_where_its_data_is_from(recipe: Path, profile: str) -> None:
    config = configuration.load(str(recipe), profile=profile)
    assert config.about.title
    assert config.about.licence
    assert all(source.startswith(("http://", "https://")) for source in config.about.source)
    assert config.about.source
    assert config.infer.split == config.evaluate.split


@every_recipe
def test_the_cpu_profile_is_the_one_taken_where_none_is_named(recipe: Path) -> None:
    assert configuration.load(str(recipe)) == configuration.load(str(recipe), profile="cpu")


@every_recipe
def test_the_cpu_profile_changes_size_and_effort_but_not_the_task(recipe: Path) -> None:
    cpu, paper = (configuration.load(str(recipe), profile=profile) for profile in PROFILES)
    assert cpu.shard.size[0] * cpu.shard.size[1] < paper.shard.size[0] * paper.shard.size[1]
    assert (cpu.shard.kinds, cpu.shard.classes) == (paper.shard.kinds, paper.shard.classes)
    assert (cpu.pair, cpu.train.model.kind) == (paper.pair, paper.train.model.kind)
    assert [place.role for place in cpu.ingest.locations] == [place.role for place in paper.ingest.locations]


PAPER = {  # recipe: epochs, batch, jitter, mirror (Isola et al. 2017, section 6.2)
    "cityscapes": (200, 1, True, True),
    "facades": (200, 1, True, True),
    "maps-to-aerial": (200, 1, True, True),
    "aerial-to-maps": (200, 1, True, True),
    "colorization": (6, 4, False, True),
    "edges-to-shoes": (15, 4, False, False),
    "edges-to-handbags": (15, 4, False, False),
    "sketch-to-shoes": (15, 4, False, False),
    "day-to-night": (17, 4, True, True),
    "thermal-to-colour": (10, 4, False, False),
    "inpainting": (25, 4, False, False),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_profile_of_pix2pix_has_the_papers_settings(name: str) -> None:
    config = named(f"pix2pix/{name}", "paper")
    epochs, batch, jitter, mirror = PAPER[name]
    (phase,) = config.train.phases
    assert (phase.epochs, phase.batch, phase.decay_epochs, phase.learning_rate) == (epochs, batch, 0, 2e-4)
    assert (config.shard.size, config.augment.crop) == (
        ((286, 286), (256, 256)) if jitter else ((256, 256), None)
    )
    assert config.augment.mirror is mirror
    assert (config.train.losses.l1, config.train.losses.gan) == (100, "bce")
    assert config.infer.stochastic


@pytest.mark.parametrize(
    ("name", "size", "names"),
    [
        ("1024", (1024, 512), ["global"]),
        ("2048", (2048, 1024), ["global", "local", "joint"]),
        ("4096", (4096, 2048), ["global", "local", "joint", "local_2", "joint_2"]),
    ],
)
def test_cityscapes_grows_by_enhancers_with_and_without_features(
    name: str, size: tuple[int, int], names: list[str]
) -> None:
    plain = named(f"pix2pixhd/cityscapes-{name}", "paper")
    features = named(f"pix2pixhd/cityscapes-{name}-features", "paper")
    assert plain.shard.size == size
    assert [phase.name for phase in plain.train.phases] == names
    assert plain.train.losses.feature_matching == 10
    changed = {"train": {"model": {"feature_encoder": True}}}
    written = plain.model_dump(mode="json")
    written["train"]["model"] |= changed["train"]["model"]
    assert features.model_dump(mode="json") == written


def test_aerial_photos_to_maps_is_maps_to_aerial_photos_reversed() -> None:
    for model in ("pix2pix", "pix2pixhd"):
        there, back = (named(f"{model}/{name}", "paper") for name in ("maps-to-aerial", "aerial-to-maps"))
        assert there.ingest == back.ingest
        assert (there.pair.source_half, back.pair.source_half) == ("right", "left")


def test_sketches_are_painted_by_the_model_that_edges_trained() -> None:
    edges, sketches = (named(f"pix2pix/{name}", "cpu") for name in ("edges-to-shoes", "sketch-to-shoes"))
    assert edges.workspace == sketches.workspace
    assert edges.train == sketches.train
    assert edges.infer != sketches.infer


@every_sweep
@every_profile
def test_every_trial_of_a_sweep_is_a_valid_config_of_its_own(path: Path, profile: str) -> None:
    wanted = load_sweep(str(path)).model_copy(update={"profile": profile})
    trials = make_trials(
        wanted, str(path), str(path.parent / wanted.recipe), ["train.vgg_weights=vgg.safetensors"]
    )
    jobs = [trial.config.train.model_dump_json() for trial in trials]
    assert len(set(jobs)) == len(jobs) > 1
    assert len({trial.name for trial in trials}) == len(trials)
    assert {trial.config.evaluate.split for trial in trials} == {"val"}


# -- data of their kind -------------------------------------------------------


def small(recipe: Path, profile: str) -> PipelineConfig:
    """The recipe with networks, images and phases as small as can be; roles, kinds and parts as they are."""
    return configuration.load(
        str(recipe), tiny(configuration.load(str(recipe), profile=profile)), profile=profile
    )


def placed(config: PipelineConfig, folder: Path) -> PipelineConfig:
    """The config reading what `draw` wrote, and writing beside it."""
    written = config.model_dump(mode="json")
    for index, location in enumerate(written["ingest"]["locations"]):
        location["uri"] = str(folder / "data" / f"{index}-{location['role']}")
    if config.infer.input:
        written["infer"]["input"] = str(folder / "data" / "input")
    here = configuration.validated(written | {"workspace": str(folder / "workspace")}, "small")
    draw(here)
    return here


@every_profile
@every_recipe
def test_a_recipe_plans(recipe: Path, profile: str, tmp_path: Path) -> None:
    config = placed(configuration.load(str(recipe), profile=profile), tmp_path)
    planned = plan(steps(config), config.workspace)
    wanted = [f"train-{phase.name}" for phase in config.train.phases]
    assert [p.step.name for p in planned] == [
        "ingest", "pair", "shard", *wanted, "infer", "evaluate", "report"
    ]  # fmt: skip
    assert not any(p.done for p in planned)


@pytest.mark.parametrize("name", results.RUNS)
def test_a_run_on_real_data_is_a_recipe_with_settings(name: str, tmp_path: Path) -> None:
    run = results.RUNS[name]
    for split in run.splits:
        values = results.settings(run, name, split, tmp_path / "data", tmp_path / "results")
        config = configuration.load(str(ROOT / run.recipe), values)
        assert (config.infer.split, config.evaluate.split) == (split, split)
        assert config.workspace == str(tmp_path / "results" / name)
        assert all(
            place.uri.startswith((str(tmp_path / "data"), str(tmp_path / "results" / "photos")))
            for place in config.ingest.locations
        )


def test_generated_images_are_drawn_as_one_grid(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(5):
        picture("rgb", "target", number, 2).save(tmp_path / "images" / f"{number}.png")
    results.grid(str(tmp_path), tmp_path / "grid.jpg")
    with Image.open(tmp_path / "grid.jpg") as grid:
        assert grid.size == (4 * WIDTH + 5 * 4, 2 * HEIGHT + 3 * 4)  # four columns, with gaps


# -- two steps of each --------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[PipelineConfig], str]:
    """The shards of a recipe, made once for all recipes whose data are prepared alike."""
    made: dict[str, str] = {}

    def prepare(config: PipelineConfig) -> str:
        sections = (config.ingest, config.pair, config.shard)
        key = str(config.infer.split) + "".join(section.model_dump_json() for section in sections)
        if key not in made:
            folder = tmp_path_factory.mktemp("recipe")
            here, track, resources = placed(config, folder), Run(), Resources(io_threads=2)
            objects, pairs, shards = (str(folder / name) for name in ("objects", "pairs", "shards"))
            ingest.run(here.ingest, resources, output=objects, track=track)
            pair.run(here.pair, resources, output=pairs, track=track, objects=objects)
            shard.run(here.shard, resources, output=shards, track=track, pairs=pairs)
            made[key] = shards
        return made[key]

    return prepare


@pytest.mark.long
@pytest.mark.ray
@every_recipe
def test_a_recipe_trains_two_steps_a_phase_and_generates(
    recipe: Path, prepared: Prepare, tmp_path: Path
) -> None:
    config = small(recipe, "paper")
    shards = prepared(config)
    spec = dataset.load(shards)
    model, num_steps = learning.trained(jobs(config.train, config.augment), shards, tmp_path)
    assert num_steps >= 2 * len(config.train.phases)
    split = spec.scored_split(config.infer.split, "infer.split")
    samples = list(dataset.read_split(shards, spec, split))
    images = learning.translated(load_model(model), samples, stochastic=config.infer.stochastic)
    assert len(images) == spec.rows(split) > 0
    for image in images:
        assert image.shape == (spec.size[1], spec.size[0], spec.roles["target"].channels)


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.parametrize("name", ["pix2pix/colorization", "pix2pixhd/cityscapes-1024-features"])
def test_what_a_recipe_trained_generates_and_is_scored(name: str, prepared: Prepare, tmp_path: Path) -> None:
    config = small(ROOT / "recipes" / f"{name}.yaml", "cpu")
    shards = prepared(config)
    model, _ = learning.trained(jobs(config.train, config.augment), shards, tmp_path)
    resources = Resources(io_threads=2, infer_actors=1)
    images, scores = (str(tmp_path / folder) for folder in ("images", "scores"))
    infer.run(config.infer, resources, output=images, track=Run(), model=str(model), shards=shards)
    outcome = evaluate.run(
        config.evaluate, resources, output=scores, track=Run(), shards=shards, images=images
    )
    spec = dataset.load(shards)
    rows = spec.rows(spec.scored_split(config.evaluate.split, "evaluate.split"))
    assert outcome.counts == {"images": rows, "missing": 0}
    assert 0 <= outcome.metrics["l1"] <= 1
