"""What a phase starts from: the networks of the phase before it, or of a model that is already there."""

from __future__ import annotations

from collections.abc import Callable

import torch

from stages import storage
from stages.config.train import PhaseJob, discriminators
from stages.errors import StageError, UserError, named
from stages.inference.model_folder import folder_description, model_folder
from stages.models.architecture import InputSpec
from stages.models.build import grow_discriminator, grow_generator
from stages.models.files import saved
from stages.models.files.saved import Manifest
from stages.models.gan import Ema, GanState
from stages.storage.local import local_folder


def check_start(job: PhaseJob, inputs: InputSpec | None = None) -> str:
    """The fingerprint of the model that `job.start_from` names.

    inputs   the shape of the shards' images, where they are there already

    Raises UserError, naming the key, where there is no model, or where the phase cannot take its networks.
    """
    assert job.start_from is not None
    if job.start_from.startswith(("models:/", "runs:/", "mlflow-artifacts:/")):
        advice = "first: mlflow artifacts download --dst-path FOLDER --artifact-uri"
        raise UserError(f"train.start_from: name a folder; {advice} {job.start_from}")
    with named("train.start_from"), storage.located(job.start_from):
        content = folder_description(job.start_from)
        there = Manifest.model_validate(content)
        if problem := _misfit(there, job, inputs or there.inputs):
            raise UserError(f"{job.start_from}: {problem}")
    return saved.fingerprint(content)


def _misfit(there: Manifest, job: PhaseJob, inputs: InputSpec) -> str:
    """Why a phase cannot start from a model; "" if it can."""
    theirs, ours, phase = there.architecture, job.model, job.phase
    if theirs.kind != ours.kind:
        return f"the model is {theirs.kind}, train.model.kind is {ours.kind}"
    most = phase.enhancers - (phase.kind == "local")
    if there.enhancers > most or (phase.kind == "local" and there.enhancers < most):
        return f"the model has {there.enhancers} enhancers, the phase '{phase.name}' starts from {most}"
    scales = discriminators(ours, phase)
    if there.discriminators > scales:
        return f"the model has {there.discriminators} discriminators, the phase '{phase.name}' has {scales}"
    has = theirs.model_dump() | there.inputs.model_dump()
    wanted = ours.model_dump() | inputs.model_dump()
    mine = there.model_copy(update={"architecture": ours, "inputs": inputs})
    if has.get("feature_encoder") == wanted.get("feature_encoder") and all(
        _shapes(there, name) == _shapes(mine, name)
        for name in there.files
        if name not in (saved.STYLES, saved.EMA)
    ):
        return ""
    differ = [f"{name} is {has[name]}, not {wanted[name]}" for name in has if has[name] != wanted[name]]
    return f"its networks have other shapes: {', '.join(differ)}"


def _shapes(model: Manifest, name: saved.FileName) -> dict[str, torch.Size]:
    """The shapes of the tensors in a model's file."""
    return {key: tensor.shape for key, tensor in saved.empty_network(model, name).state_dict().items()}


def start_from(gan: GanState, model: str, device: torch.device, tell: Callable[[str], None]) -> None:
    """Copy a model's weights, as trained, into the networks of a phase.

    model   a model folder or a step's. A phase keeps its own new discriminator if there is none.
    tell    takes a line about what was not there

    Raises StageError if the model is damaged.
    """
    with local_folder(model_folder(model), leave_out=[saved.EMA]) as folder:
        try:
            before = saved.load_model(folder, weights="raw", device=device)
            grow_generator(gan.generator, before.generator)
            if gan.discriminator is not None and saved.read_manifest(folder).discriminators:
                grow_discriminator(gan.discriminator, saved.load_discriminator(folder, device=device))
            elif gan.discriminator is not None:
                tell(f"{model} has no discriminator: training starts with a new one")
        except ValueError as error:
            raise StageError(f"the model to start from is damaged: {error}") from error
    if gan.encoder is not None and before.encoder is not None:
        gan.encoder.load_state_dict(before.encoder.state_dict())
    if gan.ema is not None:
        gan.ema = Ema.of(gan.generator, decay=gan.ema.decay)
