"""Both clients behind one face, so that a test of what they share is written once.

`Blocking` is given a client of either kind and has the sync one's methods. An async client's loop runs only
while a method waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import convservice
from convservice import AsyncConvClient, ConvClient

T = TypeVar("T")


class Blocking:
    """A client of either kind, used synchronously."""

    def __init__(self, kind: str, target: Any, **options: Any) -> None:
        connect: Any = convservice.connect if kind == "sync" else convservice.connect_async
        self.client: ConvClient | AsyncConvClient = connect(target, **options)
        self._runner = asyncio.Runner()  # makes its loop when it is first used

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def call(*args: Any, **options: Any) -> Any:
            found: Any = method(*args, **options)
            if hasattr(found, "__await__"):
                return self.wait(found)
            return self._each(found) if hasattr(found, "__anext__") else found

        return call

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def _each(self, found: AsyncGenerator[T]) -> Iterator[T]:
        async def following() -> T:
            return await anext(found)

        try:
            while True:
                try:
                    item = self.wait(following())
                except StopAsyncIteration:
                    return
                yield item
        finally:
            self.wait(found.aclose())

    def shut(self) -> None:
        self.close()
        self._runner.close()


Connect = Callable[..., Blocking]
"""Makes a client of a target, with the options that `connect` takes."""
