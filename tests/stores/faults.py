"""A proxy in front of a server that spoils some of what passes.

Messages are read whole, so it is for tests with small objects. Which requests a fault hits is drawn with a
seed in the order of their arrival, so with several clients a run is not exactly repeatable: assert on
outcomes, and on `counts` only that faults did happen.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

Action = Literal[
    "status",  # the proxy answers with `code`; the server never sees the request
    "reset",  # the connection is reset before the server sees the request
    "status_after",  # the server does the work, the client gets `code`
    "reset_after",  # the server does the work, the client's connection is reset
    "truncate",  # half of the body, then a reset
    "flip",  # one byte of the body is another
    "header",  # the answer has one header more: `header`
    "delay",  # an answer `seconds` late
    "hang",  # no answer until the client gives up
    "twice",  # the server gets the request twice, the client the first answer
    "throttle",  # an answer that takes `seconds` a megabyte, of what was sent and is answered
    "stale",  # the answer that the same request got the first time it was seen
]
WHOLE_ACTIONS = ("delay", "twice", "throttle", "stale")  # the answer is the server's


@dataclass(slots=True)
class Fault:
    """What happens to the requests that match, and to which."""

    action: Action
    share: float = 1.0
    times: int | None = None
    method: str = ""
    path: str = ""
    code: int = 503
    error: str = "SlowDown"
    seconds: float = 0.05
    header: str = ""
    done: int = field(default=0, init=False)

    def hits(self, method: str, path: str, draw: float) -> bool:
        """Whether this fault befalls a request; `draw` is uniform in [0, 1)."""
        if (self.method and self.method != method) or (self.path and not re.search(self.path, path)):
            return False
        return draw < self.share and (self.times is None or self.done < self.times)


@dataclass(slots=True)
class _Message:
    head: bytes
    body: bytes

    @property
    def first(self) -> list[str]:
        return self.head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)


class FaultProxy:
    """Listens at `url`, forwards to `backend`. Change `faults` at any time.

    `counts` says what happened, `agents` which clients sent requests ("GET object_store": 3).
    """

    def __init__(
        self,
        backend: tuple[str, int],
        faults: Sequence[Fault] = (),
        *,
        seed: int = 0,
        host: str = "127.0.0.1",
    ) -> None:
        self.backend, self.faults, self.host = backend, list(faults), host
        self._seen: dict[bytes, _Message] = {}
        self.counts: Counter[str] = Counter()
        self.agents: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._port = 0
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._serve(),), daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self._port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connection, self.host, 0, limit=1 << 20)
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while request := await _read_request(reader, writer):
                fault = self._pick(request)
                if fault is not None and fault.action in ("status", "reset", "hang"):
                    await self._refuse(fault, request.first[0], reader, writer)
                    return
                if fault is not None and fault.action == "delay":
                    await asyncio.sleep(fault.seconds)
                upstream = upstream or await asyncio.open_connection(*self.backend, limit=1 << 20)
                for _ in range(2 if fault is not None and fault.action == "twice" else 1):
                    upstream[1].write(request.head + request.body)
                    answer = await _read_answer(upstream[0], bodyless=request.first[0] == "HEAD")
                if fault is not None and fault.action == "throttle":
                    await asyncio.sleep(fault.seconds * (len(request.body) + len(answer.body)) / 1e6)
                if fault is not None and fault.action == "stale":
                    answer = self._seen.setdefault(request.head.split(b"\r\n", 1)[0], answer)
                if fault is not None and not await self._spoil(fault, request.first[0], answer, writer):
                    return
                if fault is None or fault.action in WHOLE_ACTIONS:
                    writer.write(answer.head + answer.body)
                await writer.drain()
                if b"connection: close" in answer.head.lower():
                    return
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            _reset(writer)
        finally:
            writer.close()
            if upstream is not None:
                upstream[1].close()

    def _pick(self, request: _Message) -> Fault | None:
        method, path, _ = request.first
        self.counts["requests"] += 1
        self.agents[f"{method} {_headers(request.head).get('user-agent', '').partition('/')[0]}"] += 1
        for fault in self.faults:
            if fault.hits(method, path, self._random.random()):
                fault.done += 1
                self.counts[fault.action] += 1
                return fault
        return None

    async def _refuse(
        self, fault: Fault, method: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answer without asking the server; the connection ends with it."""
        if fault.action == "status":
            writer.write(_error(fault, method))
            await writer.drain()
        elif fault.action == "reset":
            _reset(writer)
        else:
            await reader.read(-1)

    async def _spoil(self, fault: Fault, method: str, answer: _Message, writer: asyncio.StreamWriter) -> bool:
        """Send a spoiled answer. Returns whether the connection can be used further."""
        if fault.action == "status_after":
            writer.write(_error(fault, method))
            await writer.drain()
            return False
        if fault.action == "reset_after":
            _reset(writer)
            return False
        if fault.action == "truncate":
            writer.write(answer.head + answer.body[: len(answer.body) // 2])
            await writer.drain()
            await asyncio.sleep(0.05)  # let the client take what was sent before the reset drops it
            _reset(writer)
            return False
        if fault.action == "header":
            writer.write(answer.head[:-2] + f"{fault.header}\r\n\r\n".encode() + answer.body)
        if fault.action == "flip":
            middle = len(answer.body) // 2
            spoiled = bytearray(answer.body)
            if spoiled:
                spoiled[middle] ^= 1 << self._random.randrange(8)  # damage is not the same at every read
            writer.write(answer.head + bytes(spoiled))
        return True


def _error(fault: Fault, method: str) -> bytes:
    body = (
        f'<?xml version="1.0"?><Error><Code>{fault.error}</Code><Message>injected</Message></Error>'.encode()
    )
    head = (
        f"HTTP/1.1 {fault.code} Injected\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    )
    return head.encode() + b"Connection: close\r\n\r\n" + (b"" if method == "HEAD" else body)


def _reset(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    if raw is not None and raw.fileno() >= 0:  # the client may have gone first
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Message | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    if _headers(head).get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = re.sub(rb"(?i)\r\nexpect: 100-continue", b"", head)
    return _Message(head, await _read_body(reader, _headers(head)))


async def _read_answer(reader: asyncio.StreamReader, *, bodyless: bool) -> _Message:
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    if status == 100:
        return await _read_answer(reader, bodyless=bodyless)
    if bodyless or status in (204, 304):
        return _Message(head, b"")
    return _Message(head, await _read_body(reader, _headers(head)))


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    """A message's body as it is on the wire, chunk marks included."""
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(int(headers.get("content-length", "0")))
    parts = []
    while True:
        line = await reader.readline()
        size = int(line.split(b";")[0], 16)
        parts.append(line)
        if size == 0:
            break
        parts.append(await reader.readexactly(size + 2))
    while (line := await reader.readline()) not in (b"\r\n", b""):
        parts.append(line)
    return b"".join([*parts, b"\r\n"])
