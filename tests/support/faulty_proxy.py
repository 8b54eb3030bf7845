"""A TCP proxy on loopback for fault injection: stalls, resets, short, wrong and slow bodies, lost responses, 503."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 4\r\nRetry-After: 0\r\n\r\nbusy"


Kind = Literal["stall", "reset", "short", "corrupt", "drip", "refuse", "busy", "lost"]


@dataclass(frozen=True)
class Fault:
    """A fault to inject into one response after `after` bytes of its body."""

    kind: Kind
    after: int = 0


class FaultyProxy:
    """Forwards requests to `target`; `faults(n)` returns the fault to inject into the response to request n."""

    def __init__(self, target: tuple[str, int], latency: float = 0.0) -> None:
        self.target, self.latency = target, latency
        self.faults: Callable[[int], Fault | None] = lambda request: None
        self.num_requests = 0
        self.num_connections = 0
        self.injected: list[Fault] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(self.target) as server:
            while request := _read_request(client):
                with self._lock:
                    fault = self.faults(self.num_requests)
                    self.num_requests += 1
                    if fault is not None:
                        self.injected.append(fault)
                if fault is not None and fault.kind == "refuse":
                    _reset(client)
                    return
                if fault is not None and fault.kind == "busy":
                    client.sendall(BUSY)
                    continue
                server.sendall(request)
                if fault is not None and fault.kind == "lost":  # done there, but not answered
                    server.recv(65536)
                    _reset(client)
                    return
                if not self._answer(server, client, fault):
                    return

    def _answer(self, server: socket.socket, client: socket.socket, fault: Fault | None) -> bool:
        """Forward one response; return False if the connection has ended."""
        head = _read_head(server, b"")
        time.sleep(self.latency)
        if not head:
            return False
        head, _, body = head.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        endless = b"content-length" not in fields  # ends with the connection
        length = sys.maxsize if endless else int(fields[b"content-length"])
        client.sendall(head + b"\r\n\r\n")
        sent = 0
        while sent < length:
            chunk = body or server.recv(min(65536, length - sent))
            body = b""
            if not chunk:
                return False  # the end
            if fault is not None and sent + len(chunk) > fault.after:
                good = max(0, fault.after - sent)
                if fault.kind == "corrupt":
                    if sent <= fault.after:
                        chunk = chunk[:good] + bytes([chunk[good] ^ 1]) + chunk[good + 1 :]
                else:
                    client.sendall(chunk[:good])
                    server.close()
                    return self._break(client, fault, chunk[good:])
            client.sendall(chunk)
            sent += len(chunk)
        return b"close" not in fields.get(b"connection", b"")

    def _break(self, client: socket.socket, fault: Fault, rest: bytes) -> bool:
        if fault.kind == "reset":
            time.sleep(0.02)  # otherwise the reset discards the bytes sent before
            _reset(client)
        elif fault.kind == "stall":
            while not self._closing.wait(0.05) and not _is_gone(client):
                pass
        elif fault.kind == "drip":
            for byte in rest:
                if self._closing.wait(0.1):
                    break
                client.sendall(bytes([byte]))
        return False


def _read_request(client: socket.socket) -> bytes:
    request = _read_head(client, b"")
    head = request.partition(b"\r\n\r\n")[0]
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    while request and len(request) < len(head) + 4 + int(fields.get(b"content-length", 0)):
        request += client.recv(1 << 20)
    return request


def _read_head(source: socket.socket, data: bytes) -> bytes:
    while b"\r\n\r\n" not in data:
        chunk = source.recv(65536)
        if not chunk:
            return b""
        data += chunk
    return data


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def _is_gone(client: socket.socket) -> bool:
    client.settimeout(0.01)
    try:
        return client.recv(1, socket.MSG_PEEK) == b""
    except TimeoutError:
        return False
    except OSError:
        return True
