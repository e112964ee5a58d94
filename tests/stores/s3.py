"""What the S3 stores of the tests have in common: two users, clients, and a `with` block that ends them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

import s3fs

ACCESS_KEY, SECRET_KEY = "testaccesskey0000001", "testsecretkey" * 3
READER_KEY, READER_SECRET = "readonlykey000000001", "readonlysecret" * 3


class S3Store(ABC):
    """A server at `address`."""

    address: tuple[str, int]

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.address)

    @abstractmethod
    def start(self) -> Self:
        """Start it and wait until it answers."""

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL to all of it; what it acknowledged survives."""

    def options(self, *, endpoint: str | None = None, read_only: bool = False) -> dict[str, Any]:
        """What s3fs is given; `endpoint` to go through a proxy."""
        key, secret = (READER_KEY, READER_SECRET) if read_only else (ACCESS_KEY, SECRET_KEY)
        return {
            "endpoint_url": endpoint or self.url,
            "key": key,
            "secret": secret,
            "use_listings_cache": False,
        }

    def client(self, **options: Any) -> s3fs.S3FileSystem:
        """A client straight to the store."""
        return s3fs.S3FileSystem(**{**self.options(), **options})

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
