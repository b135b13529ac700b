"""Weights coming in: tensors put one by one, and networks with what travels inline.

Given the messages of `PutWeights` or a network's message, this checks them against digests and limits and
hands the tensors and networks to the store.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from convservice.errors import InvalidRequest, Reason, ResourceExhausted
from convservice.network import MAX_NODES, Network
from convservice.tensors import Tensor
from convservice.v1 import conv_pb2 as pb
from convservice.wire.networks import network_from_proto
from convservice.wire.weights import reference_from_proto, weight_from_proto
from convservice_server.calls import Call
from convservice_server.store import Store


def put_weights(store: Store, requests: Iterator[pb.PutWeightsRequest], call: Call) -> bytes:
    """Takes one tensor and keeps it under a lease; its bytes are not read if it is here already.

    Returns:
        Its digest.

    Raises:
        InvalidRequest: `FRAMING` for messages out of order, `PAYLOAD_SIZE` for too many or too few bytes,
            `TENSOR_MISMATCH` for bytes of another digest.
        ResourceExhausted: `WEIGHTS_BUDGET`, at the header.
    """
    first = next(requests, None)
    if first is None or first.WhichOneof("message") != "header":
        raise _framing("the first message of PutWeights must hold the header")
    reference = reference_from_proto(first.header.tensor, "tensor")
    if store.renew(call.owner, reference):
        return reference.digest
    native, packed = reference.dtype.numpy, reference.dtype.packed  # refused here if its package is missing
    with store.promise(call.owner, reference.nbytes) as keep:
        data = np.empty(reference.nbytes, dtype=np.uint8)
        at = 0
        for request in requests:
            if request.WhichOneof("message") != "chunk":
                raise _framing("after its header PutWeights takes chunks alone")
            chunk = request.chunk
            if at + len(chunk) > len(data):
                raise _wrong_size(reference, at + len(chunk), "at least ")
            data[at : at + len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)
            at += len(chunk)
            call.check()
        call.check()
        if at != len(data):
            raise _wrong_size(reference, at, "")
        tensor = Tensor.adopt(data.view(packed).reshape(reference.shape).astype(native, copy=False))
        if tensor.digest != reference.digest:
            raise InvalidRequest(
                f"the bytes sent have the digest {tensor.digest.hex()}, the header says"
                f" {reference.digest.hex()}",
                reason=Reason.TENSOR_MISMATCH,
                metadata={"digest": tensor.digest.hex(), "expected": reference.digest.hex()},
                field="digest",
            )
        keep(tensor)
    return reference.digest


def register(store: Store, message: pb.InlineNetwork, owner: str, inline_limit: int) -> Network:
    """Builds a network from its structure, inline weights and those put before, and keeps it.

    Raises:
        InvalidRequest: the structure or a weight breaks a rule.
        ResourceExhausted: `NETWORK_TOO_LARGE`, `INLINE_TOO_LARGE` or `WEIGHTS_BUDGET`.
        NetworkNotFound: `WEIGHTS_MISSING`, with the digests to put first.
    """
    if len(message.network.nodes) > MAX_NODES:
        raise ResourceExhausted(
            f"a network has at most {MAX_NODES} nodes, this has {len(message.network.nodes)}",
            reason=Reason.NETWORK_TOO_LARGE,
            metadata={"nodes": str(len(message.network.nodes)), "limit": str(MAX_NODES)},
        )
    size = sum(len(weight.data) for weight in message.weights)
    if size > inline_limit:
        raise ResourceExhausted(
            f"weights carried inline have at most {inline_limit} bytes together, these have {size}: send them"
            " by PutWeights",
            reason=Reason.INLINE_TOO_LARGE,
            metadata={"bytes": str(size), "limit": str(inline_limit)},
        )
    brought = {tensor.digest: tensor for tensor in map(weight_from_proto, message.weights)}
    structure = network_from_proto(message.network)
    with store.tensors(owner, structure.tensors, brought) as tensors:
        network = network_from_proto(message.network, lambda reference: tensors[reference.digest])
        store.add(owner, network)
    return network


def _framing(message: str) -> InvalidRequest:
    return InvalidRequest(message, reason=Reason.FRAMING)


def _wrong_size(reference: Tensor, got: int, more: str) -> InvalidRequest:
    return InvalidRequest(
        f"a weight tensor of shape {reference.shape} {reference.dtype} has {reference.nbytes} bytes,"
        f" {more}{got} were sent",
        reason=Reason.PAYLOAD_SIZE,
        metadata={"expected": str(reference.nbytes), "bytes": str(got)},
        field="chunk",
    )
