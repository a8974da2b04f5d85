"""The published networks as PyTorch modules, and weights carried over from the flax side.

Layer names are those of the write-ups (conv1, fc1, ...) and of torchvision (`features.N`,
`classifier.N`), so their state dicts fit. Input: float [N, 3, H, W]; output: logits
[N, num_classes]. The small networks flatten in PyTorch's order, channels first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class TutorialCNN(nn.Module):
    """The PyTorch tutorial's network: 62,006 parameters with 10 classes."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class DeepCNN(nn.Module):
    """Four 5x5 convolutions, one pool, four linear layers (gjustin40, 2020)."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, 5)
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.conv3 = nn.Conv2d(20, 20, 5)
        self.conv4 = nn.Conv2d(20, 10, 5)
        self.fc1 = nn.Linear(10 * 8 * 8, 800)
        self.fc2 = nn.Linear(800, 400)
        self.fc3 = nn.Linear(400, 100)
        self.fc4 = nn.Linear(100, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.relu(self.conv3(x))
        x = F.max_pool2d(F.relu(self.conv4(x)), 2)
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x = F.relu(self.fc3(x))
        return self.fc4(x)


class DropoutCNN(nn.Module):
    """Three padded 3x3 convolutions with pools, dropout around the hidden layer (Udacity)."""

    def __init__(self, num_classes: int = 10, dropout_rate: float = 0.25):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc1 = nn.Linear(64 * 4 * 4, 500)
        self.fc2 = nn.Linear(500, num_classes)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        x = self.dropout(torch.flatten(x, 1))
        x = F.relu(self.fc1(x))
        return self.fc2(self.dropout(x))


VGG11_LAYERS = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
VGG16_LAYERS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M")
VGG16_LAYERS += (512, 512, 512, "M")


def vgg_features(layers: tuple[int | str, ...], batch_norm: bool) -> nn.Sequential:
    """torchvision's `features`: 3x3 convolutions (numbers: their channels) and "M" for pools."""
    modules: list[nn.Module] = []
    channels = 3
    for layer in layers:
        if layer == "M":
            modules.append(nn.MaxPool2d(2))
            continue
        modules.append(nn.Conv2d(channels, layer, 3, padding=1))
        modules += [nn.BatchNorm2d(layer), nn.ReLU()] if batch_norm else [nn.ReLU()]
        channels = layer
    return nn.Sequential(*modules)


def vgg_initialise(model: nn.Module) -> None:
    """torchvision's: convolutions He normal by fan-out, linear weights N(0, 0.01), biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)


class VGG(nn.Module):
    """torchvision's VGG, by default VGG16 (configuration D): 134,301,514 parameters with 10
    classes."""

    def __init__(
        self,
        num_classes: int = 10,
        dropout_rate: float = 0.5,
        layers: tuple[int | str, ...] = VGG16_LAYERS,
        hidden: int = 4096,
    ):
        super().__init__()
        self.features = vgg_features(layers, batch_norm=False)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(layers[-2] * 7 * 7, hidden),
            nn.ReLU(),
            nn.Dropout(dropout_rate),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout_rate),
            nn.Linear(hidden, num_classes),
        )
        vgg_initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class VGGBatchNorm(nn.Module):
    """torchvision's `features` with batch normalisation, and one linear layer."""

    def __init__(self, num_classes: int = 10, layers: tuple[int | str, ...] = VGG16_LAYERS):
        super().__init__()
        self.features = vgg_features(layers, batch_norm=True)
        self.classifier = nn.Linear(layers[-2], num_classes)
        vgg_initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean(dim=(2, 3)))


class SmallResNet(nn.Module):
    """A stem and three residual blocks, as `plain_networks.SmallResNet`."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv0, self.norm0 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        channels = 16
        for block, features in enumerate((16, 32, 64), start=1):
            stride = 1 if features == channels else 2
            sizes = {"a": (channels, 3, stride), "b": (features, 3, 1)}
            sizes |= {"c": (channels, 1, 2)} if stride == 2 else {}
            for part, (inputs, size, step) in sizes.items():
                conv = nn.Conv2d(inputs, features, size, step, padding=size // 2, bias=False)
                setattr(self, f"conv{block}{part}", conv)
                setattr(self, f"norm{block}{part}", nn.BatchNorm2d(features))
            channels = features
        self.fc = nn.Linear(channels, num_classes)

    def normed(self, x: torch.Tensor, part: str) -> torch.Tensor:
        return getattr(self, f"norm{part}")(getattr(self, f"conv{part}")(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.normed(x, "0"))
        for block in "123":
            y = self.normed(F.relu(self.normed(x, f"{block}a")), f"{block}b")
            x = F.relu(y + (x if block == "1" else self.normed(x, f"{block}c")))
        return self.fc(x.mean(dim=(2, 3)))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "tutorial_cnn": TutorialCNN,
    "deep_cnn": DeepCNN,
    "dropout_cnn": DropoutCNN,
    "vgg16": VGG,
    "vgg11_bn": functools.partial(VGGBatchNorm, layers=VGG11_LAYERS),
    "vgg16_bn": functools.partial(VGGBatchNorm, layers=VGG16_LAYERS),
    "benchmarks/plain_networks.py:SmallResNet": SmallResNet,
}


def state_from_flax(params: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Returns the state dict that gives the PyTorch network our weights (`weights.state_dict`)."""
    from cifar_jax.weights.state_dict import to_torch  # imports JAX, which survives no fork

    return {name: torch.tensor(value) for name, value in to_torch(params).items()}
