"""The trial: whether a backend gives the worked example's answer.

Given a backend, `try_worked_example` sends the 5x5 input with its nine known neurons through it, and raises
what is wrong. All numbers are small integers: a backend gives them exactly, or cannot be trusted with others.
"""

from __future__ import annotations

import numpy as np

from convservice.errors import BackendUnavailable, ConvServiceError, Reason
from convservice.layers import Conv
from convservice.network import Network
from convservice.wire.enums import Precision
from convservice.worked_example import FEATURE_MAP, INPUT, WEIGHT
from convservice_backends.interface import Backend
from convservice_backends.session import run


def try_worked_example(backend: Backend, samples: int = 1) -> None:
    """Runs the worked example and compares the answer.

    Args:
        backend: which.
        samples: how many times, in one batch: a backend of several devices gives each a sample.

    Raises:
        BackendUnavailable: it could not be run, or an answer is wrong.
    """
    x = np.repeat(INPUT[None, None], samples, axis=0)
    network = Network([Conv(WEIGHT[None, None])])
    try:
        (answers,) = run(backend.prepare(network, Precision.HIGH), x).values()
    except ConvServiceError as exc:
        raise BackendUnavailable(
            f"the trial with the worked example failed: {exc.message}", reason=Reason.BACKEND_UNAVAILABLE
        ) from exc
    for answer in answers[:, 0]:
        if not np.array_equal(answer, FEATURE_MAP):
            raise BackendUnavailable(
                f"the trial gave {answer.tolist()} for the worked example, expected {FEATURE_MAP.tolist()}",
                reason=Reason.BACKEND_UNAVAILABLE,
            )
