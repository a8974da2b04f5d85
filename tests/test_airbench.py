"""airbench94 against its PyTorch original (`benchmarks/airbench_torch.py`), whole and by piece."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from cifar_jax import augment, input_pipeline, optimizers, steps
from cifar_jax.models import init, make_model, model_of
from cifar_jax.models.airbench import Airbench
from cifar_jax.ops import pieces
from cifar_jax.parallel import hardware, placement, programs
from cifar_jax.recipes import RECIPES
from cifar_jax.runtime.errors import UserError
from cifar_jax.training import setup
from cifar_jax.weights.state_dict import to_torch

RECIPE = RECIPES["airbench94"]
PER_EPOCH = 2


@pytest.fixture(scope="module")
def original():
    pytest.importorskip("torch", reason="the yardstick is the PyTorch original")
    from benchmarks import airbench_torch

    return airbench_torch


@pytest.fixture(scope="module")
def images():
    """uint8 [24, 32, 32, 3] with some structure: sums of a few waves."""
    rng = np.random.default_rng(0)
    at = np.arange(32) / 32
    waves = np.sin(2 * np.pi * (rng.uniform(0, 4, (24, 1, 1, 3)) * at[:, None, None]))
    waves = waves + np.cos(2 * np.pi * (rng.uniform(0, 4, (24, 1, 1, 3)) * at[None, :, None]))
    return (127 + 40 * waves + rng.normal(0, 15, waves.shape)).clip(0, 255).astype(np.uint8)


def test_parameters_are_the_published_ones():
    shapes = jax.eval_shape(
        lambda: init(make_model("airbench"), jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    )
    # Weights and biases as PyTorch counts them, without the scales of the norms, which stay 1.
    convolutions = 24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256
    want = 24 * 12 + 24 + 9 * convolutions + 2 * (64 + 256 + 256) + 256 * 10
    assert steps.parameter_count(shapes["params"]) == want == 1_971_640


@pytest.mark.extended
@pytest.mark.parametrize("name", ["airbench95", pytest.param("airbench96", marks=pytest.mark.slow)])
def test_a_recipe_before_muon_steps_and_returns_to_its_slow_weights(images, name):
    """Five steps, the last of them Lookahead's; the whitening's bias stands after its epochs."""
    recipe = RECIPES[name].replace(
        batch_size=4, epochs=5, warmup_epochs=1, stop_epochs=("whiten=3",), whitening_images=0
    )
    model = model_of(recipe, 10, "lax")
    state = jax.jit(setup.state_maker(recipe, model, 1, (32, 32, 3)))(jax.random.key(0))
    step = jax.jit(setup.step_of(recipe, model, 1))
    batch = {"image": images[:4], "label": np.arange(4, dtype=np.int32)}
    start, biases = jax.device_get(state.params), []
    for _ in range(5):
        last = jax.device_get(state.params)
        state, _ = step(state, {**batch, "index": np.arange(4, dtype=np.int32)})
        biases.append(np.asarray(state.params["whiten"]["bias"]))
    assert (biases[2] != biases[1]).all()
    np.testing.assert_array_equal(biases[3], biases[2])
    ends = (state.params, state.ema_params)
    for fast, slow in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(fast, slow)
    # After step n = total the slow weights keep 0.95^5 of the first ones.
    head = [tree["head"]["kernel"] for tree in (start, last, jax.device_get(state.params))]
    moved = np.abs(head[2] - head[0]).max()
    assert 0 < moved < 0.5 * np.abs(head[1] - head[0]).max()


def test_initial_filters_pass_their_inputs_on():
    model = make_model("airbench")
    params = jax.jit(functools.partial(init, model))(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))[
        "params"
    ]
    kernel = np.asarray(params["layers_2"]["conv1"]["kernel"])
    want = np.zeros((3, 3, 64, 64))
    want[1, 1] = np.eye(64)
    np.testing.assert_array_equal(kernel[..., :64], want)
    assert 0 < np.abs(kernel[..., 64:]).max() <= 1 / np.sqrt(9 * 64)
    assert abs(np.std(params["head"]["kernel"], ddof=1) - 1) < 1e-6


def test_whitened_patches_have_unit_covariance(images):
    x = np.asarray(augment.normalize(jnp.asarray(images), "cifar10"))
    kernel = augment.whitening_kernel(x, 2)
    assert kernel.shape == (2, 2, 3, 24)
    np.testing.assert_array_equal(kernel[..., 12:], -kernel[..., :12])
    windows = np.lib.stride_tricks.sliding_window_view(x, (2, 2), axis=(1, 2))
    y = np.einsum("nhwcij,ijcf->nhwf", windows.astype(np.float64), kernel[..., :12])
    moment = y.reshape(-1, 12).T @ y.reshape(-1, 12) / y[..., 0].size
    np.testing.assert_allclose(moment - np.diag(np.diag(moment)), 0, atol=1e-3)
    patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 12).astype(np.float64)
    values = np.linalg.eigvalsh(patches.T @ patches / len(patches))
    np.testing.assert_allclose(np.diag(moment), values / (values + 5e-4), rtol=1e-4)


def test_whitening_equals_the_original(images, original):
    torch = pytest.importorskip("torch")
    x = np.array(augment.normalize(jnp.asarray(images), "cifar10"))
    net = original.Airbench()
    original.whiten(net, torch.from_numpy(x.transpose(0, 3, 1, 2)))
    want = net.whiten.weight.detach().numpy().transpose(2, 3, 1, 0)
    got = augment.whitening_kernel(x, 2)
    # The sign of an eigenvector is nobody's.
    signs = np.sign((got * want).sum(axis=(0, 1, 2)))
    np.testing.assert_allclose(got, want * signs, atol=2e-3 * np.abs(want).max())


def muon_in_numpy(gradients, weight, rates):
    """Float64, filters [F, C * k * k]: Muon with momentum 0.6 and rescaled filters."""
    trace = np.zeros_like(weight)
    for gradient, rate in zip(gradients, rates, strict=True):
        trace = 0.6 * trace + gradient
        x = gradient + 0.6 * trace
        x = x / np.linalg.norm(x)
        for _ in range(3):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        weight = weight * np.sqrt(len(weight)) / np.linalg.norm(weight) - rate * x
    return weight


@pytest.mark.parametrize("shape", [(3, 3, 8, 16), (3, 3, 2, 32)], ids=["wide", "tall"])
def test_muon_equals_numpy(shape):
    rng = np.random.default_rng(1)
    weight, gradients = rng.normal(size=shape), rng.normal(size=(5, *shape))
    recipe = RECIPE.replace(
        freeze=(), rate_scale=(), decay_scale=(), rate_epochs=(), epochs=5, learning_rate=0.24
    )
    with jax.enable_x64(True):
        optimizer = optimizers.make_optimizer(recipe, 1)
        params = {"conv": {"kernel": jnp.asarray(weight)}}
        state = optimizer.init(params)
        for gradient in gradients:
            updates, state = optimizer.update({"conv": {"kernel": gradient}}, state, params)
            params = optax.apply_updates(params, updates)

    def matrix(x):
        return x.reshape(-1, shape[3])

    rates = 0.24 * (1 - np.arange(5) / 5)
    want = muon_in_numpy([matrix(g).T for g in gradients], matrix(weight).T, rates)
    got = matrix(np.asarray(params["conv"]["kernel"])).T
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_alternating_flip_mirrors_each_image_in_every_other_epoch(images):
    x = jnp.asarray(images, jnp.float32)
    index = np.arange(100, 124, dtype=np.int32)

    def flipped(epoch, rows=slice(None)):
        of_run = augment.OfRun(jax.random.key(3), jnp.int32(epoch), index[rows])
        y = augment.augment(x[rows], ("alternating_flip",), jax.random.key(epoch), of_run=of_run)
        mirrored = np.array(
            [np.array_equal(a, b[:, ::-1]) for a, b in zip(y, x[rows], strict=True)]
        )
        same = np.array([np.array_equal(a, b) for a, b in zip(y, x[rows], strict=True)])
        assert (mirrored ^ same).all()
        return mirrored

    first = flipped(0)
    assert 4 < first.sum() < 20
    np.testing.assert_array_equal(flipped(1), ~first)
    np.testing.assert_array_equal(flipped(2), first)
    order = np.random.default_rng(0).permutation(24)  # it is by image, not by place in the batch
    np.testing.assert_array_equal(flipped(0, order), first[order])
    with pytest.raises(UserError, match="places in the data set"):
        augment.augment(x, ("alternating_flip",), jax.random.key(0))


def test_shifts_are_of_two_pixels_with_reflected_edges(images):
    key = jax.random.key(0)
    x = jnp.asarray(np.tile(images, (20, 1, 1, 1)), jnp.float32)
    got = np.asarray(augment.augment(x, ("translate",), key, translate_pixels=2))
    padded = np.pad(np.asarray(x), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    seen = set()
    for image, wide in zip(got, padded, strict=True):
        places = [(i, j) for i in range(5) for j in range(5)]
        found = [p for p in places if np.array_equal(image, wide[p[0] :, p[1] :][:32, :32])]
        assert len(found) == 1
        seen |= set(found)
    assert len(seen) == 25
    with pytest.raises(UserError, match="--translate-pixels 32 reflects more than images of 32"):
        augment.augment(x, ("translate",), key, translate_pixels=32)


def variables_and_net(original, images):
    """The same random weights on both sides, the whitening kernel the images'."""
    import torch

    model = model_of(RECIPE, 10, "lax")
    create = setup.state_maker(RECIPE, model, PER_EPOCH, (32, 32, 3))
    x = np.array(augment.normalize(jnp.asarray(images), "cifar10"))
    kernel = {"params": {"whiten": {"kernel": augment.whitening_kernel(x, 2)}}}
    state = jax.jit(create)(jax.random.key(0), initial=kernel)
    net = original.Airbench()
    params, statistics = jax.device_get((state.params, state.batch_stats))
    found = to_torch(params, statistics, model.torch_layers)
    net.load_state_dict({k: torch.from_numpy(v) for k, v in found.items()}, strict=False)
    left = net.state_dict().keys() - found.keys()
    assert all(".norm" in name and name.endswith("weight") for name in left)
    return model, state, net


