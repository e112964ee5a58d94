"""The `tracking` section: where MLflow records runs, and which model version is the best."""

from __future__ import annotations

import os
import posixpath
import shlex
from operator import not_
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import unquote

from pydantic import Field, field_validator, model_validator

from stages.base import Config, Split, absolute
from stages.errors import without_password

Promotion = Literal["interval", "mean"]

ARTIFACTS = "artifacts"
"""The folder beside a SQLite file that holds its runs' artifacts."""


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite URI, as SQLAlchemy reads it; None for servers and for databases in memory."""
    path = unquote(uri.removeprefix("sqlite:///").partition("?")[0])
    return Path(path).expanduser() if uri.startswith("sqlite:///") and path not in ("", ":memory:") else None


def sqlite_uri(file: Path) -> str:
    """The URI of a SQLite file. Only what SQLAlchemy would misread is quoted: MLflow quotes nothing."""
    return f"sqlite:///{str(file).replace('%', '%25').replace('?', '%3F')}"


class Registration(Config):
    """The config of the register step: another model name, alias or server registers the model again."""

    server: str
    """Without user and password."""
    experiment: str
    name: str
    alias: str
    metric: str
    promote: Promotion
    split: Split | None
    judged_by: str = Field("", exclude_if=not_)
    """A digest of the settings by which the images are generated; "": the default ones."""


class TrackingConfig(Config):
    """Where runs are recorded and how models are registered."""

    enabled: Annotated[bool, Field(description="Record runs in MLflow.")] = True
    uri: Annotated[
        str | None,
        Field(
            description="MLflow tracking URI (sqlite:////..., postgresql://..., https://...). null: the "
            "environment's MLFLOW_TRACKING_URI, else a SQLite file in the workspace; if that is a bucket, "
            "in ./mlflow."
        ),
    ] = None
    experiment: Annotated[str, Field(min_length=1, description="The MLflow experiment.")] = "pixloom"
    model: Annotated[
        str | None,
        Field(min_length=1, description="Register the model by this name. null: by the experiment's name."),
    ] = None
    alias: Annotated[
        str, Field(pattern=r"^[A-Za-z][\w-]*$", description="The alias of the best registered model version.")
    ] = "champion"
    metric: Annotated[
        str, Field(description="The metric of `evaluate` that decides which model version is the best.")
    ] = "l1"
    promote: Annotated[
        Promotion,
        Field(
            description="interval: a version becomes the best one where its difference from it, image by "
            "image, has a 95 % interval without zero. mean: where its mean is better."
        ),
    ] = "interval"

    @field_validator("uri")
    @classmethod
    def _is_a_database_or_server(cls, uri: str | None) -> str | None:
        if uri is not None and "://" not in uri and uri != "databricks":
            raise ValueError("must be a database or server, e.g. sqlite:////absolute/mlflow.db or http://...")
        if uri is not None and uri.startswith("file:"):
            raise ValueError("MLflow no longer writes to plain folders; use sqlite:////absolute/mlflow.db")
        return uri

    @model_validator(mode="after")
    def _model_name_is_one_that_mlflow_takes(self) -> Self:
        name = self.model or self.experiment
        if self.enabled and (set("/:'") & set(name) or posixpath.normpath(name) != name):
            advice = "name it differently" if self.model else "set tracking.model"
            raise ValueError(f"MLflow cannot register a model as {name!r} (no '/', ':' or quote): {advice}")
        return self

    def registration(self, workspace: str, split: Split | None, judged_by: str = "") -> Registration:
        """What the register step does in a workspace, with scores on this split."""
        return Registration(
            server=without_password(self.place(workspace)),
            experiment=self.experiment,
            name=self.model or self.experiment,
            alias=self.alias,
            metric=self.metric,
            promote=self.promote,
            split=split,
            judged_by=judged_by,
        )

    def place(self, workspace: str) -> str:
        """The tracking URI of runs in a workspace."""
        local = workspace.removeprefix("file://")
        remote = "://" in local or "::" in local
        folder = Path.cwd() if remote else Path(absolute(local))
        default = sqlite_uri(folder / "mlflow" / "mlflow.db")
        return self.uri or os.environ.get("MLFLOW_TRACKING_URI") or default

    def page_command(self, workspace: str) -> str:
        """The command that shows the runs, or the address that shows them."""
        if not self.enabled:
            return "not tracked (tracking.enabled: false)"
        place = without_password(self.place(workspace))
        return place if place.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(place)}"
