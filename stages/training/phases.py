"""What training is told: the model, its losses, and the phases it goes through; and whether that makes sense.

    global    G1 alone, at a fraction of the size               (Wang et al. 2018, section 3.1)
    local     a new enhancer around it, everything inside frozen
    joint     all of it
    whole     a model without enhancers (pix2pix)

A phase with k of the model's N enhancers works on images of 1/2^(N-k) of the full size. Each phase is one
`PhaseJob`: all that changes its result and nothing of the phases after it, so that a change to the last
phase does not train the first one again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import Field, model_validator

from stages.base import Config, Kind, Resources, Role
from stages.images.augment import AugmentConfig
from stages.models.architecture import Architecture, InputSpec, Parts, Pix2Pix, Pix2PixHD, size_multiple
from stages.models.gan import Precision
from stages.models.losses import LossWeights, paper_weights
from stages.shards.dataset import DatasetSpec

PhaseKind = Literal["global", "local", "joint", "whole"]
Size = tuple[int, int]


class PhaseConfig(Config):
    """One phase. Its resolution follows from its enhancers."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    kind: PhaseKind
    enhancers: Annotated[int, Field(ge=0, le=4, description="how many of the model's enhancers it has")] = 0
    epochs: Annotated[int, Field(ge=1, description="in all, decay included")]
    decay_epochs: Annotated[
        int, Field(ge=0, description="the last epochs, over which the rate falls to 0")
    ] = 0
    batch: Annotated[int, Field(ge=1, description="pairs per step, over all workers")] = 1
    learning_rate: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 2e-4
    discriminators: Annotated[
        int | None, Field(ge=1, le=5, description="scales; null: one less per missing enhancer")
    ] = None

    @model_validator(mode="after")
    def _decays_within_its_epochs(self) -> Self:
        if self.decay_epochs > self.epochs:
            raise ValueError(f"decay_epochs {self.decay_epochs} is more than epochs {self.epochs}")
        return self

    @property
    def parts(self) -> Parts:
        """What of the generator it trains."""
        return "outermost" if self.kind == "local" else "all"


class OptimizerConfig(Config):
    """Adam, for both networks. The rate is each phase's own."""

    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field()
    ] = (0.5, 0.999)


class Recipe(Config):
    """What all phases share."""

    model: Architecture
    losses: Annotated[LossWeights, Field(description="what is left out is as in the model's paper")]
    vgg_weights: Annotated[
        str | None, Field(description="location of VGG19's weights, for the perceptual loss")
    ] = None
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: Annotated[
        float | None, Field(ge=0, lt=1, description="keep a moving average of the weights with this decay")
    ] = None
    precision: Annotated[
        Precision | None,
        Field(description="null: bf16 where the workers have matrix units for it, float32 elsewhere"),
    ] = None
    synchronised_norms: Annotated[
        bool,
        Field(description="batch norm over the pairs of all workers, not of each; instance norm: no use"),
    ] = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    log_every: Annotated[int, Field(ge=1, description="steps between two points of a curve")] = 10

    @model_validator(mode="before")
    @classmethod
    def _losses_as_in_the_paper(cls, values: Any) -> Any:
        """Losses that are left out take the value of the model's own paper, not of the other's."""
        if not isinstance(values, Mapping):
            return values
        model, losses = values.get("model"), values.get("losses") or {}
        kind = model.get("kind") if isinstance(model, Mapping) else getattr(model, "kind", None)
        if kind not in ("pix2pix", "pix2pixhd") or not isinstance(losses, Mapping):
            return values
        paper = paper_weights(Pix2Pix() if kind == "pix2pix" else Pix2PixHD())
        return {**values, "losses": {**paper.model_dump(), **losses}}

    @model_validator(mode="after")
    def _perceptual_loss_has_its_network(self) -> Self:
        if self.losses.perceptual > 0 and not self.vgg_weights:
            raise ValueError("losses.perceptual: needs vgg_weights, the location of VGG19's weights")
        return self


class PhaseJob(Recipe):
    """One phase with everything that changes its result: the config of one step of the pipeline."""

    augment: AugmentConfig = AugmentConfig()
    phase: PhaseConfig


def _default_phases(data: dict[str, Any]) -> tuple[PhaseConfig, ...]:
    """The phases of a config that names none; `data` holds what was read before them."""
    return default_phases(data["model"]) if "model" in data else ()


