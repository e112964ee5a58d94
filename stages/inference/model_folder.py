"""A model's folder at any URI: where it is, and what its `model.json` says."""

from __future__ import annotations

import json
from typing import Any, cast

from pydantic import ValidationError

from stages import storage
from stages.errors import UserError, first_invalid
from stages.models.files.saved import MANIFEST, Manifest


def model_folder(uri: str) -> str:
    """The folder with `model.json`: `uri` or its folder `model/`. Raises UserError if neither has one."""
    uri = storage.absolute(uri)
    for folder in (uri, storage.join(uri, "model")):
        if storage.exists(storage.join(folder, MANIFEST)):
            return folder
    raise UserError(f"{uri}: there is no {MANIFEST}, so this is no model folder")


def folder_description(uri: str) -> dict[str, Any]:
    """The content of `model.json` of the model at `uri`. Raises UserError if it is not there or damaged."""
    return parsed(storage.read_bytes(storage.join(model_folder(uri), MANIFEST)), uri)


def parsed(content: bytes, uri: str) -> dict[str, Any]:
    """The content of the `model.json` of a model at `uri`, a valid one. Raises UserError if it is damaged."""
    try:
        Manifest.model_validate_json(content)
    except ValidationError as error:
        raise UserError(f"{uri}: {MANIFEST}: {first_invalid(error)[:300]}") from error
    return cast(dict[str, Any], json.loads(content))
