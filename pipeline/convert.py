"""Models in and out: published checkpoints become model folders, model folders become ONNX or torch programs.

python -m pipeline.convert import --generator latest_net_G.pth --output models/street
python -m pipeline.convert export --model models/street --format onnx --size 1024x512 --output street.onnx
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import cli
from stages import storage
from stages.base import Kind
from stages.errors import StageError, UserError, one_line
from stages.inference.model_source import local_model
from stages.models.architecture import InputSpec, Picture, Preprocessing
from stages.models.files.checkpoint_import import Imported, import_checkpoint
from stages.models.files.export import (
    TOLERANCE,
    Exported,
    export_model,
    largest_difference,
    onnx_bytes,
    program_bytes,
)
from stages.models.files.saved import MANIFEST, load_model, save_model
from stages.models.files.weights import read_tensors
from stages.storage.local import local_file, upload_folder

logger = logging.getLogger(__name__)

HELP = """\
Models in and out. `import` makes a model folder of a published checkpoint, as if it had been trained
here; `export` writes a model folder's generator for other runtimes. Every location is a path or a URI
(s3://bucket/key ...). Nothing is ever unpickled but tensors; a file with anything else is refused."""

EXAMPLES = f"""\
examples:
  python -m pipeline.convert import --generator latest_net_G.pth --output models/street
  python -m pipeline.convert import --generator latest_net_G.pth --discriminator latest_net_D.pth \\
      --encoder latest_net_E.pth --output s3://models/street
  python -m pipeline.convert export --model workspace/train-joint-1a2b3c4d5e6f --format onnx \\
      --size 1024x512 --output street.onnx
  python -m pipeline.run --only infer --set infer.model=models/street --set infer.input=s3://maps

{cli.EXIT_CODES}"""

IMPORT_HELP = """\
Read the state dicts of NVIDIA/pix2pixHD or junyanz/pytorch-CycleGAN-and-pix2pix (.pth, today's or the
legacy format, or .safetensors) and write a model folder. The architecture is read off the tensors: kind,
widths, depths, enhancers, norm, scales, receptive field. What they leave open is assumed as the
published code defaults, and logged; --source, --classes and --[no-]instances override it."""

EXPORT_HELP = """\
Write the generator with everything around it (one-hot labels, instance edges, padding and cropping) as
one file. It is run again and compared with the model before it is written. The file takes any batch
and any size above the network's multiple (2 to the number of downsamplings); with a --size that is not
above it, that size only. Its inputs and their ranges are in docs/models.md and inside the file."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.parser("pipeline.convert", HELP, EXAMPLES)
    commands = p.add_subparsers(dest="command", required=True, metavar="import|export")
    file: Any = {"type": cli.location, "metavar": "FILE"}
    to: Any = {"type": cli.output, "required": True}

    raw = argparse.RawDescriptionHelpFormatter
    text = "a published checkpoint -> a model folder"
    i = commands.add_parser("import", help=text, description=IMPORT_HELP, formatter_class=raw)
    i.add_argument("--generator", required=True, **file, help="latest_net_G.pth")
    i.add_argument("--discriminator", **file, help="latest_net_D.pth: kept with the model")
    i.add_argument("--encoder", **file, help="latest_net_E.pth: pix2pixHD's feature encoder")
    i.add_argument("--output", **to, metavar="FOLDER", help="the model folder to write")
    i.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    i.add_argument(
        "--source", choices=["image", "labels"], help="what the input is (default: labels above 4 channels)"
    )
    i.add_argument("--classes", type=int, metavar="N", help="number of label ids: a labels source")
    i.add_argument(
        "--instances",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether the last input channel is instance edges (pix2pixHD only)",
    )

    text = "a model folder -> ONNX or a torch.export program"
    e = commands.add_parser("export", help=text, description=EXPORT_HELP, formatter_class=raw)
    text = "a model folder, a training step's, or models:/..."
    e.add_argument("--model", required=True, type=cli.location, metavar="FOLDER", help=text)
    e.add_argument("--format", required=True, choices=sorted(FORMATS), help="what to write")
    e.add_argument(
        "--size", required=True, type=cli.size, metavar="WxH", help="width and height to trace and check with"
    )
    e.add_argument("--output", **to, metavar="FILE", help="the file to write, e.g. street.onnx")
    e.add_argument(
        "--weights", choices=["ema", "raw"], default="ema", help="averaged weights if there are any, or raw"
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    options = parser().parse_args(arguments)
    cli.log_to_stdout("%(message)s")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that we do not use
    work = import_model if options.command == "import" else export
    return cli.exit_code(lambda: work(options), stopped="nothing was written")


# -- import -------------------------------------------------------------------


def import_model(options: argparse.Namespace) -> None:
    """Read published files, write a model folder."""
    output = storage.absolute(options.output)
    with cli.planning(), storage.located(f"--output: {output}"):
        storage.check_reachable({"--output": output})
        if not options.overwrite and storage.exists(storage.join(output, MANIFEST)):
            raise UserError(f"--output: {output}: there is a model already; --overwrite replaces it")
    files = {name: getattr(options, name) for name in ("generator", "discriminator", "encoder")}
    states = {name: _tensors(f"--{name}", uri) for name, uri in files.items() if uri is not None}
    try:
        imported = import_checkpoint(
            **states, source=options.source, classes=options.classes, instances=options.instances
        )
    except ValueError as error:
        raise UserError(f"--generator: {options.generator}: {error}") from error
    with tempfile.TemporaryDirectory(prefix="pixloom-") as temp, storage.located(temp):
        folder = Path(temp)
        save_model(
            folder,
            imported.generator,
            architecture=imported.architecture,
            inputs=imported.inputs,
            preprocessing=_preprocessing(imported.inputs),
            discriminator=imported.discriminator,
            encoder=imported.encoder,
            extra={"imported_from": Path(options.generator).name},
        )
        load_model(folder)  # the files can be read back
        with storage.located(f"--output: {output}"):
            upload_folder(folder, output, last=MANIFEST)
    logger.info("%s", _description(imported))
    logger.info("written to %s", output)


def _preprocessing(inputs: InputSpec) -> Preprocessing:
    """What published models were trained on, as far as the channels tell: photos in [-1, 1], label ids."""
    colours: dict[int, Kind] = {1: "grey", 3: "rgb"}
    pictures = {"target": Picture(kind=colours.get(inputs.target_channels, "channels"))}
    if (inputs.source, inputs.channels, inputs.target_channels) == ("image", 1, 2):
        return Preprocessing(pictures={"source": Picture(kind="lab_l"), "target": Picture(kind="lab_ab")})
    if inputs.source == "labels":
        pictures["source"] = Picture(kind="labels", classes=inputs.classes)
    else:
        pictures["source"] = Picture(kind=colours.get(inputs.channels, "channels"))
    if inputs.instances:
        pictures["instance"] = Picture(kind="instances")
    return Preprocessing(pictures=pictures)


def _description(imported: Imported) -> str:
    """The architecture and inputs that were read off the tensors, and what was assumed."""
    values = imported.architecture.model_dump()
    inputs = imported.inputs.model_dump(exclude_none=True)
    lines = [
        f"{values.pop('kind')}: " + ", ".join(f"{key} {value}" for key, value in values.items()),
        "inputs: " + ", ".join(f"{key} {value}" for key, value in inputs.items()),
        *(f"note: {note}" for note in imported.notes),
    ]
    return "\n".join(lines)


def _tensors(option: str, uri: str) -> dict[str, Tensor]:
    """The tensors of a file at any location."""
    storage.check_reachable({option: uri})
    with cli.planning(), storage.located(f"{option}: {uri}"), local_file(storage.absolute(uri)) as path:
        try:
            return read_tensors(path)
        except ValueError as error:
            raise UserError(f"{option}: {str(error).replace(str(path), uri, 1)}") from error


# -- export -------------------------------------------------------------------


def export(options: argparse.Namespace) -> None:
    """Trace a model, compare the file's picture with the model's, write the file."""
    width, height = options.size
    serialise, load = FORMATS[options.format]
    output = storage.absolute(options.output)
    if options.output.endswith("/") or Path(options.output).is_dir():
        raise UserError(f"--output: {options.output} is a folder; name the file to write")
    storage.check_reachable({"--output": output})
    with tempfile.TemporaryDirectory(prefix="pixloom-") as temp:
        try:
            with cli.planning(), storage.located(options.model):
                folder = local_model(options.model, Path(temp), weights=options.weights)
                model = load_model(folder, weights=options.weights)
        except (UserError, ValueError) as error:
            raise UserError(f"--model: {error}") from error
        try:
            exported = export_model(model, width=width, height=height)
            data = serialise(exported)
            difference = largest_difference(
                load(data), model, width=width, height=height, any_size=exported.any_size
            )
        except ImportError as error:
            raise UserError(
                f"--format: {options.format} needs the package {error.name}: "
                "pip install onnx onnxscript onnxruntime"
            ) from error
        except (ValueError, RuntimeError) as error:  # torch's for want of memory
            raise StageError(f"export: {one_line(error)}; nothing was written") from error
    with storage.located(f"--output: {output}"):
        storage.write_bytes(output, data)
    sizes = "any batch, any size" if exported.any_size else f"any batch, {width}x{height} only"
    logger.info(
        "%s weights, %s; largest difference to the model's picture %.1e of at most %.0e (range [-1, 1])",
        model.weights,
        sizes,
        difference,
        TOLERANCE,
    )
    logger.info("written to %s, %.1f MB", output, len(data) / 1e6)


Program = Callable[[Mapping[str, Tensor]], Tensor]


def _onnx_run(data: bytes) -> Program:
    # imported here: it is in the test extra only, and only this format needs it
    import onnxruntime  # noqa: PLC0415

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(values: Mapping[str, Tensor]) -> Tensor:
        (image,) = session.run(["image"], {name: value.numpy() for name, value in values.items()})
        return torch.from_numpy(np.asarray(image))

    return run


def _program_run(data: bytes) -> Program:
    module = torch.export.load(io.BytesIO(data)).module()
    return lambda values: module(**values)


FORMATS: dict[str, tuple[Callable[[Exported], bytes], Callable[[bytes], Program]]] = {
    "onnx": (onnx_bytes, _onnx_run),
    "torch_export": (program_bytes, _program_run),
}
"""How each format is written, and how its file is run again."""


if __name__ == "__main__":
    sys.exit(main())
