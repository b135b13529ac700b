"""The port on which Prometheus reads: one page over HTTP/1.1, nothing else.

Given a registry of prometheus-client, `MetricsPort` answers `GET /metrics` in the format that is asked for
(Prometheus's text, or OpenMetrics). Whoever connects takes a thread, so there are few connections: one more
ends the one that has been there longest, so that those who only hold theirs shut nobody out. Threads are
daemons: a scraper that hangs holds up no stop.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from convservice_server.config import split_address
from convservice_server.listening import cannot_listen

log = logging.getLogger(__name__)

PATH = "/metrics"

MOST_CONNECTIONS = 16
"""At the same time."""

_SILENCE = 30.0
"""Seconds after which a connection on which nothing comes is closed."""


class MetricsPort:
    """Answers scrapes.

    Args:
        address: `HOST:PORT` to listen on; port 0 picks a free one.
        registry: what a page is made of.

    Attributes:
        port: where it listens.

    Raises:
        ServiceUnavailable: the address cannot be listened on.
    """

    def __init__(self, address: str, registry: CollectorRegistry) -> None:
        host, port = split_address(address, "metrics")
        host = host.strip("[]")

        class Handler(_Handler):
            pages = registry

        class Listener(_Listener):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        try:
            self._http = Listener((host, port), Handler)
        except OSError as exc:
            raise cannot_listen("metrics", address, exc) from exc
        self.port = int(self._http.server_address[1])
        self._thread = threading.Thread(target=self._http.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Listens no more, and hangs up; more than once does no harm."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        self._http.hang_up(0)


class _Listener(ThreadingHTTPServer):
    """Accepts connections, each with a thread of its own."""

    daemon_threads = True
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._lock = threading.Lock()  # guards the two below
        self._open: dict[Any, None] = {}  # the oldest first
        self._failed = False
        super().__init__(address, handler)

    def hang_up(self, but: int) -> None:
        """Ends connections, the oldest first, but for so many."""
        with self._lock:
            for connection in list(self._open)[: max(0, len(self._open) - but)]:
                del self._open[connection]
                with suppress(OSError):  # it has just ended by itself
                    connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Takes a connection."""
        with self._lock:
            self._open[request] = None
        self.hang_up(MOST_CONNECTIONS)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """A connection has ended."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page could not be made or sent; the first that could not be made is logged."""
        error = sys.exception()
        if isinstance(error, OSError):  # the scraper's affair
            return
        with self._lock:
            first, self._failed = not self._failed, True
        if first:
            log.error("the metrics page failed; that it does so again is not logged", exc_info=error)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = _SILENCE
    pages: CollectorRegistry

    def do_GET(self) -> None:
        """The page."""
        if self.path.partition("?")[0] != PATH:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", f"metrics are at {PATH}\n".encode())
            return
        encoder, content_type = choose_encoder(self.headers.get("Accept", ""))
        self._answer(HTTPStatus.OK, content_type, encoder(self.pages))

    def do_HEAD(self) -> None:
        """What the page's headers would be."""
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name that the base has
        """Scrapes are not logged."""

    def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
