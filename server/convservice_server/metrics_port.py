"""The port on which Prometheus reads: one page over HTTP/1.1, nothing else.

Given a registry of prometheus-client, `MetricsPort` answers `GET /metrics` in the format that is asked for
(Prometheus's text, or OpenMetrics). Its threads are daemons, so that a scraper that hangs holds up no stop.
"""

from __future__ import annotations

import socket
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from convservice_server.config import split_address
from convservice_server.listening import cannot_listen

PATH = "/metrics"

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

        class Listener(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True

        try:
            self._http = Listener((host, port), Handler)
        except OSError as exc:
            raise cannot_listen("metrics", address, exc) from exc
        self.port = int(self._http.server_address[1])
        self._thread = threading.Thread(target=self._http.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Listens no more; more than once does no harm."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


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
