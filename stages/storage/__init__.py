"""Files and folders at any fsspec URI: read and written whole, with retries while a store fails."""

from stages.config.locations import absolute
from stages.storage.files import (
    configure,
    create,
    exists,
    filesystem,
    is_local,
    join,
    list_names,
    parquet_parts,
    read_bytes,
    read_json,
    read_parquet,
    require,
    speaks,
    worker_environment,
    write_bytes,
    write_json,
    write_parquet,
    written,
)
from stages.storage.retry import passing, patiently, retried

__all__ = [
    "absolute",
    "configure",
    "create",
    "exists",
    "filesystem",
    "is_local",
    "join",
    "list_names",
    "parquet_parts",
    "passing",
    "patiently",
    "read_bytes",
    "read_json",
    "read_parquet",
    "require",
    "retried",
    "speaks",
    "worker_environment",
    "write_bytes",
    "write_json",
    "write_parquet",
    "written",
]
