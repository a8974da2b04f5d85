"""airbench94 in PyTorch, to train beside ours: `python -m benchmarks.airbench_torch --device cuda`.

The recipe is that of KellerJordan's cifar10-airbench `airbench94_muon.py`, written anew: network,
Muon, rates, whitening, alternating flip, shifts by reflection and test-time augmentation. Each
seed prints one JSON object: `seconds` from the whitening to the last test logits (the first seed's
hold cuDNN's choice of kernels too), `accuracy` with test-time augmentation and
`accuracy_plain` without, in percent.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH, EPOCHS, WHITENING_EPOCHS = 2000, 8, 3
FILTER_RATE, BIAS_RATE, HEAD_RATE = 0.24, 0.053, 0.67
DECAY = 2e-6 * BATCH  # over each group's rate
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convolution(channels: int, features: int) -> nn.Conv2d:
    """3x3, padded, without bias; the first outputs start as the inputs."""
    layer = nn.Conv2d(channels, features, 3, padding=1, bias=False)
    nn.init.dirac_(layer.weight.data[:channels])
    return layer


def norm(channels: int) -> nn.BatchNorm2d:
    """Batch normalisation whose scale stays 1."""
    layer = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    layer.weight.requires_grad = False
    return layer


class Group(nn.Module):
    def __init__(self, channels: int, features: int):
        super().__init__()
        self.conv1, self.norm1 = convolution(channels, features), norm(features)
        self.conv2, self.norm2 = convolution(features, features), norm(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


class Airbench(nn.Module):
    """Images float [N, 3, 32, 32] -> logits [N, 10]."""

    def __init__(self, widths: tuple[int, ...] = (64, 256, 256), logit_scale: float = 1 / 256):
        super().__init__()
        self.whiten, self.logit_scale = nn.Conv2d(3, 24, 2), logit_scale
        self.whiten.weight.requires_grad = False
        ends = zip((24, *widths), widths, strict=False)
        groups = [Group(*end) for end in ends]
        self.layers = nn.Sequential(nn.GELU(), *groups, nn.MaxPool2d(3))
        self.head = nn.Linear(widths[-1], 10, bias=False)
        self.head.weight.data /= self.head.weight.data.std()

    def forward(self, x: torch.Tensor, whitening_bias: bool = True) -> torch.Tensor:
        bias = self.whiten.bias if whitening_bias else self.whiten.bias.detach()
        x = self.layers(F.conv2d(x, self.whiten.weight, bias))
        return self.head(x.flatten(1)) * self.logit_scale


@torch.no_grad()
def whiten(net: Airbench, images: torch.Tensor) -> None:
    """Sets the first kernel from the 2x2 patches of images [N, 3, H, W]."""
    patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    patches = patches.float()
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    kernel = (vectors / torch.sqrt(values + 5e-4)).T.reshape(12, 3, 2, 2)
    net.whiten.weight.data[:] = torch.cat([kernel, -kernel])


def orthogonalised(gradient: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """Newton and Schulz's iteration on a filter's gradient as a matrix [F, C * k * k]."""
    x = gradient.reshape(len(gradient), -1).to(precision)
    x = x / (x.norm() + 1e-7)
    turned = x.shape[0] > x.shape[1]
    x = x.T if turned else x
    for _ in range(3):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    x = x.T if turned else x
    return x.reshape(gradient.shape).to(gradient.dtype)


class Muon:
    """Muon on convolutions' filters; `rate` is set before each step."""

    def __init__(self, filters: list[nn.Parameter], precision: torch.dtype, momentum: float = 0.6):
        self.filters, self.precision, self.momentum = filters, precision, momentum
        self.traces, self.rate = [torch.zeros_like(p) for p in filters], 0.0

    @torch.no_grad()
    def step(self) -> None:
        for weight, trace in zip(self.filters, self.traces, strict=True):
            trace.mul_(self.momentum).add_(weight.grad)
            update = weight.grad + self.momentum * trace
            weight.mul_(len(weight) ** 0.5 / weight.norm())
            weight.add_(orthogonalised(update, self.precision), alpha=-self.rate)


class Trainer:
    """A network and its two optimizers; `steps` and `whitening_steps` are of the whole run."""

    def __init__(self, net: Airbench, steps: int, whitening_steps: int, muon_precision):
        self.net, self.steps, self.whitening_steps = net, steps, whitening_steps
        filters = [p for p in net.layers.parameters() if p.ndim == 4]
        biases = [p for n, p in net.layers.named_parameters() if n.endswith("bias")]
        groups = [
            ([net.whiten.bias], BIAS_RATE),
            (biases, BIAS_RATE),
            ([net.head.weight], HEAD_RATE),
        ]
        self.sgd = torch.optim.SGD(
            [{"params": p, "lr": lr, "weight_decay": DECAY / lr} for p, lr in groups],
            momentum=0.85,
            nesterov=True,
        )
        self.rates, self.muon = [lr for _, lr in groups], Muon(filters, muon_precision)

    def step(self, number: int, images: torch.Tensor, labels: torch.Tensor, context=None):
        """One step, counted from 0; returns the summed loss."""
        self.net.train()
        with context or torch.autocast("cpu", enabled=False):
            logits = self.net(images, number < self.whitening_steps)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.2, reduction="sum")
        loss.backward()
        ends = [self.whitening_steps, self.steps, self.steps]
        for group, rate, end in zip(self.sgd.param_groups, self.rates, ends, strict=True):
            group["lr"] = rate * (1 - number / end)
        self.muon.rate = FILTER_RATE * (1 - number / self.steps)
        self.sgd.step()
        self.muon.step()
        self.net.zero_grad(set_to_none=True)
        return loss.detach()


