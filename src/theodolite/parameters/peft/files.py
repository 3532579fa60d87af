"""Changes on disk: a folder with a description and one safetensors file; LoRA in the format of the peft library.

LoRA folders hold adapter_config.json and adapter_model.safetensors, with tensors called
base_model.model.NAME.lora_A.weight (r, in) and lora_B.weight (out, r), and scale lora_alpha / r.

Source: He, Zhou, Ma, Berg-Kirkpatrick, Neubig, 2022, arXiv:2110.04366; the format is that of github.com/huggingface/peft.
"""

__all__ = ["load", "save"]

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.core.files import make_folder, read_json, write_bytes, write_json
from theodolite.parameters.peft.blocks import Block, find_blocks
from theodolite.parameters.peft.changes import Bottleneck, Prefix
from theodolite.parameters.peft.model import PEFTModel, apply
from theodolite.parameters.peft.modification import PLACES, Modification

_OWN, _OWN_WEIGHTS = "theodolite_peft.json", "theodolite_peft.safetensors"
_PEFT, _PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FORMAT = 1


def save(peft_model: PEFTModel, path: str | Path) -> None:
    """Write ``peft_model`` into the folder ``path``; see `PEFTModel.save`."""
    with peft_model.enable():  # so that trained weights of the base are in place
        if _is_lora(peft_model):
            _save_lora(peft_model, Path(path))
        else:
            _save_own(peft_model, Path(path))


def load(model: nn.Module, path: str | Path, **options: Any) -> PEFTModel:
    """Put the changes in the folder ``path`` onto ``model``; see `PEFTModel.load`."""
    folder = Path(path)
    if (folder / _OWN).exists():
        return _load_own(model, folder, **options)
    if (folder / _PEFT).exists():
        return _load_lora(model, folder, **options)
    raise ModelError(f"{path} is no folder of changes: it holds neither {_OWN} nor {_PEFT}")


def _read(folder: Path, about: str, weights: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = read_json(folder / about)
        tensors = load_file(folder / weights)
    except (OSError, SafetensorError, DataError) as error:
        raise ModelError(f"{folder} cannot be read as saved changes: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder / about} must hold an object")
    return config, tensors


# ---- the package's own format


def _save_own(peft_model: PEFTModel, folder: Path) -> None:
    described = []
    for m in peft_model.modifications:
        if not isinstance(m.form, str):
            raise InputError("a form that is a Python function cannot be saved; use 'relu', 'identity' or 'softmax'")
        described.append(dataclasses.asdict(m) | {"generator": None})
    tensors = dict[str, Tensor]()
    for key, change in peft_model.changes.items():
        if isinstance(change, Prefix):  # always as plain keys and values
            tensors |= dict(zip((f"changes.{key}.key", f"changes.{key}.value"), change(), strict=True))
        else:
            tensors |= {f"changes.{key}.{name}": value for name, value in change.state_dict().items()}
    named = dict(peft_model.base.named_parameters())
    tensors |= {f"base.{name}": named[name] for name in peft_model.own_weights}
    about = {
        "format": _FORMAT,
        "model": type(peft_model.base).__name__,
        "modifications": described,
        "layers": list(peft_model.layers),
        "head": sorted(peft_model.head),
    }
    make_folder(folder)
    write_bytes(folder / _OWN_WEIGHTS, _packed(tensors))
    write_json(folder / _OWN, about)


def _packed(tensors: dict[str, Tensor]) -> bytes:
    return to_bytes({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})


def _load_own(model: nn.Module, folder: Path, **options: Any) -> PEFTModel:
    about, tensors = _read(folder, _OWN, _OWN_WEIGHTS)
    try:
        if about["format"] != _FORMAT:
            raise ModelError(f"{folder} has format {about['format']}; this version reads format {_FORMAT}")
        modifications = [Modification(**one) for one in about["modifications"]]
        layers, head, kind = [int(one) for one in about["layers"]], [str(one) for one in about["head"]], about["model"]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / _OWN} does not describe changes: {error}") from error
    named = dict(model.named_parameters())
    wanted = {name.removeprefix("base."): value for name, value in tensors.items() if name.startswith("base.")}
    for name, value in wanted.items():
        if name not in named or named[name].shape != value.shape:
            raise ModelError(f"{folder} was saved for another model ({kind}): this one has no weight like {name}")
    made = apply(model, modifications, layers=layers or None, train_head=head or False, **options)
    expected = {f"changes.{name}": value for name, value in made.changes.state_dict().items()}
    given = {name: value for name, value in tensors.items() if name.startswith("changes.")}
    if {name: value.shape for name, value in expected.items()} != {name: value.shape for name, value in given.items()}:
        made.remove()
        raise ModelError(f"{folder} was saved for another model ({kind}): its changes have other places or widths")
    made.changes.load_state_dict({name.removeprefix("changes."): value for name, value in given.items()})
    with torch.no_grad():
        for name, value in wanted.items():
            named[name].copy_(value)
    return made


# ---- the format of the peft library


