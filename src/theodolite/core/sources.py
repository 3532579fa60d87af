"""Where real data and pretrained weights are found on this machine."""

__all__ = ["data_folder", "find_data"]

import os
from pathlib import Path


def data_folder() -> Path | None:
    """The folder that the environment variable THEODOLITE_DATA names, where it is set and there."""
    named = os.environ.get("THEODOLITE_DATA")
    folder = Path(named).expanduser() if named else None
    return folder if folder is not None and folder.is_dir() else None


def find_data(name: str) -> Path | None:
    """The file ``name`` ("mnist.npz", "lfa/x.csv") in the data folder, or None where it is not there."""
    folder = data_folder()
    path = folder / name if folder is not None else None
    return path if path is not None and path.exists() else None