def shifted(padded: torch.Tensor, side: int, pixels: int) -> torch.Tensor:
    """A random crop [N, C, side, side] of each of the images, padded by `pixels`."""
    moves = torch.randint(0, 2 * pixels + 1, (len(padded), 2), device=padded.device)
    out = padded.new_empty(len(padded), padded.shape[1], side, side)
    for i in range(2 * pixels + 1):
        for j in range(2 * pixels + 1):
            chosen = (moves[:, 0] == i) & (moves[:, 1] == j)
            out[chosen] = padded[chosen][:, :, i : i + side, j : j + side]
    return out


def epochs(images: torch.Tensor, labels: torch.Tensor, count: int) -> Iterator:
    """Yields the batches of `count` epochs: flipped at random once, all in odd epochs, shifted."""
    flips = torch.rand(len(images), device=images.device) < 0.5
    images = torch.where(flips[:, None, None, None], images.flip(-1), images)
    padded = F.pad(images, (2,) * 4, "reflect")
    for epoch in range(count):
        seen = shifted(padded, images.shape[-1], 2)
        seen = seen.flip(-1) if epoch % 2 else seen
        order = torch.randperm(len(seen), device=seen.device)
        for start in range(0, len(seen) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            batch = seen[chosen].contiguous(memory_format=torch.channels_last)
            yield batch, labels[chosen]


@torch.no_grad()
def logits_of(net: Airbench, images: torch.Tensor, context, augmented: bool) -> torch.Tensor:
    net.eval()
    found = []
    for x in images.split(2000):
        padded = F.pad(x, (1,) * 4, "reflect")
        views = [(0.5, x), (0.25, padded[:, :, :-2, :-2]), (0.25, padded[:, :, 2:, 2:])]
        with context:
            if not augmented:
                found.append(net(x).float())
                continue
            both = [(w / 2, v) for w, x in views for v in (x, x.flip(-1))]
            layout = torch.channels_last
            found.append(sum(w * net(v.contiguous(memory_format=layout)).float() for w, v in both))
    return torch.cat(found)


def normalised(images, device: str, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [N, H, W, 3] of NumPy -> [N, 3, H, W] in `dtype`, channels last."""
    x = torch.from_numpy(images.copy()).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v, device=device).reshape(1, 3, 1, 1) for v in (MEAN, STD))
    return ((x - mean) / std).to(dtype).contiguous(memory_format=torch.channels_last)


def run(data: dict, seed: int, options: argparse.Namespace) -> dict:
    """Trains and tests once; returns what is printed."""
    torch.manual_seed(seed)
    device, dtype = options.device, PRECISIONS[options.precision]
    gpu = device != "cpu"
    net = Airbench().to(device).to(memory_format=torch.channels_last)
    # As published on a GPU: half weights and activations, statistics in float32. A CPU has float32
    # weights and, for other precisions, autocast, which is its faster form.
    if gpu:
        net = net.to(dtype)
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.float()
    low = dtype != torch.float32
    context = torch.autocast("cpu", dtype=dtype if low else None, enabled=low and not gpu)
    train = {"x": data["train"][0], "y": data["train"][1]}

    def synchronised() -> float:
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    began = synchronised()
    whiten(net, train["x"][:5000])
    per_epoch = len(train["x"]) // BATCH
    whitening_steps = WHITENING_EPOCHS * per_epoch
    count = options.epochs
    trainer = Trainer(net, count * per_epoch, whitening_steps, torch.bfloat16 if low else dtype)
    for number, (x, y) in enumerate(epochs(train["x"], train["y"], count)):
        trainer.step(number, x, y, context)
    trained = synchronised()
    images, labels = data["test"]
    logits = logits_of(net, images, context, augmented=True)
    seconds = synchronised() - began
    plain = logits_of(net, images, context, augmented=False)
    return {
        "seed": seed,
        "seconds": round(seconds, 3),
        "seconds_training": round(trained - began, 3),
        "accuracy": round(100 * (logits.argmax(1) == labels).float().mean().item(), 2),
        "accuracy_plain": round(100 * (plain.argmax(1) == labels).float().mean().item(), 2),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "precision": options.precision,
        "compiled": False,
        "epochs": count,
        "torch": torch.__version__,
    }


def main(arguments=None) -> list[dict]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.airbench_torch", description=__doc__
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="default: float16, on a CPU float32"
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs, of seeds 0, 1, ...")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--dataset", default="cifar10", help="cifar10, or shapes10 for speed alone")
    parser.add_argument("--data-dir", help="tfds directory")
    options = parser.parse_args(arguments)
    options.precision = options.precision or ("float32" if options.device == "cpu" else "float16")
    torch.backends.cudnn.benchmark = True

    from cifar_jax.datasets import load_dataset

    dtype = torch.float32 if options.device == "cpu" else PRECISIONS[options.precision]
    dataset, data = load_dataset(options.dataset, data_dir=options.data_dir, download=False), {}
    for name in ("train", "test"):
        split = dataset.splits[name]
        labels = torch.from_numpy(split.labels.copy()).long().to(options.device)
        data[name] = (normalised(split.images, options.device, dtype), labels)
    rows = []
    for seed in range(options.seeds):
        rows.append(run(data, seed, options))
        print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    main()