def _is_lora(peft_model: PEFTModel) -> bool:
    return (
        bool(peft_model.modifications)
        and all(m.mergeable and m.composition in ("add", "scale") for m in peft_model.modifications)
        and len({m.where for m in peft_model.modifications}) == len(peft_model.modifications)
        # one width and one scale, and maps that do one thing: what one config of peft can say
        and len({(m.bottleneck, m.composition, m.scale, m.dropout) for m in peft_model.modifications}) == 1
        and all(peft_model.slot(key)[0].stop is None for key in peft_model.changes)
    )


def _save_lora(peft_model: PEFTModel, folder: Path) -> None:
    first = peft_model.modifications[0]
    tensors = dict[str, Tensor]()
    targets = list[str]()
    for key, change in peft_model.changes.items():
        if isinstance(change, Bottleneck):
            name = peft_model.slot(key)[1]
            targets.append(name)
            tensors[f"base_model.model.{name}.lora_A.weight"] = change.down_weight
            tensors[f"base_model.model.{name}.lora_B.weight"] = change.up_weight[0]
    named = dict(peft_model.base.named_parameters())
    tensors |= {f"base_model.model.{name}": named[name] for name in sorted(peft_model.head)}
    scale = 1.0 if first.composition == "add" else first.scale
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(peft_model.base, "config", None), "_name_or_path", None),
        "r": first.bottleneck,
        "lora_alpha": scale * first.bottleneck,
        "lora_dropout": first.dropout,
        "target_modules": sorted(targets),
        "modules_to_save": sorted({name.split(".")[0] for name in peft_model.head}) or None,
        "bias": "none",
        "fan_in_fan_out": type(peft_model.slot(next(iter(peft_model.changes)))[0].module).__name__ == "Conv1D",
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
    make_folder(folder)
    write_bytes(folder / _PEFT_WEIGHTS, _packed(tensors))
    write_json(folder / _PEFT, config)


_UNREAD = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "megatron_config", "trainable_token_indices")


def _load_lora(model: nn.Module, folder: Path, **options: Any) -> PEFTModel:
    config, tensors = _read(folder, _PEFT, _PEFT_WEIGHTS)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} holds {config.get('peft_type')!r} of peft; only LORA is read")
    used = [name for name in _UNREAD if config.get(name)] + ["bias"] * (config.get("bias", "none") != "none")
    if used:
        raise ModelError(
            f"{folder} uses {', '.join(used)} of peft, which is not read; save it without, or merge it there"
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    rest = dict[str, Tensor]()
    for name, value in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if found:
            pairs.setdefault(found[1], {})[found[2]] = value
        else:
            rest[re.sub(r"\.modules_to_save(\.default)?", "", name).removeprefix("base_model.model.")] = value
    blocks = find_blocks(model, options.get("blocks"))
    places = _places(model, blocks)
    unknown = sorted(pairs.keys() - places.keys())
    if unknown or not pairs or any(pair.keys() != {"A", "B"} for pair in pairs.values()):
        raise ModelError(
            f"{folder} changes {', '.join(unknown[:3]) or 'nothing'}, which are no linear maps of this "
            f"{type(model).__name__}'s blocks; those are called {', '.join(list(places)[:4])}, ..."
        )
    try:
        r, alpha, dropout = int(config["r"]), float(config["lora_alpha"]), float(config.get("lora_dropout", 0.0))
        scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        wheres = sorted({places[name][1] for name in pairs}, key=PLACES.index)
        modifications = [
            Modification("identity", r, where, composition="scale", scale=scale, dropout=dropout) for where in wheres
        ]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{folder / _PEFT} does not describe LoRA: {error}") from error
    layers = sorted({places[name][0] for name in pairs})
    named = dict(model.named_parameters())
    for name, value in rest.items():
        if name not in named or named[name].shape != value.shape:
            raise ModelError(f"{folder} was saved for another model: this one has no weight like {name}")
    if len(pairs) != len(layers) * len(wheres):
        raise ModelError(f"{folder} changes different maps in different blocks, which is not read")
    made = apply(model, modifications, layers=layers, train_head=list(rest) or False, **options)
    with torch.no_grad():
        for name, pair in pairs.items():
            layer, where = places[name]
            change: Any = made.changes[f"{layer}-{wheres.index(where)}-{where}"]
            if change.down_weight.shape != pair["A"].shape or change.up_weight[0].shape != pair["B"].shape:
                shapes = tuple(pair["A"].shape), tuple(pair["B"].shape)
                made.remove()
                raise ModelError(f"{folder} was saved for another model: {name} has matrices of {shapes}")
            change.down_weight.copy_(pair["A"])
            change.up_weight[0].copy_(pair["B"])
        for name, value in rest.items():
            named[name].copy_(value)
    return made


def _places(model: nn.Module, blocks: tuple[Block, ...]) -> dict[str, tuple[int, str]]:
    """{module name: (block, where)} of the linear maps that stand alone."""
    names = {id(module): name for name, module in model.named_modules()}
    return {
        names[id(slot.module)]: (at, where)
        for at, block in enumerate(blocks)
        for where, slot in block.slots.items()
        if slot.stop is None and id(slot.module) in names
    }
