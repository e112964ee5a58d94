"""The `ingest` section: the locations of the images."""

from __future__ import annotations

from operator import not_
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from stages.base import Config
from stages.config.locations import (
    Column,
    KeyPattern,
    Location,
    archive_parts,
    expand_ranges,
    is_archive,
    table_format,
)


class LocationConfig(Config):
    """One folder, bucket prefix, file server, archive or table, and what its images are to their pairs."""

    uri: Annotated[
        Location,
        Field(
            min_length=1,
            description="The location, any fsspec URI: a folder, an image, an archive or a table. {000..099} "
            "in the name of an archive or a table stands for these numbers, and in a table's name * for any "
            "text and {split} for the split.",
        ),
    ]
    role: Annotated[
        Literal["source", "target", "label", "instance", "features", "pair", "table"],
        Field(
            description="What each image is to its pair. pair: one image holds source and target side by "
            "side. table: the location is a CSV, TSV, JSON lines or Parquet file that lists pairs; a Parquet "
            "file may also hold the images themselves."
        ),
    ]
    pattern: Annotated[
        KeyPattern,
        Field(
            description="The path of an image below `uri`, with its variable parts as {key}, {split}, "
            "{group}, {x}, {y}, * or **. Images of different roles with the same key make a pair."
        ),
    ] = "{key}.*"
    within: Annotated[
        tuple[Location, ...],
        Field(description="Further locations whose images a table may name, besides its own folder."),
    ] = ()
    columns: dict[Column, str | None] = Field(
        default_factory=dict,
        exclude_if=not_,  # so that a config without it keeps its fingerprint
        description="The names of a table's columns, if they are not source, target and so on: "
        "{source: edges, target: photo}. Columns that it leaves out are not read. `key: null` numbers the "
        "rows of a table that holds images.",
    )

    inventory: Annotated[
        Location | None,
        Field(
            description="The manifest.json of an S3 Inventory of the bucket. Objects below `uri` are read "
            "from it, and the bucket is not listed. The data change when you name another day's manifest."
        ),
    ] = None

    @model_validator(mode="after")
    def _inventory_is_of_a_bucket(self) -> Self:
        if self.inventory is None:
            return self
        if not self.inventory.endswith("/manifest.json"):
            raise ValueError("`inventory` names a manifest.json")
        if not self.uri.startswith("s3://") or is_archive(self.uri) or self.role == "table":
            raise ValueError("`inventory` is for the images of an S3 bucket")
        return self

    @model_validator(mode="after")
    def _table_has_a_known_format(self) -> Self:
        if self.role == "table":
            table_format(self.uri)
            if self.uri.count("{split}") > 1:
                raise ValueError("`uri` has {split} twice")
            if self.columns and not (self.columns.get("source") or self.columns.get("target")):
                raise ValueError("`columns` names neither source nor target")
            named = [name.strip().lower() for name in self.columns.values() if name]
            if len(set(named)) < len(named):
                raise ValueError("`columns` names a column twice")
        elif self.within or self.columns:
            raise ValueError(f"`{'within' if self.within else 'columns'}` is for tables")
        return self

    @field_validator("uri")
    @classmethod
    def _chain_names_the_archive(cls, uri: str) -> str:
        if is_archive(uri):
            archive_parts(uri)
            expand_ranges(uri)
        return uri


class IngestConfig(Config):
    """Where the images are. Images that only a table names are not listed, so their changes go unnoticed."""

    locations: Annotated[
        tuple[LocationConfig, ...], Field(min_length=1, description="The locations to list, at least one.")
    ]
