"""The server's certificate, and whose certificates clients must show.

Given the paths that the settings name, `Certificates` checks that the files fit one another and hands on
their bytes, read anew once they have been replaced: connections that are there keep what they have, new ones
get the new certificate.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import NamedTuple

from convservice_server.config import ServerConfig
from convservice_server.files import Replaceable, wrong_file

_CERTIFICATE, _KEY, _CLIENT_CA = "tls_certificate", "tls_key", "tls_client_ca"


class Pems(NamedTuple):
    """PEM texts.

    Attributes:
        certificate: the server's, and the chain up to its authority.
        key: its private key.
        client_ca: the authorities whose certificates clients must show; None where they need none.
    """

    certificate: bytes
    key: bytes
    client_ca: bytes | None


class Certificates:
    """The server's certificate, key, and the authorities of its clients.

    Args:
        certificate: path of the certificate.
        key: path of its private key.
        client_ca: path of the clients' authorities; None where clients need no certificate.

    Raises:
        InvalidRequest: a file cannot be read, is not what it should be, or the key is of another certificate.
    """

    def __init__(self, certificate: str, key: str, client_ca: str | None = None) -> None:
        self._paths = {_CERTIFICATE: certificate, _KEY: key}
        if client_ca is not None:
            self._paths[_CLIENT_CA] = client_ca
        self._pems = Replaceable(self._paths, self._checked, 0.0)
        self.asks_clients = client_ca is not None

    @classmethod
    def of(cls, config: ServerConfig) -> Certificates | None:
        """What the settings name; None where the server speaks plaintext.

        Raises:
            InvalidRequest: as the constructor.
        """
        if config.tls_certificate is None or config.tls_key is None:
            return None
        return cls(config.tls_certificate, config.tls_key, config.tls_client_ca)

    def current(self) -> Pems:
        """The newest that are whole; the same object for as long as nothing has changed."""
        return self._pems.current()

    def _checked(self, files: Mapping[str, bytes]) -> Pems:
        """The files' bytes, unless TLS could not use them. `Replaceable` sees to it that the files which are
        read here by path are those whose bytes came."""
        for setting in (_CERTIFICATE, _CLIENT_CA):
            if setting in files and not _holds_certificates(files[setting]):
                raise wrong_file(setting, self._paths[setting], "it holds no certificate in PEM form")
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._paths[_CERTIFICATE], self._paths[_KEY], self._no_password)
        except ssl.SSLError as exc:
            why = f"it holds no private key in PEM form ({exc.reason or exc})"
            if exc.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
                why = f"it is not the key of {_CERTIFICATE} {self._paths[_CERTIFICATE]}"
            raise wrong_file(_KEY, self._paths[_KEY], why) from exc
        except OSError as exc:
            raise wrong_file(_KEY, self._paths[_KEY], f"it cannot be read: {exc.strerror or exc}") from exc
        return Pems(files[_CERTIFICATE], files[_KEY], files.get(_CLIENT_CA))

    def _no_password(self) -> str:
        raise wrong_file(_KEY, self._paths[_KEY], "it is encrypted; the server needs it without a password")


def _holds_certificates(data: bytes) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(cadata=data.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError):
        return False
    return True
