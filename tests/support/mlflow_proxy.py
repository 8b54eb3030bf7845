"""Stand between a client and a real MLflow server: slow, failing, or losing answers."""

from __future__ import annotations

import http.server
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable


class MlflowProxy:
    """Forwards requests to a server, after `delay` seconds; with a `token`, only those that have it.

    `fails` decides by the path which requests are answered with 500 and not forwarded; `loses`, which are forwarded
    and answered with 500.
    """

    def __init__(self, target: str) -> None:
        self.delay = 0.0
        self.token: str | None = None
        self.fails: Callable[[str], bool] = lambda path: False
        self.loses: Callable[[str], bool] = lambda path: False
        self.paths: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.paths.append(self.path)
                time.sleep(outer.delay)
                code, content = (500, b"{}") if outer.fails(self.path) else self.forward(body)
                if outer.token is not None and self.headers.get("Authorization") != f"Bearer {outer.token}":
                    code, content = 401, b'{"error_code": "UNAUTHENTICATED", "message": "no token"}'
                if outer.loses(self.path):
                    code, content = 500, b"{}"
                self.send_response(code)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def forward(self, body: bytes) -> tuple[int, bytes]:
                headers = {key: value for key, value in self.headers.items() if key.lower() != "host"}
                request = urllib.request.Request(
                    target + self.path, data=body or None, headers=headers, method=self.command
                )
                try:
                    with urllib.request.urlopen(request, timeout=30) as response:
                        return int(response.status), response.read()
                except urllib.error.HTTPError as error:
                    return error.code, error.read()

            do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
