"""What a session on a device lends to operators: a stream, working memory, a check between launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from convservice_backends.interface import Check

if TYPE_CHECKING:
    from convservice_backends.cuda.device import DeviceInfo, Memory, Stream


@dataclass(frozen=True)
class DeviceWorkspace:
    """One session's stream and working memory.

    Attributes:
        stream: on which operators launch.
        scratch: working memory for one launch at a time; None where no operator of the network wants any.
        info: the device.
        check: raises when the work is no longer wanted.
    """

    stream: Stream
    scratch: Memory | None
    info: DeviceInfo
    check: Check
