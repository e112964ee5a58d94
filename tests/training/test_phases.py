"""The train section: defaults as in the papers, senseless lists refused with key and reason, jobs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from pydantic import ValidationError

from stages.base import Resources
from stages.config.augment import AugmentConfig
from stages.config.evaluate import EvaluateConfig
from stages.config.train import PhaseConfig, TrainConfig, check_phases, discriminators, jobs, phase_size
from stages.models.architecture import Pix2Pix, Pix2PixHD


def config(*steps: dict[str, Any], **model: Any) -> TrainConfig:
    named = [{"name": f"p{index}", "epochs": 1, **step} for index, step in enumerate(steps)]
    return TrainConfig.model_validate({"model": {"kind": "pix2pixhd", **model}, "phases": named})


def refused(*steps: dict[str, Any], **model: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        config(*steps, **model)
    return str(caught.value.errors()[0]["msg"])


GLOBAL = {"kind": "global"}
LOCAL = {"kind": "local", "enhancers": 1}
JOINT = {"kind": "joint", "enhancers": 1}


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Pix2Pix(), ["whole"]),
        (Pix2PixHD(enhancers=0), ["global"]),
        (Pix2PixHD(), ["global", "local", "joint"]),
        (Pix2PixHD(enhancers=2), ["global", "local", "joint", "local_2", "joint_2"]),
    ],
)
def test_phases_that_are_left_out_are_the_papers(model: Pix2Pix | Pix2PixHD, names: list[str]) -> None:
    given = TrainConfig.model_validate({"model": model.model_dump()})
    assert [phase.name for phase in given.phases] == names
    assert TrainConfig.model_validate({"model": model, "phases": None}).phases == given.phases
    check_phases(model, given.phases)


def test_losses_that_are_left_out_are_those_of_the_models_paper() -> None:
    pix2pix = TrainConfig.model_validate({"model": {"kind": "pix2pix"}, "losses": {"l1": 10}})
    assert (pix2pix.losses.gan, pix2pix.losses.l1, pix2pix.losses.feature_matching) == ("bce", 10, 0)
    assert config(GLOBAL, enhancers=0).losses.feature_matching == 10


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([LOCAL, JOINT], "phases.0.kind: a local phase refines"),
        ([{**GLOBAL, "enhancers": 1}], "phases.0.enhancers: a global phase trains G1 alone"),
        ([GLOBAL, {**LOCAL, "enhancers": 0}], "phases.1.enhancers: a local phase adds one, expected 1"),
        ([GLOBAL, LOCAL, LOCAL], "phases.2.enhancers: a local phase adds one, expected 2"),
        ([GLOBAL, {**LOCAL, "enhancers": 2}], "phases.1.enhancers: 2, but the model has 1"),
        ([JOINT, GLOBAL], "phases.1.enhancers: 0 after 'p0' with 1"),
        ([GLOBAL], "phases.0.enhancers: the last phase has 0 of the model's 1 enhancers"),
        ([GLOBAL, {**LOCAL, "name": "p0"}, JOINT], "phases.1.name: 'p0' is the name of an earlier phase"),
        ([{"kind": "whole"}], "phases.0.kind: pix2pixhd trains in phases"),
        ([{**GLOBAL, "discriminators": 4}, LOCAL], "phases.0.discriminators: 4, but the model has 3"),
        (
            [{**GLOBAL, "discriminators": 3}, {**LOCAL, "discriminators": 2}],
            "scales stay once they are there",
        ),
        ([{**GLOBAL, "decay_epochs": 2}, LOCAL], "decay_epochs 2 is more than epochs 1"),
        ([], "at least 1 item"),
    ],
)
def test_a_list_of_phases_that_makes_no_sense_is_refused(steps: list[dict[str, Any]], says: str) -> None:
    assert says in refused(*steps)


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (GLOBAL, "pix2pix has no global phase"),
        ({"kind": "whole", "enhancers": 1}, "pix2pix has none"),
        ({"kind": "whole", "discriminators": 2}, "pix2pix has one"),
    ],
)
def test_pix2pix_takes_whole_phases_only(step: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        TrainConfig.model_validate(
            {"model": {"kind": "pix2pix"}, "phases": [{"name": "a", "epochs": 1, **step}]}
        )


def test_a_perceptual_loss_without_its_weights_is_refused() -> None:
    with pytest.raises(ValidationError, match="vgg_weights"):
        TrainConfig.model_validate({"model": {"kind": "pix2pixhd"}, "losses": {"perceptual": 10}})


class Shards:
    def __init__(self, *size: int) -> None:
        self.size = (size[0], size[1])
        self.kinds: Any = {"source": "labels", "target": "rgb"}


def test_images_the_networks_cannot_take_are_refused_with_the_multiple_they_need() -> None:
    given = config(GLOBAL, LOCAL, JOINT)
    given.check_data(Shards(2048, 1024), AugmentConfig(), EvaluateConfig())
    with pytest.raises(ValueError, match=r"train.phases.0: 'p0' cannot take 2048x1000: the height .* of 32"):
        given.check_data(Shards(2048, 1000), AugmentConfig(), EvaluateConfig())
    with pytest.raises(ValueError, match=r"cannot take 40x32.*augment.crop"):
        given.check_data(Shards(2048, 1024), AugmentConfig(crop=(40, 32)), EvaluateConfig())
    with pytest.raises(ValueError, match=r"augment.crop: 64x128 is larger than shard.size, 64x64"):
        given.check_data(Shards(64, 64), AugmentConfig(crop=(64, 128)), EvaluateConfig())


def test_a_discriminator_that_would_see_too_few_pixels_is_refused() -> None:
    given = TrainConfig.model_validate({"model": {"kind": "pix2pix", "levels": 2, "discriminator_layers": 6}})
    with pytest.raises(ValueError, match="too few for 6 layers"):
        given.check_data(Shards(32, 32), AugmentConfig(crop=None), EvaluateConfig())


def test_a_feature_encoder_needs_instances_and_a_labels_source() -> None:
    given, shards = config(GLOBAL, enhancers=0, feature_encoder=True), Shards(64, 64)
    with pytest.raises(ValueError, match="feature_encoder"):
        given.check_data(shards, AugmentConfig(), EvaluateConfig())
    shards.kinds |= {"instance": "instances"}
    given.check_data(shards, AugmentConfig(), EvaluateConfig())
    shards.kinds |= {"source": "rgb"}
    with pytest.raises(ValueError, match=r"feature_encoder: needs shard\.kinds with .*'source': 'labels'"):
        given.check_data(shards, AugmentConfig(), EvaluateConfig())


def test_more_workers_than_a_batch_has_pairs_are_refused() -> None:
    given = config({**GLOBAL, "batch": 2}, enhancers=0)
    given.check_resources(Resources(train_workers=2))
    with pytest.raises(ValueError, match=r"train.phases.0.batch: .* 2 pairs, too few for 3 workers"):
        given.check_resources(Resources(train_workers=3))
    given.check_resources(Resources(train_workers=2, train_workers_min=1))
    with pytest.raises(ValueError, match=r"train_workers_min: 3 is more than train_workers, 2"):
        given.check_resources(Resources(train_workers=2, train_workers_min=3))


def test_a_cuda_graph_is_refused_with_what_it_cannot_record() -> None:
    given = config(GLOBAL, enhancers=0)
    given.check_resources(Resources(cuda_graph=True))
    given.check_resources(Resources(cuda_graph=False, compile=True))
    with pytest.raises(ValueError, match=r"cuda_graph: needs train_workers: 1, compile: false; or set it"):
        given.check_resources(Resources(cuda_graph=True, train_workers=2, compile=True))


def test_a_number_of_workers_that_varies_is_refused_where_batch_norm_depends_on_it() -> None:
    phases = [{"name": "whole", "kind": "whole", "epochs": 1, "batch": 2}]
    for norm, synchronised in (("batch", False), ("batch", True), ("instance", False)):
        model = {"kind": "pix2pix", "norm": norm}
        values = {"model": model, "phases": phases, "synchronised_norms": synchronised}
        given = TrainConfig.model_validate(values)
        given.check_resources(Resources(train_workers=2))
        refuses = given.has_batch_norm and not synchronised
        with pytest.raises(ValueError, match="train_workers_min: batch norm") if refuses else nullcontext():
            given.check_resources(Resources(train_workers=2, train_workers_min=1))


def test_a_phase_works_on_the_size_its_enhancers_stand_for() -> None:
    given = config(GLOBAL, LOCAL, JOINT, {**LOCAL, "enhancers": 2}, enhancers=2)
    sizes = [phase_size(given.model, phase, (2048, 1024)) for phase in given.phases]
    assert sizes == [(512, 256), (1024, 512), (1024, 512), (2048, 1024)]
    assert [discriminators(given.model, phase) for phase in given.phases] == [1, 2, 2, 3]


def test_a_change_to_a_later_phase_leaves_the_job_of_an_earlier_one_alone() -> None:
    first = jobs(config(GLOBAL, LOCAL, JOINT), AugmentConfig())
    second = jobs(config(GLOBAL, LOCAL, {**JOINT, "epochs": 9}), AugmentConfig())
    assert first[:2] == second[:2]
    assert first[2] != second[2]


def test_only_a_local_phase_trains_a_part() -> None:
    kinds = ("global", "local", "joint", "whole")
    made = [PhaseConfig(name="a", kind=kind, epochs=1, enhancers=1) for kind in kinds]
    assert [phase.parts for phase in made] == ["all", "outermost", "all", "all"]
