"""The residual networks against PyTorch modules of the usual names, weights going both ways."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar_jax import steps
from cifar_jax.models import init, make_model
from cifar_jax.weights import state_dict

# Trainable parameters: kuangliu's ResNet18; He et al.'s ResNet20 of option A.
PARAMETERS = {"resnet18": 11_173_962, "resnet20": 269_722}
STAGES = {"resnet18": (64, 128, 256, 512), "resnet20": (16, 32, 64)}
BLOCKS = {"resnet18": 2, "resnet20": 3}


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride, projected):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut, self.missing = nn.Sequential(), 0
        if projected and (stride != 1 or inputs != outputs):
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))
        elif inputs != outputs:
            self.missing = outputs - inputs

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.missing:
            half = self.missing // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, name):
        super().__init__()
        widths, projected = STAGES[name], name == "resnet18"
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1, inputs = nn.BatchNorm2d(widths[0]), widths[0]
        for i, width in enumerate(widths):
            blocks = []
            for j in range(BLOCKS[name]):
                blocks.append(Block(inputs, width, 2 if i and not j else 1, projected))
                inputs = width
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.linear, self.stages = nn.Linear(inputs, 10), len(widths)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.linear(x.mean(dim=(2, 3)))


@pytest.fixture(scope="module", params=list(PARAMETERS))
def pair(request):
    """(ours, our variables with PyTorch's weights, PyTorch's network)."""
    model = make_model(request.param)
    shapes = jax.eval_shape(
        lambda: init(model, jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.float32))
    )
    torch.manual_seed(0)
    net = ResNet(request.param)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):  # else its defaults would hide a mix-up
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(0, 0.1)
    variables = state_dict.variables_from_torch(net.state_dict(), shapes, model.torch_layers)
    return request.param, model, variables, net


def test_parameters(pair):
    name, _, variables, net = pair
    assert steps.parameter_count(variables["params"]) == PARAMETERS[name]
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]


def test_weights_go_back_to_pytorchs_names(pair):
    _, model, variables, net = pair
    state = state_dict.to_torch(variables["params"], variables["batch_stats"], model.torch_layers)
    theirs = net.state_dict()
    assert set(state) == set(theirs)
    for name, value in state.items():
        np.testing.assert_array_equal(value, theirs[name].numpy(), err_msg=name)


@pytest.mark.extended
def test_training_pass_gradients_and_statistics_are_pytorchs(pair):
    """In float64: in float32 the rounding of so deep a network hides what is wrong by 1 %."""
    name, _, variables, net = pair
    model, net = make_model(name, lowering="lax"), copy.deepcopy(net).double().train()
    images = np.random.default_rng(0).standard_normal((4, 32, 32, 3))
    labels = np.array([3, 1, 4, 9])
    theirs = net(torch.tensor(images).permute(0, 3, 1, 2))
    F.cross_entropy(theirs, torch.tensor(labels), reduction="sum").backward()

    with jax.enable_x64(True):
        variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables)

        @functools.partial(jax.value_and_grad, has_aux=True)
        def loss(params):
            given = {"params": params, "batch_stats": variables["batch_stats"]}
            logits, updates = model.apply(given, images, train=True, mutable=["batch_stats"])
            losses = steps.cross_entropy(logits, jnp.asarray(labels, jnp.int32))
            return losses.sum(), (logits, updates["batch_stats"])

        (_, (logits, statistics)), grads = jax.device_get(jax.jit(loss)(variables["params"]))
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, theirs.detach().numpy(), atol=1e-9)
    found = state_dict.to_torch(grads, statistics, model.torch_layers)
    for name, parameter in net.named_parameters():
        want = parameter.grad.numpy()
        difference = np.linalg.norm(found[name] - want) / np.linalg.norm(want)
        assert difference < 1e-9, f"{name}: {difference:.1e}"
    for name, buffer in net.named_buffers():
        if "running" in name:
            np.testing.assert_allclose(found[name], buffer.numpy(), atol=1e-9, err_msg=name)
