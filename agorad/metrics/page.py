"""The page that Prometheus fetches: ``GET /metrics`` over HTTP, from a thread of its own.

So it answers when the event loop does not, and shows that it does not. Read-only; ``/`` names the page.
Limits: ``CLIENTS`` requests at once, more are turned away with 503; ``CLIENT_S`` for each part of a request
to come and of the answer to go. On a loopback address requests that name another host are refused, so that
no web page in a browser of this machine reads it by having its own name point here.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from p2p.errors import LocalError

CLIENTS: Final = 8
CLIENT_S: Final = 5.0
CLOSE_S: Final = 2.0
RETRY_S: Final = 0.5
LOCAL_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})


class Page:
    """Serves a registry until ``close``. Raises LocalError where the address cannot be had."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        kind = _Server6 if ":" in host else _Server
        try:
            self._server = kind((host, port), _Handler)
        except OSError as error:
            raise LocalError(
                f"metrics are not served: {host} port {port}: {error.strerror}; set metrics.listen"
            ) from error
        loopback = ipaddress.ip_address(host).is_loopback
        self._server.set_app(_application(registry, LOCAL_NAMES if loopback else None))
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}/metrics"
        self._host = host
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give the address back."""
        self._closing = True
        try:  # a last visitor, for whom the thread wakes up
            socket.create_connection((self._host, self._server.server_port), timeout=0.2).close()
        except OSError:
            pass
        self._thread.join(CLOSE_S)
        self._server.server_close()

    def _serve(self) -> None:
        while not self._closing:
            try:
                self._server.handle_request()
            except Exception:
                time.sleep(RETRY_S)  # no descriptor or no thread to be had; whoever fetches comes again


Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def _application(registry: CollectorRegistry, names: frozenset[str] | None) -> Application:
    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        status, kind, body = "200 OK", "text/plain; charset=utf-8", b""
        host = environ.get("HTTP_HOST", "").rpartition("@")[2]
        named = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            status, body = "405 Method Not Allowed", b"read-only\n"
        elif names is not None and named and named.lower() not in names:
            status, body = "403 Forbidden", b"this address is for this machine only\n"
        elif environ["PATH_INFO"] == "/metrics":
            kind, body = CONTENT_TYPE_LATEST, generate_latest(registry)
        elif environ["PATH_INFO"] in ("", "/"):
            body = b"agorad: figures for Prometheus are at /metrics\n"
        else:
            status, body = "404 Not Found", b"there is only /metrics\n"
        start(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return answer


class _Server(WSGIServer):
    """A thread a request, ``CLIENTS`` of them."""

    def __init__(self, *args: Any) -> None:
        self._places = threading.BoundedSemaphore(CLIENTS)
        super().__init__(*args)

    def server_bind(self) -> None:
        # Not the standard one, which asks the name service for this host's name.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "localhost", self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            try:
                request.settimeout(0.1)
                request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
            except OSError:
                pass
            self.shutdown_request(request)
            return
        thread = threading.Thread(target=self._attend, args=(request, client_address), daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads to be had
            self._places.release()
            self.shutdown_request(request)

    def _attend(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except Exception:
            pass  # a client that went away, or sent rubbish
        finally:
            self.shutdown_request(request)
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: stderr is the log's."""


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: stderr is the log's."""

    def get_stderr(self) -> Any:
        return _Nowhere()


class _Nowhere:
    def write(self, _text: str) -> None:
        """Nothing is said."""

    def flush(self) -> None:
        """Nothing is kept."""
