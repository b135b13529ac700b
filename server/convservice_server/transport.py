"""gRPC's side of TLS: a server's credentials that follow its certificate's files."""

from __future__ import annotations

from typing import Any, cast

import grpc

from convservice_server.tls import Certificates, Pems


def credentials(certificates: Certificates) -> grpc.ServerCredentials:
    """Credentials of a server; every new connection is given the newest certificate."""
    given = certificates.current()

    def newest() -> grpc.ServerCertificateConfiguration | None:
        """gRPC asks before each handshake, one at a time; None for no change."""
        nonlocal given
        pems = certificates.current()
        if pems is given:
            return None
        given = pems
        return _configuration(pems)

    untyped = cast("Any", grpc)  # whose stubs do not know that None may come
    made: grpc.ServerCredentials = untyped.dynamic_ssl_server_credentials(
        _configuration(given), newest, certificates.asks_clients
    )
    return made


def _configuration(pems: Pems) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pems.key, pems.certificate)], pems.client_ca)
