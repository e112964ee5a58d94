"""The `train` section: the model, its losses, and the phases it is trained in.

    global    G1 alone, at a fraction of the size               (Wang et al. 2018, section 3.1)
    local     a new enhancer around it, everything inside frozen
    joint     all of it
    whole     a model without enhancers (pix2pix)

A phase with k of the model's N enhancers works on images of 1/2^(N-k) of the full size. Each phase becomes
one `PhaseJob`, which holds everything that changes its result and nothing of the phases after it, so that a
change to the last phase does not train the first one again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.base import Config, Precision, Resources
from stages.config.augment import AugmentConfig
from stages.config.evaluate import SMALLEST_SIDE, EvaluateConfig, InceptionConfig, LpipsConfig
from stages.config.locations import Location
from stages.models.architecture import (
    Architecture,
    LossWeights,
    Parts,
    Pix2Pix,
    Pix2PixHD,
    paper_weights,
    size_multiple,
)

if TYPE_CHECKING:
    from stages.config.shard import ShardConfig

PhaseKind = Literal["global", "local", "joint", "whole"]
Select = Literal["l1", "psnr", "ssim", "ms_ssim", "lpips", "fid", "frechet:efficientnet_lite0"]
Size = tuple[int, int]
Beta = Annotated[float, Field(ge=0, lt=1)]
VGG19_SIDE = 16  # pixels of the smallest image with a pixel after four poolings
COMPARED = {
    *("generator", "norm", "dropout", "enhancers", "blocks", "feature_encoder", "discriminators"),
    *("discriminator_layers", "conditional"),
}
"""Settings of either model that distinguish runs in MLflow's tables."""


