"""What a phase's config and the shards' description say together: network inputs, and settings to compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.config.train import PhaseConfig, Recipe, Size
from stages.models.architecture import InputSpec, Pix2Pix
from stages.shards.dataset import DatasetSpec


def compared(recipe: Recipe, phases: Sequence[PhaseConfig], size: Size) -> dict[str, Any]:
    """The settings that distinguish runs in MLflow's tables and charts: few and flat, the same for every run.

    The artifact `config.yaml` holds all settings. `size`: of the training images.
    """
    model, losses = recipe.model, recipe.losses
    own: dict[str, Any] = (
        {"generator": model.generator, "norm": model.norm, "dropout": model.dropout, "width": model.width}
        if isinstance(model, Pix2Pix)
        else {
            "enhancers": model.enhancers,
            "blocks": model.blocks,
            "feature_encoder": model.feature_encoder,
            "discriminators": model.discriminators,
            "width": model.global_width,
        }
    )
    weights = {"gan": losses.gan_weight, "l1": losses.l1, "feature_matching": losses.feature_matching}
    return {
        "model": model.kind,
        **own,
        "discriminator_layers": model.discriminator_layers,
        "conditional": model.conditional,
        "gan_loss": losses.gan,
        **{f"lambda_{name}": value for name, value in weights.items()},
        "lambda_perceptual": losses.perceptual,
        "size": f"{size[0]}x{size[1]}",
        "epochs": sum(phase.epochs for phase in phases),
        "batch": phases[-1].batch,
        "learning_rate": phases[-1].learning_rate,
        "seed": recipe.seed,
    }


def input_spec(spec: DatasetSpec) -> InputSpec:
    """The shape of the networks' inputs, from the shards' description."""
    source, target = spec.roles["source"], spec.roles["target"]
    labels = source.kind == "labels"
    return InputSpec(
        source="labels" if labels else "image",
        channels=source.channels,
        classes=source.classes if labels else None,
        instances="instance" in spec.roles,
        target_channels=target.channels,
    )
