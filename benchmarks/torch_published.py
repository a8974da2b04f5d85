"""The training loop as the write-ups have it: PIL images, transforms, a DataLoader.

torchvision's `Compose`, `ToTensor` and `Normalize` are written out in plain torch (torchvision
need not be installed); each does the same work on each image.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.torch_trainers import NORMALIZE, Trainer
from cifar_jax.runtime.errors import lookup


class ToTensor:
    """PIL image -> float32 [3, H, W] in [0, 1]."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
        return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)


class Normalize:
    """(x - mean) / std for each channel of [3, H, W]."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = mean, std

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        return image.clone().sub_(mean).div_(std)


class Compose:
    """Applies transforms one after the other."""

    def __init__(self, transforms: Sequence[Callable]):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


class ImageDataset(Dataset):
    """Arrays as torchvision's CIFAR10 gives them: a PIL image made and transformed each time."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Callable):
        self.images, self.labels, self.transform = images, labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class PublishedTrainer(Trainer):
    """Dataset, transforms, DataLoader; the default optimiser; `loss.item()` every step.

    `workers` is the DataLoader's; None measures 0, 1 and 2 (no more than there are processors)
    on the first call and keeps the fastest (`self.workers` then says which).
    """

    optimizer_options: ClassVar[dict] = {}
    worker_counts = tuple(range(min(2, len(os.sched_getaffinity(0))) + 1))

    def __init__(self, *args, workers: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.workers = workers

    def place(self, images: np.ndarray, labels: np.ndarray) -> ImageDataset:
        mean, std = lookup(NORMALIZE, self.recipe.normalize, "normalization")
        steps: list[Callable] = [ToTensor()]
        if self.recipe.normalize != "unit":
            steps.append(Normalize(mean, std))
        return ImageDataset(images, labels, Compose(steps))

    def batches(self, data, batch_size: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        order = np.split(np.arange(len(data)), range(batch_size, len(data), batch_size))
        return self.loader(data, order, self.workers or 0)

    def loader(self, data, order: Iterable[np.ndarray], workers: int):
        """Yields the batches of `order`, which may be endless."""
        batches = (indices.tolist() for indices in order)
        for images, labels in DataLoader(data, batch_sampler=batches, num_workers=workers):
            yield images.to(self.device), labels.to(self.device)

    def run(self, order: Sequence[np.ndarray]) -> torch.Tensor:
        if self.workers is None:
            self.workers = self.fastest_worker_count(order[:1000])
        return torch.tensor(list(self.steps(order)))

    def steps(self, order: Iterable[np.ndarray]) -> Iterable[float]:
        """Trains on each batch of `order` as it is asked for, and yields its loss."""
        for images, labels in self.loader(self.training_data, order, self.workers or 0):
            self.optimizer.zero_grad()
            loss = self.loss_function(images, labels)
            loss.backward()
            self.optimizer.step()
            yield loss.item()

    def fastest_worker_count(self, order: Sequence[np.ndarray]) -> int:
        """Times `order` with forward and backward, weights untouched, at each count.

        Starting the workers is part of every epoch, so it is part of the time.
        """
        seconds = {}
        for workers in self.worker_counts:
            start = time.perf_counter()
            for images, labels in self.loader(self.training_data, order, workers):
                self.loss_function(images, labels).backward()
                self.optimizer.zero_grad()
            seconds[workers] = time.perf_counter() - start
        return min(seconds, key=seconds.get)
