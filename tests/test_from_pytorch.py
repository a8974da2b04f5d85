"""Both columns of docs/from_pytorch.md run as they are printed, and end at the same losses."""

import io
import re
import sys
import types
from contextlib import redirect_stdout

import jax
import numpy as np
import pytest
from tiny_data import ROOT

import cifar_jax
from cifar_jax.datasets import Dataset, Split

torch = pytest.importorskip("torch")

PAGE = (ROOT / "docs/from_pytorch.md").read_text()
COLUMNS = {
    side: re.findall(rf'^```python title="{side}"\n(.*?)^```', PAGE, re.M | re.S)
    for side in ("PyTorch", "JAX")
}
# A tenth of the steps, and of a line's: 210 an epoch, the mean of the first 200 printed. In
# float64, or rounding, which steps amplify, would hide a difference: in float32 weights end up to
# 6 % of their way apart.
CHANGES = {"2000": "200", "1999": "199", "jnp.float32": "jnp.float64"}
TRAIN, TEST = 840, 400


class Images(torch.utils.data.Dataset):
    """What torchvision's CIFAR10 is."""

    def __init__(self, split, transform):
        self.split, self.transform = split, transform

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        return self.transform(self.split.images[index]), int(self.split.labels[index])


def torchvision(splits):
    """The part of torchvision that the tutorial uses, of the tensors it documents."""

    def normalize(mean, std):
        mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        return lambda image: (image - mean) / std

    def compose(steps):
        def apply(image):
            for step in steps:
                image = step(image)
            return image

        return apply

    modules = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.transforms")}
    whole, transforms = modules.values()
    transforms.ToTensor = lambda: lambda image: torch.tensor(image).permute(2, 0, 1) / 255
    transforms.Normalize, transforms.Compose = normalize, compose
    whole.transforms = transforms
    whole.datasets = types.SimpleNamespace(
        CIFAR10=lambda root, train, download, transform: Images(
            splits["train" if train else "test"], transform
        )
    )
    whole.utils = types.SimpleNamespace(make_grid=lambda images: torch.cat(list(images), dim=2))
    return modules


def torch_weights(params):
    """The state dict of the JAX column's weights: kernels with their axes in PyTorch's order."""
    found = {}
    for name, layer in params["params"].items():
        kernel = np.asarray(layer["kernel"])
        if name == "fc1":  # it reads a 5x5 map of 16 channels: [H, W, C] here, [C, H, W] there
            kernel = kernel.reshape(5, 5, 16, 120).transpose(2, 0, 1, 3).reshape(400, 120)
        axes = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
        found[f"{name}.weight"] = torch.tensor(kernel.transpose(axes).copy())
        found[f"{name}.bias"] = torch.tensor(np.array(layer["bias"]))
    return found


class Loader:
    """A DataLoader whose shuffled batches are those of the JAX column."""

    def __init__(self, dataset, batch_size, shuffle, num_workers, orders):
        plain = torch.arange(len(dataset)).reshape(-1, batch_size)
        self.dataset, self.shuffled = dataset, shuffle
        self.orders = orders if shuffle else iter(lambda: plain, None)

    def __iter__(self):
        for rows in next(self.orders):
            pairs = [self.dataset[int(i)] for i in rows]
            yield [torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])]


def printed(blocks, namespace, hooks):
    """What the blocks print, run one after the other; a hook runs after the block that has its
    words."""
    out = io.StringIO()
    with redirect_stdout(out):
        for block in blocks:
            for printed_as, run_as in CHANGES.items():
                block = block.replace(printed_as, run_as)
            exec(compile(block, "docs/from_pytorch.md", "exec"), namespace)
            for text, hook in hooks.items():
                if text in block:
                    hook(namespace)
    return out.getvalue()


@pytest.mark.parametrize("side", COLUMNS)
def test_columns_are_whole(side):
    text = "\n".join(COLUMNS[side])
    assert len(COLUMNS["PyTorch"]) == len(COLUMNS["JAX"]) == 11
    assert "Finished Training" in text
    assert "GroundTruth" in text


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.extended  # steps of plain JAX, which unoptimised take minutes
def test_both_columns_end_at_the_same_losses(cifar10, float64, tmp_path, monkeypatch):
    sizes = {"train": TRAIN, "test": TEST}
    splits = {
        name: Split(np.ascontiguousarray(s.images[: sizes[name]]), s.labels[: sizes[name]])
        for name, s in cifar10.splits.items()
    }
    cut = Dataset("cifar10", "", "", cifar10.class_names, "", splits)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(cifar_jax, "load_dataset", lambda name: cut, raising=False)
    for name, module in torchvision(splits).items():
        monkeypatch.setitem(sys.modules, name, module)
    usual = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with usual[0], usual[1], jax.enable_x64(True):
        first, jax_names = {}, {"__name__": "__main__"}

        def keep_weights(names):
            wide = jax.tree.map(lambda x: x.astype(np.float64), names["params"])
            names["params"] = wide
            first.update(torch_weights(wide))

        said = {"JAX": printed(COLUMNS["JAX"], jax_names, {"net.init": keep_weights})}
        look, *epochs = (np.array(jax_names["epoch_order"](epoch)) for epoch in (0, 0, 1))
    orders = iter([look, *epochs])
    monkeypatch.setattr(
        torch.utils.data, "DataLoader", lambda *args, **kw: Loader(*args, **kw, orders=orders)
    )

    def same_weights(names):
        if "optimizer" not in names:  # the first network, not the one that is loaded again
            names["net"].load_state_dict(first, strict=True)

    torch_names = {"__name__": "__main__"}
    said["PyTorch"] = printed(COLUMNS["PyTorch"], torch_names, {"net = Net()": same_weights})
    lines = {side: text.splitlines() for side, text in said.items()}
    assert len(lines["JAX"]) == len(lines["PyTorch"]) + 1  # the device
    ours, theirs = (
        np.array(re.findall(r"\[[12], +200\] loss: ([\d.]+)", said[side]), float)
        for side in ("JAX", "PyTorch")
    )
    assert len(ours) == 2
    assert ours[1] < ours[0] < 2.31
    np.testing.assert_allclose(ours, theirs, atol=0.0011, rtol=0)  # their digits
    ended, theirs = torch_weights(jax_names["state"][0]), torch_names["net"].state_dict()
    for name, start in first.items():
        moved = (theirs[name] - start).abs().max()
        assert moved > 1e-3
        assert (ended[name] - theirs[name]).abs().max() < 1e-6 * moved, name
    truths = [[line for line in lines[side] if line.startswith("GroundTruth")] for side in said]
    assert truths[0] == truths[1]
    shares = [
        [float(x) for x in re.findall(r"is ([\d.]+) %", said[side])] for side in ("JAX", "PyTorch")
    ]
    assert len(shares[0]) == 10
    np.testing.assert_allclose(*shares, atol=0.051, rtol=0)
