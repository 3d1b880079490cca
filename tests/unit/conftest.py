"""Servers that give one answer."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

Asked = list[tuple[str, bytes]]
"""Path and body of each request."""


@pytest.fixture(scope="session")
def answers() -> Callable[..., AbstractContextManager[tuple[str, Asked]]]:
    """Return a function that runs a server on the loopback; it gives the address, and what the server was asked."""
    return _answers


@contextmanager
def _answers(text: bytes, status: int = 200, *, pause: float = 0.0, **headers: str) -> Iterator[tuple[str, Asked]]:
    """pause: seconds between bytes."""
    asked: Asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.path, self.rfile.read(int(self.headers["Content-Length"] or 0))))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            for part in [text[at : at + 1] for at in range(len(text))] if pause else [text]:
                self.wfile.write(part)
                time.sleep(pause)

        do_GET = do_POST

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()
