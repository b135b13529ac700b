"""Networks that a server keeps, as the client hands them out: callable, and named by their content."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from numpy.typing import ArrayLike

from convservice.dtypes import DTypeLike
from convservice.errors import InvalidRequest, Reason
from convservice.layers import Layer
from convservice.network import Network
from convservice.progress import ProgressLike
from convservice.wire.headers import TensorReport


class _Registered:
    """What both kinds of registered networks have.

    Attributes:
        network: the layers; from `ConvClient.network` their weights are known by digest alone.
    """

    def __init__(self, network: Network) -> None:
        self.network = network

    @property
    def name(self) -> str:
        """`networks/sha256-...`, the same on every server."""
        return self.network.name

    @property
    def digest(self) -> bytes:
        """The SHA-256 in the name, 32 bytes."""
        return self.network.digest

    def output_shape(self, input_shape: Sequence[int]) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
        """The shape of the result for an input (N, C, *spatial) or (C, *spatial); a dict for several."""
        return self.network.output_shape(input_shape)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class RegisteredNetwork(_Registered):
    """A network that the server keeps; call it with an array. Made by `ConvClient.register`."""

    def __init__(self, run: Callable[..., Any], network: Network) -> None:
        super().__init__(network)
        self._run = run

    def __call__(
        self,
        x: ArrayLike,
        *,
        data_format: str = "channels_first",
        out_dtype: DTypeLike | None = None,
        precision: str = "high",
        backend: str | None = None,
        timeout: float | None = None,
        progress: ProgressLike = None,
        on_report: Callable[[TensorReport], None] | None = None,
    ) -> Any:
        """What `ConvClient.run` hands back for this network and `x`."""
        return self._run(
            self,
            x,
            data_format=data_format,
            out_dtype=out_dtype,
            precision=precision,
            backend=backend,
            timeout=timeout,
            progress=progress,
            on_report=on_report,
        )


class AsyncRegisteredNetwork(_Registered):
    """A network that the server keeps; await its call. Made by `AsyncConvClient.register`."""

    def __init__(self, run: Callable[..., Awaitable[Any]], network: Network) -> None:
        super().__init__(network)
        self._run = run

    async def __call__(
        self,
        x: ArrayLike,
        *,
        data_format: str = "channels_first",
        out_dtype: DTypeLike | None = None,
        precision: str = "high",
        backend: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the limit travels to the server
        progress: ProgressLike = None,
        on_report: Callable[[TensorReport], None] | None = None,
    ) -> Any:
        """What `AsyncConvClient.run` hands back for this network and `x`."""
        return await self._run(
            self,
            x,
            data_format=data_format,
            out_dtype=out_dtype,
            precision=precision,
            backend=backend,
            timeout=timeout,
            progress=progress,
            on_report=on_report,
        )


NetworkLike = Network | Layer | RegisteredNetwork | AsyncRegisteredNetwork
"""What `run`, `map`, `stream` and `register` take: a network, a registered one, or a single layer."""


def network_of(value: NetworkLike) -> Network:
    """The network that a user's argument stands for.

    Raises:
        InvalidRequest: it is none of these.
    """
    if isinstance(value, Network):
        return value
    if isinstance(value, _Registered):
        return value.network
    if isinstance(value, Layer):
        return Network([value])
    raise InvalidRequest(
        f"network must be a Network, a registered network or a Layer, not {type(value).__name__}",
        reason=Reason.INVALID_NETWORK,
        field="network",
    )


def name_of(value: NetworkLike | str) -> str:
    """The name of a network, or the name itself."""
    return value if isinstance(value, str) else network_of(value).name