class PhaseConfig(Config):
    """One phase. Its resolution follows from its enhancers."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[a-z][a-z0-9_]{0,31}$",
            description="The phase's own name: small letters, digits and _; part of its folder's name.",
        ),
    ]
    kind: Annotated[
        PhaseKind,
        Field(
            description="What trains. whole: a pix2pix model. global: G1 alone. local: a new enhancer, with "
            "everything inside it frozen. joint: all parts."
        ),
    ]
    enhancers: Annotated[
        int, Field(ge=0, le=4, description="Number of the model's enhancers in this phase, from the inside.")
    ] = 0
    epochs: Annotated[int, Field(ge=1, description="Number of epochs, including decay_epochs.")]
    decay_epochs: Annotated[
        int, Field(ge=0, description="Reduce the learning rate linearly to 0 over this many last epochs.")
    ] = 0
    batch: Annotated[int, Field(ge=1, description="Pairs per step, over all workers.")] = 1
    learning_rate: Annotated[
        float, Field(gt=0, le=1, allow_inf_nan=False, description="Learning rate before the decay.")
    ] = 2e-4
    discriminators: Annotated[
        int | None,
        Field(
            ge=1,
            le=5,
            description="Number of discriminator scales in this phase. null: the model's, less one for each "
            "enhancer that this phase lacks.",
        ),
    ] = None

    @model_validator(mode="after")
    def _decays_within_its_epochs(self) -> Self:
        if self.decay_epochs > self.epochs:
            raise ValueError(f"decay_epochs {self.decay_epochs} is more than epochs {self.epochs}")
        return self

    @property
    def parts(self) -> Parts:
        """The parts of the generator that this phase trains."""
        return "outermost" if self.kind == "local" else "all"


class OptimizerConfig(Config):
    """Adam, for both networks. Each phase has its own learning rate."""

    betas: Annotated[
        tuple[Beta, Beta],
        Field(description="Decay of the averages of the gradient and of its square, each from 0 to below 1."),
    ] = (0.5, 0.999)


class Recipe(Config):
    """The settings that all phases share."""

    model: Annotated[Architecture, Field(description="The architecture: pix2pix or pix2pixhd.")]
    losses: Annotated[
        LossWeights,
        Field(description="Kind and weights of the losses. Keys left out are as in the model's paper."),
    ]
    vgg_weights: Annotated[
        Location | None, Field(description="Path or URI of VGG19's weights; needed by losses.perceptual.")
    ] = None
    lpips: Annotated[
        LpipsConfig | None, Field(description="The network of LPIPS as a loss; needed by losses.lpips.")
    ] = None
    optimizer: Annotated[OptimizerConfig, Field(description="Settings of Adam.")] = OptimizerConfig()
    ema: Annotated[
        float | None,
        Field(
            ge=0,
            lt=1,
            description="Keep an exponential moving average of the generator's weights with this decay per "
            "step. null: none.",
        ),
    ] = None
    precision: Annotated[
        Precision | None,
        Field(
            description="Number format of the computation. null: bf16 where a phase begins on workers with "
            "matrix units for it, else float32; it is recorded, and a phase keeps what it began with."
        ),
    ] = None
    gradient_dtype: Annotated[
        Precision,
        Field(
            description="Number format in which workers exchange gradients. bf16 halves the bytes between "
            "machines and rounds the gradients; one worker exchanges none."
        ),
    ] = "float32"
    deterministic: Annotated[
        bool,
        Field(
            description="On GPUs, a phase that resumes gives the numbers of one that was not interrupted, to "
            "the last bit, as CPUs always do. Steps take longer."
        ),
    ] = False
    synchronised_norms: Annotated[
        bool,
        Field(
            description="Compute batch norm over the pairs of all workers instead of each worker's own. "
            "Without effect on instance norm."
        ),
    ] = False
    select: Annotated[
        Select | None,
        Field(
            description="The model of a phase is that of the measured epoch with the best value of this "
            "metric on the first validation pairs. lpips and fid take their weights from the section "
            "evaluate. null: that of the last epoch."
        ),
    ] = None
    seed: Annotated[
        int, Field(ge=0, lt=2**63, description="Seed of the initial weights, the order and the augmentation.")
    ] = 0
    log_every: Annotated[
        int, Field(ge=1, description="Write one point of each loss curve per this many steps.")
    ] = 10

    @property
    def has_batch_norm(self) -> bool:
        """Whether the pairs of a batch are normalised together."""
        return isinstance(self.model, Pix2Pix) and self.model.norm == "batch"

    def compared(self, phases: Sequence[PhaseConfig], size: Size) -> dict[str, Any]:
        """The few settings that distinguish runs in MLflow's tables: flat, the same for every run.

        The artifact `config.yaml` holds all settings. `size`: of the training images.
        """
        model, losses = self.model, self.losses
        return {
            "model": model.kind,
            **model.model_dump(include=COMPARED),
            "width": model.width if isinstance(model, Pix2Pix) else model.global_width,
            "gan_loss": losses.gan,
            "lambda_gan": losses.gan_weight,
            "lambda_l1": losses.l1,
            "lambda_feature_matching": losses.feature_matching,
            "lambda_perceptual": losses.perceptual,
            "size": f"{size[0]}x{size[1]}",
            "epochs": sum(phase.epochs for phase in phases),
            "batch": phases[-1].batch,
            "learning_rate": phases[-1].learning_rate,
            "seed": self.seed,
        }

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
        if self.losses.lpips > 0 and self.lpips is None:
            raise ValueError("losses.lpips: needs lpips.backbone, the location of its network's weights")
        losses = self.losses
        if not any((losses.gan_weight, losses.feature_matching, losses.l1, losses.perceptual, losses.lpips)):
            raise ValueError("losses: every weight is 0, so the generator would learn nothing")
        return self


class PhaseJob(Recipe):
    """One phase with everything that changes its result: the config of one of the pipeline's steps.

    What the config leaves open or to `resources` is decided when the phase begins and recorded
    (`stages.training.execution`).
    """

    augment: AugmentConfig = AugmentConfig()
    phase: PhaseConfig
    start_from: str | None = None
    """Only of the first phase; the others start from the phase before them."""
    scorer: LpipsConfig | InceptionConfig | None = None
    """The network of `select: lpips` or `fid`."""

    @property
    def scale(self) -> int:
        """How many times smaller than the full images the phase's are, on each side."""
        return downscale(self.model, self.phase)

    def size(self, load: Size) -> Size:
        """Width and height of the phase's images, of shards with images of size `load`."""
        return phase_size(self.model, self.phase, full_size(load, self.augment))

    @property
    def depends_on_micro_batch(self) -> bool:
        """Whether the pairs that are in memory together change the result."""
        dropout = isinstance(self.model, Pix2Pix) and self.model.dropout != "none"
        draws = dropout or bool(self.losses.diff_augment)
        return self.phase.batch > 1 and (self.has_batch_norm or draws)

    @property
    def depends_on_workers(self) -> bool:
        """Whether the number of workers changes the result."""
        return self.phase.batch > 1 and self.has_batch_norm and not self.synchronised_norms


