"""Sparse autoencoders as folders with cfg.json and sae_weights.safetensors, as SAELens writes and reads them."""

__all__ = ["load_sae", "save_sae"]

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from theodolite.activations.dictionary.autoencoder import Kind, SparseAutoencoder
from theodolite.core.errors import DataError, ModelError
from theodolite.core.files import make_folder, read_json, write_bytes, write_json

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_KINDS: dict[str, Kind] = {"standard": "vanilla", "gated": "gated", "topk": "topk"}
_NAMES = {"vanilla": "standard", "attribution": "standard", "gated": "gated", "topk": "topk"}


def load_sae(path: str | Path) -> SparseAutoencoder:
    """A SAELens folder (architectures standard, gated and topk) as a `SparseAutoencoder`, on local files alone.

    Raises DataError where a file is missing or broken, ModelError naming what the folder asks for that is not known here.
    """
    folder = Path(path)
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise DataError(f"{folder} holds no {name}; a SAELens folder has {_CONFIG} and {_WEIGHTS}")
    about = read_json(folder / _CONFIG)
    if not isinstance(about, dict):
        raise DataError(f"{folder / _CONFIG} is no table of settings")
    kind = _kind(folder, about)
    try:
        weights = safetensors.torch.load_file(folder / _WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{folder / _WEIGHTS} cannot be read: {error}") from error
    biases = ("b_gate", "b_mag", "r_mag") if kind == "gated" else ("b_enc",)
    missing = [name for name in ("W_enc", "W_dec", "b_dec", *biases) if name not in weights]
    if missing:
        raise DataError(f"{folder / _WEIGHTS} has no {', '.join(missing)}; it has: {', '.join(sorted(weights))}")
    return _made(folder, about, kind, {name: value.float() for name, value in weights.items()}, biases)


def _made(
    folder: Path, about: dict[str, Any], kind: Kind, weights: dict[str, Tensor], biases: tuple[str, ...]
) -> SparseAutoencoder:
    decoder, encoder = weights["W_dec"], weights["W_enc"]
    d, n = encoder.shape if encoder.ndim == 2 else (0, 0)
    shapes = {"W_dec": (n, d), "b_dec": (d,), **dict.fromkeys(biases, (n,))}
    wrong = {name: tuple(weights[name].shape) for name, shape in shapes.items() if tuple(weights[name].shape) != shape}
    if wrong or (about.get("d_in", d), about.get("d_sae", n)) != (d, n):
        raise DataError(
            f"{folder}: W_enc is {tuple(encoder.shape)}, with which {wrong or 'd_in and d_sae in ' + _CONFIG} do not go together"
        )
    if kind == "topk" and about.get("rescale_acts_by_decoder_norm"):
        norms = decoder.norm(dim=1)
        encoder, decoder = encoder * norms, decoder / norms[:, None]
        weights["b_enc"] = weights["b_enc"] * norms
    if not about.get("apply_b_dec_to_input", True):  # here b_dec is always taken off, so it is put back into the bias
        back = weights["b_dec"] @ encoder
        if kind == "gated":
            weights["b_gate"] = weights["b_gate"] + back
            weights["b_mag"] = weights["b_mag"] + back * weights["r_mag"].exp()
        else:
            weights["b_enc"] = weights["b_enc"] + back
    sae = SparseAutoencoder(d, n, kind, k=_k(folder, about) if kind == "topk" else None)
    given = weights | {"W_enc": encoder, "W_dec": decoder}
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(given[name])
        sae.steps.fill_(1)  # it is trained: training further must not move its scale and b_dec
    return sae


def _kind(folder: Path, about: dict[str, Any]) -> Kind:
    architecture = about.get("architecture", "standard")
    if architecture == "standard" and str(about.get("activation_fn", about.get("activation_fn_str", "relu"))) == "topk":
        architecture = "topk"  # as older versions wrote it
    if architecture not in _KINDS:
        raise ModelError(f"{folder} is of the architecture {architecture!r}; known are {', '.join(_KINDS)}")
    normalized = about.get("normalize_activations", "none")
    if normalized not in ("none", None):
        raise ModelError(
            f"{folder} expects activations normalised by {normalized!r}; fold that factor into its weights first "
            "(fold_activation_norm_scaling_factor in SAELens)"
        )
    return _KINDS[architecture]


def _k(folder: Path, about: dict[str, Any]) -> int:
    k = about.get("k", (about.get("activation_fn_kwargs") or {}).get("k"))
    if not isinstance(k, int):
        raise DataError(f"{folder / _CONFIG} does not say how many latents are on (k)")
    return k


@torch.no_grad()
def save_sae(sae: SparseAutoencoder, path: str | Path) -> Path:
    """Write ``sae`` as a SAELens folder; its scale goes into the weights, so that it takes activations as they are."""
    folder = make_folder(Path(path))
    scale = sae.scale
    weights = {name: value.detach().cpu().contiguous() for name, value in sae.named_parameters()}
    weights |= {
        "W_enc": (sae.W_enc * scale).cpu().contiguous(),
        "W_dec": (sae.W_dec / scale).cpu().contiguous(),
        "b_dec": (sae.b_dec / scale).cpu().contiguous(),
    }
    about: dict[str, Any] = {
        "architecture": _NAMES[sae.kind], "d_in": sae.d, "d_sae": sae.n_latents, "dtype": "float32",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
    }  # fmt: skip
    if sae.kind == "topk":
        about |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    write_bytes(folder / _WEIGHTS, safetensors.torch.save(weights))
    write_json(folder / _CONFIG, about)
    return folder
