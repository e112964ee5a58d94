"""Files and folders at any fsspec URI: read and written whole, with retries while a store fails."""

from stages.config.locations import absolute as absolute
from stages.storage.files import (
    check_reachable as check_reachable,
    configure as configure,
    create as create,
    exists as exists,
    filesystem as filesystem,
    find_json as find_json,
    is_local as is_local,
    join as join,
    list_folders as list_folders,
    list_names as list_names,
    parquet_parts as parquet_parts,
    read_bytes as read_bytes,
    read_json as read_json,
    read_parquet as read_parquet,
    remove as remove,
    require as require,
    speaks as speaks,
    worker_environment as worker_environment,
    write_bytes as write_bytes,
    write_json as write_json,
    write_parquet as write_parquet,
    written as written,
)
from stages.storage.retry import located as located, patiently as patiently, retried as retried