@pytest.mark.extended
def test_five_steps_equal_the_original(images, original):
    """Same weights, images and order, no augmentation, in float64: Muon's iteration multiplies what
    rounding leaves in the smallest singular values by 40 a step."""
    torch = pytest.importorskip("torch")
    model, state, net = variables_and_net(original, images)
    recipe, net = RECIPE.replace(augment=(), epochs=4, batch_size=12), net.double()
    trainer = original.Trainer(net, 4 * PER_EPOCH, 3 * PER_EPOCH, torch.float64)
    labels = np.arange(24, dtype=np.int32) % 10
    x = np.array(augment.normalize(jnp.asarray(images), "cifar10"))
    before = jax.device_get(state.params)
    with jax.enable_x64(True):
        optimizer = optimizers.make_optimizer(recipe, PER_EPOCH)
        params, batch_stats = jax.tree.map(
            lambda leaf: leaf.astype(np.float64), jax.device_get((state.params, state.batch_stats))
        )
        trained = optimizers.split_frozen(params, recipe.freeze)[0]
        state = state.replace(
            params=params, batch_stats=batch_stats, opt_state=optimizer.init(trained)
        )
        step = functools.partial(
            steps.train_step,
            model=model,
            optimizer=optimizer,
            preprocess=steps.make_preprocess("cifar10", precision="float64"),
            label_smoothing=recipe.label_smoothing,
            loss_reduction=recipe.loss_reduction,
            freeze=recipe.freeze,
        )
        step = jax.jit(step)
        for number in range(5):
            rows = np.arange(12) + 12 * (number % 2)
            state, sums = step(state, {"image": x[rows], "label": labels[rows]})
            theirs = torch.from_numpy(x[rows].transpose(0, 3, 1, 2).copy()).double()
            want = trainer.step(number, theirs, torch.from_numpy(labels[rows]).long()).item()
            assert sums["loss"] == pytest.approx(want, rel=1e-6), number
        params, statistics = jax.device_get((state.params, state.batch_stats))
    np.testing.assert_array_equal(params["whiten"]["kernel"], before["whiten"]["kernel"])
    got = to_torch(params, statistics, model.torch_layers)
    start = to_torch(before, torch_layers=model.torch_layers)
    for name, value in net.state_dict().items():
        if name not in got or name.endswith("num_batches_tracked"):
            continue
        np.testing.assert_allclose(got[name], value.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)
        if name in start and name != "whiten.weight":
            assert np.abs(value.numpy() - start[name]).max() > 1e-3, name


