"""Optimizers and schedules against torch.optim, step by step, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cifar_jax.optimizers import learning_rate, make_optimizer, make_schedule
from cifar_jax.recipes import Recipe

STEPS = 20

# name -> (recipe's fields, torch.optim class, its arguments, max norm)
RULES = {
    "sgd": ({}, "SGD", {}, 0),
    "momentum": ({"momentum": 0.9}, "SGD", {"momentum": 0.9}, 0),
    "nesterov": (
        {"momentum": 0.9, "nesterov": True},
        "SGD",
        {"momentum": 0.9, "nesterov": True},
        0,
    ),
    "sgd_decay": (
        {"momentum": 0.9, "weight_decay": 0.05},
        "SGD",
        {"momentum": 0.9, "weight_decay": 0.05},
        0,
    ),
    "nesterov_decay_clip": (
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05, "clip_norm": 0.5},
        "SGD",
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
        0.5,
    ),
    "adam": ({"optimizer": "adam"}, "Adam", {}, 0),
    "adam_decay": (
        {"optimizer": "adam", "weight_decay": 0.05},
        "Adam",
        {"weight_decay": 0.05},
        0,
    ),
    "adamw": (
        {"optimizer": "adamw", "weight_decay": 0.05},
        "AdamW",
        {"weight_decay": 0.05},
        0,
    ),
    "adamw_clip": (
        {"optimizer": "adamw", "weight_decay": 0.05, "clip_norm": 0.3},
        "AdamW",
        {"weight_decay": 0.05},
        0.3,
    ),
}


def problem():
    """Least squares of y = tanh(x A) b: two weights whose gradients differ in size."""
    rng = np.random.default_rng(0)
    start = {"a": rng.normal(size=(5, 4)), "b": rng.normal(size=4)}
    return start, rng.normal(size=(16, 5)), rng.normal(size=16)


def ours(recipe, start, x, y, steps_per_epoch=STEPS):
    optimizer = make_optimizer(recipe, steps_per_epoch)

    def loss(params):
        return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, start)
        state, path = optimizer.init(params), []
        for _ in range(STEPS):
            params, state = step(params, state)
            path.append(np.concatenate([np.asarray(p).ravel() for p in params.values()]))
    return np.array(path)


def theirs(kind, arguments, max_norm, start, x, y, scheduler=None):
    torch = pytest.importorskip("torch", reason="the yardstick is torch.optim")
    params = [torch.tensor(value, requires_grad=True) for value in start.values()]
    optimizer = getattr(torch.optim, kind)(params, lr=0.05, **arguments)
    schedule = scheduler(torch.optim.lr_scheduler, optimizer) if scheduler else None
    x, y, path, rates = torch.tensor(x), torch.tensor(y), [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = ((torch.tanh(x @ params[0]) @ params[1] - y) ** 2).mean()
        loss.backward()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if schedule:
            schedule.step()
        path.append(np.concatenate([p.detach().numpy().ravel() for p in params]))
    return np.array(path), np.array(rates)


@pytest.mark.parametrize("name", RULES)
def test_rule_equals_torch_optim(name):
    fields, kind, arguments, max_norm = RULES[name]
    start, x, y = problem()
    want, _ = theirs(kind, arguments, max_norm, start, x, y)
    got = ours(Recipe(learning_rate=0.05, **fields), start, x, y)
    # torch adds its 1e-6 to the norm it clips by; that is all that may differ then.
    tolerance = 1e-5 if max_norm else 1e-12
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
    if max_norm:
        unclipped, _ = theirs(kind, arguments, 0, start, x, y)
        assert np.abs(unclipped - want).max() > 1e-3, "clipping made no difference"


# Five epochs of four steps. name -> (recipe's fields, torch scheduler stepped each step).
SCHEDULES = {
    "constant": ({}, None),
    "step": (
        {"schedule": "step", "step_epochs": 2.0, "step_factor": 0.3},
        lambda lib, opt: lib.StepLR(opt, step_size=8, gamma=0.3),
    ),
    "cosine": (
        {"schedule": "cosine"},
        lambda lib, opt: lib.CosineAnnealingLR(opt, T_max=STEPS),
    ),
    "warmup": (
        {"warmup_epochs": 1.5},
        lambda lib, opt: lib.LambdaLR(opt, lambda i: min(i / 6, 1)),
    ),
    "warmup_cosine": (
        {"schedule": "cosine", "warmup_epochs": 1.0},
        lambda lib, opt: lib.LambdaLR(
            opt,
            lambda i: i / 4 if i < 4 else (1 + np.cos(np.pi * (i - 4) / 16)) / 2,
        ),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_equals_torch_step_by_step(name):
    fields, scheduler = SCHEDULES[name]
    recipe = Recipe(learning_rate=0.05, epochs=5, momentum=0.9, **fields)
    start, x, y = problem()
    want, rates = theirs("SGD", {"momentum": 0.9}, 0, start, x, y, scheduler)
    got = [learning_rate(recipe, 4, i) for i in range(STEPS)]
    np.testing.assert_allclose(got, rates, rtol=1e-6, atol=1e-9)
    # The rates that the optimizer applies are those, one for each step from the first.
    np.testing.assert_allclose(ours(recipe, start, x, y, 4), want, rtol=1e-6, atol=1e-7)
    if scheduler:
        assert len({round(float(r), 9) for r in rates}) > 1


def test_onecycle_has_torchs_peak_and_ends():
    """optax turns at step 0.3 n and ends at step n, PyTorch at 0.3 n - 1 and at n - 1: same
    start, peak and end, and over a long run the same curve to 1/n."""
    torch = pytest.importorskip("torch", reason="the yardstick is torch.optim")
    total = 1000
    recipe = Recipe(learning_rate=0.4, epochs=10, schedule="onecycle")
    ours_ = np.array([learning_rate(recipe, total // 10, i) for i in range(0, total, 10)])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.4, total_steps=total, cycle_momentum=False
    )
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(ours_, rates[::10], atol=0.4 * np.pi / 2 / 300)
    assert learning_rate(recipe, 100, 0) == pytest.approx(0.4 / 25)
    assert learning_rate(recipe, 100, 300) == pytest.approx(0.4)
    assert learning_rate(recipe, 100, 1000) == pytest.approx(0.4 / 25 / 1e4, rel=1e-3)


@pytest.mark.parametrize("name", RULES)
def test_a_step_may_tell_the_loss(name):
    optimizer, params = make_optimizer(Recipe(**RULES[name][0]), STEPS), {"a": jnp.ones(2)}
    plain, told = (
        optimizer.update(params, optimizer.init(params), params, **more)[0]
        for more in ({}, {"value": jnp.float32(1)})
    )
    np.testing.assert_array_equal(told["a"], plain["a"])


def test_a_constant_rate_needs_no_schedule():
    assert make_schedule(Recipe(learning_rate=0.01), 100) == 0.01
