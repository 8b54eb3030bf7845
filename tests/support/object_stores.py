"""Servers on loopback that hold shards: moto's S3, and a web server that can pose as Google's or Azure's storage."""

from __future__ import annotations

import http.client
import http.server
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
BUCKET = "bucket"


class WebServer:
    """Serves the files below `folder` over HTTP/1.1, with byte ranges unless `ranges` is False.

    `requests` lists (path, Range header) of each request; `longest` limits the body of a response, as servers may do.
    With `certificate`, a file that also holds the key, it serves HTTPS. A folder is listed as Google's and Azure's
    storage list it.
    """

    def __init__(
        self, folder: Path, *, ranges: bool = True, latency: float = 0.0, certificate: Path | None = None
    ) -> None:
        self.folder, self.ranges, self.latency = folder, ranges, latency
        self.longest: int | None = None
        self.etags = True
        self.headers: dict[str, str] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.seen_headers: list[dict[str, str]] = []
        owner = self

        class Handler(_Handler):
            web_server = owner

        self._server = _QuietServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address: tuple[str, int] = ("127.0.0.1", self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.address[1]}"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.url = self.url.replace("http", "https")
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


class _QuietServer(http.server.ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore errors: tests break connections on purpose."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # the body would wait 40 ms for the head to be confirmed
    web_server: WebServer

    def do_GET(self) -> None:
        server = self.web_server
        wanted = self.headers.get("Range")
        server.requests.append((self.path, wanted))
        server.seen_headers.append(dict(self.headers))
        time.sleep(server.latency)
        url = urlsplit(self.path)
        path, query = server.folder / unquote(url.path.lstrip("/")), parse_qs(url.query)
        if "list-type" in query or "comp" in query:
            self._list(path / query["prefix"][0], path)
            return
        if not path.is_file():
            self.send_error(404)
            return
        size, first, last = path.stat().st_size, 0, path.stat().st_size - 1
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
        if found and server.ranges:
            first, last = int(found[1]), min(last, int(found[2] or last))
            if first > last:
                self.send_error(416)
                return
            if server.longest is not None:
                last = min(last, first + server.longest - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        else:
            self.send_response(200)
        for name, value in server.headers.items():
            self.send_header(name, value)
        if server.etags:
            self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}-{size:x}"')
            self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        with path.open("rb") as file:
            file.seek(first)
            self.wfile.write(file.read(last - first + 1))

    def _list(self, folder: Path, bucket: Path) -> None:
        files = [(path.relative_to(bucket), path.stat().st_size) for path in folder.iterdir()]
        google = "".join(
            f"<Contents><Key>{name}</Key><Size>{size}</Size><ETag>x</ETag>"
            "<LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
            for name, size in files
        )
        azure = "".join(
            f"<Blob><Name>{name}</Name><Properties><Content-Length>{size}</Content-Length><Etag>x</Etag><Content-Type>x</Content-Type>"
            "<Last-Modified>Thu, 01 Jan 2026 00:00:00 GMT</Last-Modified></Properties></Blob>"
            for name, size in files
        )
        text = (
            f"<EnumerationResults><Blobs>{azure}</Blobs></EnumerationResults>"
            if "comp=list" in self.path
            else f"<ListBucketResult>{google}</ListBucketResult>"
        )
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class S3Server:
    """moto's S3 server with one bucket, in its own process."""

    def __init__(self) -> None:
        self.address = ("127.0.0.1", _free_port())
        self.url = f"http://127.0.0.1:{self.address[1]}"
        command = ["moto.server", "-H", "127.0.0.1", "-p", str(self.address[1])]
        self._process = _start(command, self.address)
        self._put("")

    def upload(self, folder: Path, prefix: str) -> str:
        """Upload the files of a folder; return their location."""
        for path in folder.iterdir():
            self._put(f"{prefix}/{path.name}", path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def close(self) -> None:
        _stop(self._process)

    def _put(self, key: str, content: bytes = b"") -> None:
        request = urllib.request.Request(f"{self.url}/{BUCKET}/{key}".rstrip("/"), data=content, method="PUT")
        # moto reads the region from the credentials' scope and does not check the signature.
        request.add_header(
            "Authorization", "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"
        )
        request.add_header("Content-Type", "application/x-tar")
        with urllib.request.urlopen(request, timeout=30):
            pass


def _start(module: list[str], address: tuple[str, int]) -> subprocess.Popen[bytes]:
    """Run a Python module that is a server, and wait until it responds."""
    process = subprocess.Popen(
        [sys.executable, "-m", *module], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, **CREDENTIALS},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not _answers(address):
        if process.poll() is not None or time.monotonic() > deadline:
            _stop(process)
            raise RuntimeError(f"{module[0]} did not start")
        time.sleep(0.1)
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)


def _answers(address: tuple[str, int]) -> bool:
    connection = http.client.HTTPConnection(*address, timeout=2)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status > 0
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