@pytest.mark.parametrize("tta", ["mirror", "mirror-shift"])
def test_tta_equals_the_mean_over_its_views(images, original, tta):
    torch = pytest.importorskip("torch")
    model, state, net = variables_and_net(original, images)
    variables = steps.inference_variables(state)
    recipe = dataclasses.replace(RECIPE, tta=tta)
    _, predict = setup.inference_steps(recipe, model)
    got = jax.jit(predict)(variables, images)
    x = torch.from_numpy(
        np.array(augment.normalize(jnp.asarray(images), "cifar10")).transpose(0, 3, 1, 2)
    )
    if tta == "mirror-shift":
        off = torch.autocast("cpu", enabled=False)
        want = original.logits_of(net, x, off, augmented=True)
    else:
        with torch.no_grad():
            want = (net.eval()(x) + net(x.flip(-1))) / 2
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-5)
    plain = steps.predict_step(
        variables, images, model=model, preprocess=setup.preprocess_of(recipe)
    )
    assert np.abs(got - plain).max() > 1e-4


@pytest.mark.parametrize(
    ("name", "size"),
    [("airbench", 32), pytest.param("airbench96", 24, marks=pytest.mark.slow)],
)
def test_a_step_in_pieces_on_two_devices_is_the_step_of_lax(images, name, size, monkeypatch):
    """Gradients of all weights and running statistics, of a batch whose last images are masked."""
    monkeypatch.setattr(pieces, "IMAGES", 4)
    mesh = hardware.data_mesh(2)
    x = np.asarray(images[:14, :size, :size], np.float64) / 127.5 - 1
    labels = np.arange(14, dtype=np.int32) % 10
    batch = {"image": x, "label": labels, "mask": (np.arange(14) < 11).astype(np.float32)}
    with jax.enable_x64(True):
        shapes = jnp.zeros((1, size, size, 3))
        variables = jax.jit(functools.partial(init, make_model(name)))(jax.random.key(0), shapes)
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dict(variables))

        def gradients(variables, batch, lowering, axis_name=None):
            step = functools.partial(
                steps.train_step,
                model=make_model(name, lowering=lowering),
                optimizer=optax.sgd(1.0),
                preprocess=lambda images, *_, **__: images,
                axis_name=axis_name,
            )
            state = steps.TrainState(
                step=jnp.int32(0),
                opt_state=optax.sgd(1.0).init(variables["params"]),
                key=jax.random.key(0),
                **variables,
            )
            state, sums = step(state, batch)
            return state.params, state.batch_stats, sums["loss"]

        split = programs.over_devices(
            functools.partial(gradients, lowering="pieces", axis_name=hardware.AXIS),
            mesh,
            (PartitionSpec(), PartitionSpec(hardware.AXIS)),
            PartitionSpec(),
        )
        got = jax.device_get(jax.jit(split)(variables, batch))
        want = jax.device_get(jax.jit(gradients, static_argnums=2)(variables, batch, "lax"))
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error < 1e-9, jax.tree_util.keystr(path)


