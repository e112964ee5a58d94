"""Operations are counted as a formula gives them, and as torch dispatches them in a real step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.count_operations import counted
from benchmarks.train_step import CASES
from stages.config.train import PhaseConfig, PhaseJob
from stages.models.architecture import Pix2Pix, Pix2PixHD, paper_weights
from stages.models.build import build_generator
from stages.shards.dataset import DatasetSpec, RoleSpec
from stages.training.operations import image_operations, step_operations

RGB, LABELS = RoleSpec(kind="rgb", encoding="raw"), RoleSpec(kind="labels", encoding="raw", classes=35)
INSTANCES = RoleSpec(kind="instances", encoding="raw")


def test_an_image_takes_the_operations_of_its_convolutions() -> None:
    model = Pix2Pix(levels=4, width=4)
    job = PhaseJob(
        model=model, losses=paper_weights(model), phase=PhaseConfig(name="whole", kind="whole", epochs=1)
    )
    spec = DatasetSpec(size=(32, 16), roles={"source": RGB, "target": RGB}, splits={})
    network = build_generator(model, spec.inputs())
    total = 0

    def add(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
        at = output if isinstance(layer, nn.Conv2d) else inputs[0]  # each of these pixels meets every weight
        total += 2 * layer.weight.numel() * at.shape[2] * at.shape[3]

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_hook(add)
    network(torch.zeros(1, 3, 16, 32))
    assert image_operations(job, spec, (32, 16)) == total


@pytest.mark.parametrize("name", ["unet", "global", "local", "joint"])
def test_a_step_takes_nearly_the_operations_that_are_dispatched(name: str) -> None:
    case = CASES[name]
    layered = isinstance(case.arch, Pix2PixHD)
    kind = ("local" if case.local else "joint") if case.enhancers else "global"
    phase = PhaseConfig(
        name="one",
        kind=kind if layered else "whole",
        epochs=1,
        enhancers=case.enhancers,
        discriminators=case.scales or None,
    )
    job = PhaseJob(model=case.arch, losses=paper_weights(case.arch), phase=phase)
    roles = (
        {"source": LABELS, "target": RGB, "instance": INSTANCES}
        if layered
        else {"source": RGB, "target": RGB}
    )
    dispatched = counted(case, "ours").total()
    assert step_operations(job, DatasetSpec(size=case.size, roles=roles, splits={})) == pytest.approx(
        dispatched * 1e9, rel=0.02
    )
