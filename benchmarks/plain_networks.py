"""Networks as a user writes them, in nothing but `flax.linen`.

`tutorial_cnn` and `dropout_cnn` are the package's own, with the same names of layers; `SmallResNet`
is `torch_models.SmallResNet`. Images [N, H, W, 3] -> logits [N, num_classes].
"""

from __future__ import annotations

import functools

import flax.linen as nn


def pooled(x):
    return nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))


class TutorialCNN(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, x):
        x = pooled(nn.Conv(6, (5, 5), padding="VALID", name="conv1")(x))
        x = pooled(nn.Conv(16, (5, 5), padding="VALID", name="conv2")(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(120, name="fc1")(x))
        x = nn.relu(nn.Dense(84, name="fc2")(x))
        return nn.Dense(self.num_classes, name="fc3")(x)


class DropoutCNN(nn.Module):
    num_classes: int = 10
    dropout_rate: float = 0.25

    @nn.compact
    def __call__(self, x, train):
        for layer, features in enumerate((16, 32, 64), start=1):
            x = pooled(nn.Conv(features, (3, 3), name=f"conv{layer}")(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        x = nn.relu(nn.Dense(500, name="fc1")(x))
        x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        return nn.Dense(self.num_classes, name="fc2")(x)


class SmallResNet(nn.Module):
    """A stem and three residual blocks of 16, 32 and 64 channels, the last two of stride 2 with a
    projection, batch normalisation, the mean over the pixels, one linear layer."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(nn.Conv, use_bias=False, padding=1)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5
        )
        x = nn.relu(norm(name="norm0")(conv(16, (3, 3), name="conv0")(x)))
        for block, features in enumerate((16, 32, 64), start=1):
            stride = 1 if features == 16 else 2
            y = conv(features, (3, 3), strides=stride, name=f"conv{block}a")(x)
            y = nn.relu(norm(name=f"norm{block}a")(y))
            y = norm(name=f"norm{block}b")(conv(features, (3, 3), name=f"conv{block}b")(y))
            if stride == 2:
                x = conv(features, (1, 1), strides=2, padding=0, name=f"conv{block}c")(x)
                x = norm(name=f"norm{block}c")(x)
            x = nn.relu(x + y)
        return nn.Dense(self.num_classes, name="fc")(nn.avg_pool(x, x.shape[1:3]).squeeze((1, 2)))


tutorial_cnn, dropout_cnn = TutorialCNN, DropoutCNN