def test_evaluation_in_pieces_takes_whole_batches_and_finds_the_same(images):
    """As the commands compile it, on two devices, with a batch that does not divide."""
    mesh, many = hardware.data_mesh(2), np.tile(images, (23, 1, 1, 1))[:525]
    labels = np.arange(525, dtype=np.int32) % 10
    batches = input_pipeline.batches(np.arange(525, dtype=np.int32), 525)
    variables = jax.jit(functools.partial(init, Airbench(widths=(8, 8, 8))))(
        jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    )

    def found(lowering, mesh):
        model = Airbench(widths=(8, 8, 8), lowering=lowering)
        evaluate, predict = setup.inference_steps(RECIPE.replace(tta="none"), model)
        large = {"in_pieces": setup.in_pieces(model, 525, mesh)}
        assert large["in_pieces"] == (lowering == "auto")
        sums = programs.compile_evaluation(evaluate, mesh, **large)
        logits = programs.compile_prediction(predict, mesh, **large)
        examples = placement.put(many, labels, mesh)
        return jax.device_get((sums(variables, examples, batches), logits(variables, many[None])))

    (sums, logits), (want, want_logits) = found("auto", mesh), found("gemm", None)
    assert sums["count"] == want["count"] == 525
    assert sums["loss"] == pytest.approx(want["loss"], rel=1e-5)
    np.testing.assert_allclose(logits, want_logits, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "airbench",
        pytest.param("airbench95", marks=pytest.mark.slow),
        pytest.param("airbench96", marks=pytest.mark.slow),
    ],
)
def test_lowerings_and_bfloat16_agree(images, name):
    model = make_model(name, lowering="lax")
    x = augment.normalize(jnp.asarray(images[:4]), "cifar10")
    variables = jax.jit(functools.partial(init, model))(jax.random.key(1), x)

    def logits(x, lowering):
        return jax.jit(make_model(name, lowering=lowering).apply)(variables, x)

    want = logits(x, "lax")
    assert want.shape == (4, 10)
    for lowering in ("auto", "gemm", "pieces"):
        np.testing.assert_allclose(logits(x, lowering), want, rtol=1e-3, atol=1e-4)
    rough = np.asarray(logits(x.astype(jnp.bfloat16), "lax"), np.float32)
    np.testing.assert_allclose(rough, want, atol=0.1 * np.abs(want).max())