class TrainConfig(Recipe):
    """The train section of the config."""

    phases: Annotated[
        tuple[PhaseConfig, ...],
        Field(
            min_length=1,
            default_factory=lambda data: default_phases(data["model"]) if "model" in data else (),
            description="The phases, in order. null: those of the model's paper.",
        ),
    ]
    start_from: Annotated[
        Location | None,
        Field(
            description="Path or URI of a model folder or a training step's folder: the first phase starts "
            "from its networks. null: from initial weights."
        ),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _null_phases_are_the_default(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("phases", 0) is None:
            return {name: value for name, value in values.items() if name != "phases"}
        return values

    @model_validator(mode="after")
    def _phases_make_sense(self) -> Self:
        check_phases(self.model, self.phases, started=self.start_from is not None)
        return self

    def check_data(self, shard: ShardConfig, augment: AugmentConfig, evaluate: EvaluateConfig) -> None:
        """Raises ValueError, naming the key, where the networks cannot take the shards' images."""
        needed = {"instance": "instances", "source": "labels"}  # styles are of the source's classes
        styled = isinstance(self.model, Pix2PixHD) and self.model.feature_encoder
        if styled and not needed.items() <= shard.kinds.items():
            raise ValueError(f"train.model.feature_encoder: needs shard.kinds with {needed}")
        full = full_size(shard.size, augment)
        if full[0] > shard.size[0] or full[1] > shard.size[1]:
            raise ValueError(
                f"augment.crop: {full[0]}x{full[1]} is larger than shard.size, "
                f"{shard.size[0]}x{shard.size[1]}"
            )
        networks = {"losses.perceptual": VGG19_SIDE} if self.losses.perceptual else {}
        networks |= {"losses.lpips": self.lpips.smallest_side} if self.losses.lpips and self.lpips else {}
        kind = shard.kinds.get("target", "rgb")
        if networks and (kind == "lab_ab" or (kind == "channels" and shard.channels not in (1, 3))):
            raise ValueError(f"train.{next(iter(networks))}: its network sees 1 or 3 channels, not {kind}")
        scorer, side = self.scorer(evaluate), SMALLEST_SIDE.get(self.select or "", 1)
        networks["select"] = scorer.smallest_side if isinstance(scorer, LpipsConfig) else side
        for index, phase in enumerate(self.phases):
            check_size(self.model, phase, full, key=f"train.phases.{index}")
            size = phase_size(self.model, phase, full)
            for key, least in networks.items():
                if min(size) < least:
                    text = f"needs images of {least} pixels a side; those of '{phase.name}' are"
                    raise ValueError(f"train.{key}: {text} {size[0]}x{size[1]}")

    def scorer(self, evaluate: EvaluateConfig) -> LpipsConfig | InceptionConfig | None:
        """The network that `select` needs. Raises ValueError if evaluation has none."""
        networks = {"lpips": evaluate.lpips, "fid": evaluate.inception}
        if self.select not in networks:
            return None
        if (network := networks[self.select]) is None:
            key = {"lpips": "lpips.backbone", "fid": "inception.weights"}[self.select]
            raise ValueError(f"train.select: {self.select} needs weights; name them in evaluate.{key}")
        return network

    def check_resources(self, resources: Resources) -> None:
        """Raises ValueError where workers would have nothing to do, or could not do it together."""
        if self.synchronised_norms and resources.micro_batch is not None:
            raise ValueError(
                "resources.micro_batch: gradient accumulation splits the batch, so train.synchronised_norms "
                "cannot average over it; remove one of the two"
            )
        if resources.cuda_graph:
            excluded = {
                "train_workers: 1": resources.train_workers > 1,
                "micro_batch: null": resources.micro_batch is not None,
                "checkpointing: false": resources.checkpointing,
                "compile: false": resources.compile,
            }
            if needs := [name for name, clashes in excluded.items() if clashes]:
                raise ValueError(f"resources.cuda_graph: needs {', '.join(needs)}; or set it to false")
        varies = resources.train_workers_min not in (None, resources.train_workers)
        if varies and self.has_batch_norm and not self.synchronised_norms:
            raise ValueError(
                "resources.train_workers_min: batch norm makes the result depend on the number of workers; "
                "remove this key, or set train.synchronised_norms: true or train.model.norm: instance"
            )
        for index, phase in enumerate(self.phases):
            check_workers(phase, resources, key=f"train.phases.{index}")


def jobs(
    config: TrainConfig, augment: AugmentConfig, evaluate: EvaluateConfig | None = None
) -> tuple[PhaseJob, ...]:
    """The phases as steps of the pipeline."""
    shared = {name: getattr(config, name) for name in Recipe.model_fields}
    shared |= {"augment": augment, "scorer": config.scorer(evaluate or EvaluateConfig())}
    starts = [config.start_from, *[None] * len(config.phases)]
    return tuple(
        PhaseJob(**shared, phase=phase, start_from=start)
        for phase, start in zip(config.phases, starts, strict=False)
    )


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
    """Number of discriminator scales of a phase; smaller images have fewer."""
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


# -- checks -------------------------------------------------------------------


def check_phases(
    model: Pix2Pix | Pix2PixHD, phases: tuple[PhaseConfig, ...], *, started: bool = False
) -> None:
    """Raises ValueError, naming phase and key, for a list of phases that makes no sense.

    started   the first phase starts from a model, whose parts are not known yet
    """
    names = [phase.name for phase in phases]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ValueError(f"phases.{index}.name: '{name}' is the name of an earlier phase too")
    before: PhaseConfig | None = None
    for index, phase in enumerate(phases):
        problem = (
            _wrong_in_pix2pix(phase)
            if isinstance(model, Pix2Pix)
            else _wrong_in_pix2pixhd(model, phase, before, started=started)
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


def _wrong_in_pix2pixhd(
    model: Pix2PixHD, phase: PhaseConfig, before: PhaseConfig | None, *, started: bool
) -> str:
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
        case "local" if before is None and not started:
            return (
                "kind: a local phase refines what an earlier phase trained; begin with a global one, or set "
                "train.start_from"
            )
        case "local" if before is not None and phase.enhancers != had + 1:
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
    if layers and not _fits(size, layers, padding):
        raise ValueError(
            f"{key}: the {'coarsest ' if scales > 1 else ''}discriminator of '{phase.name}' sees "
            f"{size[0]}x{size[1]} pixels, too few for {layers} layers; lower discriminators or "
            "model.discriminator_layers, or take larger images"
        )


def _pooled(side: int) -> int:
    return (side + 2 - 3) // 2 + 1


def _fits(size: Size, layers: int, padding: int) -> bool:
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