class TrainConfig(Recipe):
    """The train section of the config."""

    phases: Annotated[
        tuple[PhaseConfig, ...],
        Field(min_length=1, default_factory=_default_phases, description="in order; null: as in the paper"),
    ]

    @model_validator(mode="before")
    @classmethod
    def _null_phases_are_the_default(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("phases", 0) is None:
            return {name: value for name, value in values.items() if name != "phases"}
        return values

    @model_validator(mode="after")
    def _phases_make_sense(self) -> Self:
        check_phases(self.model, self.phases)
        return self

    def check_data(self, shard: ShardLike, augment: AugmentConfig) -> None:
        """Raises ValueError, naming the key, where the networks cannot take the shards' images."""
        if "instance" not in shard.kinds and isinstance(self.model, Pix2PixHD) and self.model.feature_encoder:
            raise ValueError("train.model.feature_encoder: needs instance maps, shard.kinds has none")
        full = full_size(shard.size, augment)
        if full[0] > shard.size[0] or full[1] > shard.size[1]:
            raise ValueError(
                f"augment.crop: {full[0]}x{full[1]} is larger than shard.size, "
                f"{shard.size[0]}x{shard.size[1]}"
            )
        for index, phase in enumerate(self.phases):
            check_size(self.model, phase, full, key=f"train.phases.{index}")

    def check_resources(self, resources: Resources) -> None:
        """Raises ValueError where workers would have nothing to do, or could not do it together."""
        if self.synchronised_norms and resources.pairs_at_once is not None:
            raise ValueError(
                "resources.pairs_at_once: turns would be batches of their own to train.synchronised_norms"
            )
        for index, phase in enumerate(self.phases):
            check_workers(phase, resources, key=f"train.phases.{index}")


class ShardLike(Protocol):
    """What matters here of the shard stage's config."""

    @property
    def size(self) -> Size:
        """Width and height that training loads."""

    @property
    def kinds(self) -> Mapping[Role, Kind]:
        """Roles and how they are read."""


def jobs(config: TrainConfig, augment: AugmentConfig) -> tuple[PhaseJob, ...]:
    """The phases as steps of the pipeline."""
    shared = {name: getattr(config, name) for name in Recipe.model_fields}
    return tuple(PhaseJob(**shared, augment=augment, phase=phase) for phase in config.phases)


def compared(recipe: Recipe, phases: Sequence[PhaseConfig], size: Size) -> dict[str, Any]:
    """The settings by which runs are told apart in MLflow's tables and charts: few, flat, of every run.

    `config.yaml` beside them holds them all. `size`: of the images trained on.
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
        "precision": recipe.precision,
        "seed": recipe.seed,
    }


def default_phases(model: Pix2Pix | Pix2PixHD) -> tuple[PhaseConfig, ...]:
    """The phases of the papers: 100 epochs at a constant rate, 100 of linear decay; 10 for a new enhancer."""
    if isinstance(model, Pix2Pix):
        return (PhaseConfig(name="whole", kind="whole", epochs=200, decay_epochs=100),)
    phases = [PhaseConfig(name="global", kind="global", epochs=200, decay_epochs=100)]
    for enhancers in range(1, model.enhancers + 1):
        suffix = "" if enhancers == 1 else f"_{enhancers}"
        phases += [
            PhaseConfig(name=f"local{suffix}", kind="local", enhancers=enhancers, epochs=10),
            PhaseConfig(
                name=f"joint{suffix}", kind="joint", enhancers=enhancers, epochs=200, decay_epochs=100
            ),
        ]
    return tuple(phases)


def downscale(model: Pix2Pix | Pix2PixHD, phase: PhaseConfig) -> int:
    """How many times smaller than the full images a phase's are, on each side."""
    return 1 if isinstance(model, Pix2Pix) else 2 ** (model.enhancers - phase.enhancers)


def discriminators(model: Pix2Pix | Pix2PixHD, phase: PhaseConfig) -> int:
    """Number of discriminator scales of a phase: coarser images are judged at fewer."""
    if isinstance(model, Pix2Pix):
        return 1
    return phase.discriminators or max(1, model.discriminators - (model.enhancers - phase.enhancers))


def full_size(load: Size, augment: AugmentConfig) -> Size:
    """Width and height of the images training sees at full resolution."""
    return augment.crop or load


def phase_size(model: Pix2Pix | Pix2PixHD, phase: PhaseConfig, full: Size) -> Size:
    """Width and height of a phase's images."""
    scale = downscale(model, phase)
    return full[0] // scale, full[1] // scale


def input_spec(spec: DatasetSpec) -> InputSpec:
    """What the networks are given, by the shards' description."""
    source, target = spec.roles["source"], spec.roles["target"]
    labels = source.kind == "labels"
    return InputSpec(
        source="labels" if labels else "image",
        channels=source.channels,
        classes=source.classes if labels else None,
        instances="instance" in spec.roles,
        target_channels=target.channels,
    )


# -- checks -------------------------------------------------------------------


def check_phases(model: Pix2Pix | Pix2PixHD, phases: tuple[PhaseConfig, ...]) -> None:
    """Raises ValueError, naming phase and key, for a list of phases that makes no sense."""
    names = [phase.name for phase in phases]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ValueError(f"phases.{index}.name: '{name}' is the name of an earlier phase too")
    before: PhaseConfig | None = None
    for index, phase in enumerate(phases):
        problem = (
            _wrong_in_pix2pix(phase)
            if isinstance(model, Pix2Pix)
            else _wrong_in_pix2pixhd(model, phase, before)
        )
        if problem:
            raise ValueError(f"phases.{index}.{problem}")
        before = phase
    if isinstance(model, Pix2PixHD) and phases and phases[-1].enhancers < model.enhancers:
        raise ValueError(
            f"phases.{len(phases) - 1}.enhancers: the last phase has {phases[-1].enhancers} of the model's "
            f"{model.enhancers} enhancers, so full size is never trained; add phases or lower model.enhancers"
        )


def _wrong_in_pix2pix(phase: PhaseConfig) -> str:
    if phase.kind != "whole":
        return f"kind: pix2pix has no {phase.kind} phase, only `whole`"
    if phase.enhancers:
        return f"enhancers: pix2pix has none, got {phase.enhancers}"
    if phase.discriminators not in (None, 1):
        return f"discriminators: pix2pix has one, got {phase.discriminators}"
    return ""


def _wrong_in_pix2pixhd(model: Pix2PixHD, phase: PhaseConfig, before: PhaseConfig | None) -> str:
    """What is wrong with a phase after the one before it, as `key: reason`; "" if nothing is."""
    had = before.enhancers if before else 0
    after = f"after '{before.name}' with {had}" if before else "in the first phase"
    if phase.enhancers > model.enhancers:
        return f"enhancers: {phase.enhancers}, but the model has {model.enhancers}"
    match phase.kind:
        case "whole":
            return "kind: pix2pixhd trains in phases `global`, `local` and `joint`"
        case "global" if phase.enhancers:
            return f"enhancers: a global phase trains G1 alone, got {phase.enhancers}"
        case "local" if before is None:
            return "kind: a local phase refines what an earlier phase trained; begin with a global one"
        case "local" if phase.enhancers != had + 1:
            return f"enhancers: a local phase adds one, expected {had + 1} {after}, got {phase.enhancers}"
    if phase.enhancers < had:
        return f"enhancers: {phase.enhancers} {after}: enhancers stay once they are there; order the phases"
    scales = discriminators(model, phase)
    if scales > model.discriminators:
        return f"discriminators: {scales}, but the model has {model.discriminators}"
    if before and scales < discriminators(model, before):
        return (
            f"discriminators: {scales} after '{before.name}' with {discriminators(model, before)}: "
            "scales stay once they are there"
        )
    return ""


def check_size(model: Pix2Pix | Pix2PixHD, phase: PhaseConfig, full: Size, *, key: str) -> None:
    """Raises ValueError where a phase's networks cannot take its images. `full`: the last one's size."""
    scale = downscale(model, phase)
    multiple, minimum = size_multiple(model, enhancers=phase.enhancers)
    for side, name in zip(full, ("width", "height"), strict=True):
        if side % (multiple * scale) or side < minimum * scale:
            raise ValueError(
                f"{key}: '{phase.name}' cannot take {full[0]}x{full[1]}: the {name} must be a multiple of "
                f"{multiple * scale} and no less than {minimum * scale}; change augment.crop or shard.size"
            )
    layers, scales = model.discriminator_layers, discriminators(model, phase)
    size = phase_size(model, phase, full)
    for _ in range(scales - 1):
        size = (_pooled(size[0]), _pooled(size[1]))
    padding = 1 if isinstance(model, Pix2Pix) else 2
    if layers and not _judges(size, layers, padding):
        raise ValueError(
            f"{key}: the {'coarsest ' if scales > 1 else ''}discriminator of '{phase.name}' sees "
            f"{size[0]}x{size[1]} pixels, too few for {layers} layers; lower discriminators or "
            "model.discriminator_layers, or take larger images"
        )


def _pooled(side: int) -> int:
    return (side + 2 - 3) // 2 + 1


def _judges(size: Size, layers: int, padding: int) -> bool:
    """Whether every map of a PatchGAN has pixels left, and every normalised one more than one."""
    sides = list(size)
    for layer in range(layers + 2):
        stride = 2 if layer < layers else 1
        sides = [(side + 2 * padding - 4) // stride + 1 for side in sides]
        normalised = 0 < layer <= layers
        if min(sides) < 1 or (normalised and sides[0] * sides[1] < 2):
            return False
    return True


def check_workers(phase: PhaseConfig, resources: Resources, *, key: str) -> None:
    """Raises ValueError where a worker would have no pair of a step, or the least are more than the most."""
    most = resources.train_workers
    least = most if resources.train_workers_min is None else resources.train_workers_min
    if least > most:
        raise ValueError(f"resources.train_workers_min: {least} is more than train_workers, {most}")
    if phase.batch < most:
        raise ValueError(
            f"{key}.batch: a step of '{phase.name}' has {phase.batch} pairs, too few for {most} workers; "
            "raise the batch or lower resources.train_workers"
        )
