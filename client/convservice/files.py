"""Networks as files: weights and structure in one file that verifies itself.

Given a network, `save` writes its weights as tensors of a safetensors file, named after their layers
(`layer0.weight`), and its structure as JSON in that file's metadata: the canonical form, which says every
number of the geometry, and the network's name, which is the hash of that form and of the weights. `load`
hands back a network of the same name, or refuses the file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

from convservice.canonical import network_from_canonical
from convservice.errors import InvalidRequest, Reason
from convservice.network import Network
from convservice.registered import NetworkLike, network_of
from convservice.tensorfile import damaged, read, unique_keys, write
from convservice.tensors import Tensor

VERSION = 1
"""Of what the metadata holds; a file of a later one is refused."""

SUFFIX = ".safetensors"
"""How the name of such a file ends by custom; any name will do."""

_TEXT = "convservice"


def save(network: NetworkLike, path: str | os.PathLike[str]) -> None:
    """Writes a network to a file: every layer with its geometry and weights.

    The file is written beside `path` and moved there when it is complete. The same network gives the same
    bytes.

    Args:
        network: a network, a registered one whose weights are known here, or a single layer.
        path: by custom it ends with `.safetensors`; a file that is there is replaced.

    Raises:
        NetworkNotFound: the network came from a server, which keeps its weights.
        OSError: the file cannot be written.
    """
    found = network_of(network)
    structure = {"version": VERSION, "name": found.name, "network": json.loads(found.canonical())}
    text = json.dumps(structure, separators=(",", ":"), sort_keys=True)
    write(Path(path), _named(found), {_TEXT: text})


def load(path: str | os.PathLike[str]) -> Network:
    """The network in a file that `save` wrote.

    Raises:
        OSError: there is no such file, or it cannot be read.
        InvalidRequest: `INVALID_FILE` for a file that is no network, damaged, of a later version, or with
            weights or a name that are not those of its structure; `UNKNOWN_LAYER` for a layer that this
            version does not know. The message names the file.
    """
    where = Path(path)
    tensors, texts = read(where)
    structure = _structure(texts, where)
    by_digest = {tensor.digest.hex(): tensor for tensor in tensors.values()}
    used: set[str] = set()

    def resolve(digest: str) -> Tensor:
        if digest not in by_digest:
            raise damaged(where, f"its structure names weights sha256-{digest}, which it does not hold")
        used.add(digest)
        return by_digest[digest]

    try:
        network = network_from_canonical(structure.get("network"), resolve)
    except InvalidRequest as exc:
        raise InvalidRequest(
            exc.message if str(where) in exc.message else f"{where}: {exc.message}",
            reason=exc.reason,
            metadata={**exc.metadata, "path": str(where)},
            field=exc.field,
        ) from exc
    if network.name != structure.get("name"):
        raise damaged(where, f"it says it is {structure.get('name')}, its content is {network.name}")
    if len(used) != len(tensors):
        raise damaged(where, f"it holds {len(tensors)} tensors, its structure names {len(used)}")
    return network


def _named(network: Network) -> dict[str, Tensor]:
    """The weight tensors of a network, each once, under the layer that first uses it and what it is there."""
    found: dict[str, Tensor] = {}
    seen: set[bytes] = set()
    for node in network.nodes:
        by_digest = {tensor.digest.hex(): tensor for tensor in node.layer.tensors}
        for key, value in node.layer.canonical().items():
            tensor = by_digest.get(value) if isinstance(value, str) else None
            if tensor is not None and tensor.digest not in seen:
                seen.add(tensor.digest)
                found[f"{node.id}.{key}"] = tensor
    return found


def _structure(texts: dict[str, str], path: Path) -> dict[str, Any]:
    """What the file says of its network, of a version that is known here."""
    if _TEXT not in texts:
        raise damaged(path, f"its metadata has no {_TEXT!r}: it holds tensors and no network")
    try:
        structure: Any = json.loads(texts[_TEXT], object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as exc:
        raise damaged(path, f"the {_TEXT!r} in its metadata is no JSON") from exc
    stated = cast("dict[str, Any]", structure) if isinstance(structure, dict) else {}
    version = stated.get("version")
    if type(version) is not int or version < 1:
        raise damaged(path, f"its version is {version!r}")
    if version > VERSION:
        raise InvalidRequest(
            f"{path} is a network file of version {version}; this convservice reads up to version {VERSION}:"
            " a newer one is needed",
            reason=Reason.INVALID_FILE,
            metadata={"path": str(path), "version": str(version), "supported": str(VERSION)},
        )
    return stated
