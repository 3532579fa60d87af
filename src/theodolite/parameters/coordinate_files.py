"""A network on disk as a few coordinates: what rebuilds it, the numbers, and its buffers, without the weights themselves."""

__all__ = ["fingerprint", "read_coordinates", "restore_buffers", "write_coordinates"]

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor, nn

from theodolite.core.errors import ModelError
from theodolite.core.files import write_bytes


def write_coordinates(
    path: str | Path, about: Mapping[str, Any], arrays: Mapping[str, Tensor], module: nn.Module
) -> None:
    """Write ``about`` (JSON), the ``arrays`` by name and the buffers of ``module`` that its state dict has, as one npz file."""
    held = {"about": np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)}
    held |= {name: array.detach().cpu().numpy() for name, array in arrays.items()}
    held |= {f"buffer {name}": _bytes(buffer) for name, buffer in _kept_buffers(module).items()}
    file = io.BytesIO()
    np.savez(file, **held)  # type: ignore[arg-type]
    write_bytes(Path(path), file.getvalue())


def read_coordinates(path: str | Path, wanted: set[str], what: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `write_coordinates` wrote: ``about``, which must hold the keys ``wanted``, and the arrays, "coordinates" with them.

    Raises ModelError, saying that the file is no saved ``what``.
    """
    try:
        with open(path, "rb") as file:  # what is no archive of arrays makes NpzFile fail at once
            arrays = dict(NpzFile(file, allow_pickle=False))
        about = json.loads(arrays["about"].tobytes())
        coordinates = arrays["coordinates"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path} is not a saved {what}: {error}") from error
    if not isinstance(about, dict) or wanted - about.keys() or coordinates.ndim != 1:
        raise ModelError(f"{path} is not a saved {what}: it must hold coordinates and {', '.join(sorted(wanted))}")
    return about, arrays


@torch.no_grad()
def restore_buffers(path: str | Path, arrays: Mapping[str, np.ndarray], module: nn.Module) -> None:
    """Put the buffers of the file back into ``module``; ModelError where it has others."""
    for name, buffer in _kept_buffers(module).items():
        stored = arrays.get(f"buffer {name}")
        if stored is None or stored.size != _bytes(buffer).size:
            raise ModelError(f"{path} was saved for another architecture: it has no buffer like {name}")
        buffer.copy_(torch.from_numpy(stored.copy()).view(buffer.dtype).view(buffer.shape))


def fingerprint(module: nn.Module) -> str:
    """Of every parameter's name, shape and value: what is outside the subspace has to be the same too."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(_bytes(parameter).data)
    return digest.hexdigest()[:16]


def _kept_buffers(module: nn.Module) -> dict[str, Tensor]:
    kept = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
