"""The network: gradients through shortcuts, both layouts, precision, statistics, drop rates."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resjax.models import layout
from resjax.models.blocks import BasicBlock, Block
from resjax.models.conformance import close
from resjax.models.presets import ImpossibleNetworkError
from resjax.models.resnet import ResNet, build
from resjax.models.shortcuts import Pad, pad
from resjax.xla.compile_options import quick_compile

jit = partial(jax.jit, compiler_options=quick_compile())
IMAGES = np.random.default_rng(0).normal(size=(3, 5, 5, 3)).astype(np.float32)

LAST_OF_BRANCH = {  # the layer that ends a branch, and the parameter that silences it if zero
    "basic": ("BatchNorm_1", "scale"),
    "bottleneck": ("BatchNorm_2", "scale"),
    "preact_basic": ("Conv_1", "kernel"),
    "preact_bottleneck": ("Conv_2", "kernel"),
}
LAYERS = {"basic": 2, "bottleneck": 3, "preact_basic": 2, "preact_bottleneck": 3}


def network(stages, block="basic", width=4, **fields):
    depth = 3 * LAYERS.get(block, 2) + 2
    return build({}, depth=depth, block=block, width=width, **fields).clone(stages=stages)


def silence(block, variables):
    """Makes a block's branch return a constant for any input."""
    layer, parameter = LAST_OF_BRANCH[block]
    variables[layer][parameter][...] = 0


def features_of(model, variables, images=IMAGES, **options):
    apply = partial(model.apply, method="features", **options)
    return jax.tree.map(np.asarray, jit(apply)(variables, images))


def stem_gradient(model, train):
    """Returns a function from variables to the gradient of the sum of squared logits."""

    def loss(params, batch_stats):
        given = {"params": params, "batch_stats": batch_stats}
        logits, _ = model.apply(given, IMAGES, train=train, mutable=["batch_stats"])
        return (logits**2).sum()

    gradient = jit(jax.grad(loss))

    def of_stem(variables):
        gradients = gradient(variables["params"], variables["batch_stats"])
        return gradients["stem"]["Conv_0"]["kernel"]

    return of_stem


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("block", ["basic", "preact_bottleneck"])
def test_a_plain_network_has_no_path_around_its_blocks(draw, block, train):
    model = network((1, 1), block, shortcut="none")
    gradient = stem_gradient(model, train)
    variables = draw(model, IMAGES)
    assert (gradient(variables) != 0).any()
    silence(block, variables["params"]["stage2"]["block1"])
    assert (gradient(variables) == 0).all()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("block", ["basic", "preact_bottleneck"])
def test_a_residual_network_has_a_path_around_every_block(draw, block, train):
    model = network((1, 1), block)
    variables = draw(model, IMAGES)
    for stage in ("stage1", "stage2"):
        silence(block, variables["params"][stage]["block1"])
    assert (stem_gradient(model, train)(variables) != 0).any()


def normalized(variables, x):
    mean, var = (variables["batch_stats"][name] for name in ("mean", "var"))
    scale, bias = (variables["params"][name] for name in ("scale", "bias"))
    return np.maximum((x - mean) / np.sqrt(var + 1e-5) * scale + bias, 0)


def module(variables, *path):
    for name in path:
        variables = {collection: tree[name] for collection, tree in variables.items()}
    return variables


@pytest.fixture(scope="module", params=["preact_basic", "preact_bottleneck"])
def silent(request, draw):
    """A pre-activation network with silent branches: stages return what shortcuts carry."""
    model = network((2, 1, 1), request.param, loop="unroll")
    variables = draw(model, IMAGES)
    for stage in ("stage1", "stage2", "stage3"):
        for block in variables["params"][stage].values():
            silence(request.param, block)
    return variables, features_of(model, variables)


def test_a_preactivation_stem_ends_before_norm_and_activation(silent):
    variables, features = silent
    assert variables["params"]["stem"].keys() == {"Conv_0"}
    assert (features["stem"] < 0).any()


def test_only_the_first_of_equal_preactivation_blocks_carries_activated_images(
    silent,
):
    variables, features = silent
    first = module(variables, "stage1", "block1", "BatchNorm_0")
    carried = normalized(first, features["stem"])
    expected = pad(carried, features["stage1"].shape[-1], 1)
    np.testing.assert_allclose(features["stage1"], expected, rtol=1e-4, atol=1e-5)


def test_a_block_that_changes_the_shape_carries_activated_images(silent):
    variables, features = silent
    first = module(variables, "stage2", "block1", "BatchNorm_0")
    carried = normalized(first, features["stage1"])
    expected = pad(carried, features["stage2"].shape[-1], 2)
    np.testing.assert_allclose(features["stage2"], expected, rtol=1e-4, atol=1e-5)


def test_the_last_addition_is_normalized_and_activated(silent):
    variables, features = silent
    carried = normalized(module(variables, "stage3", "block1", "BatchNorm_0"), features["stage2"])
    added = pad(carried, features["stage3"].shape[-1], 2)
    expected = normalized(module(variables, "norm"), added)
    np.testing.assert_allclose(features["stage3"], expected, rtol=1e-4, atol=1e-5)


def shapes_of(model, images=IMAGES):
    return jax.eval_shape(model.init, jax.random.key(0), images)


@pytest.mark.parametrize(("block", "normed"), [("basic", True), ("preact_basic", False)])
def test_projections_are_normalized_except_those_of_activated_images(block, normed):
    shapes = shapes_of(network((1, 1), block, shortcut="project"))
    shortcut = shapes["params"]["stage2"]["block1"]["shortcut"]
    assert ("BatchNorm_0" in shortcut) is normed
    assert "Conv_0" in shortcut


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_zero_init_starts_the_last_scale_of_every_branch_at_zero_and_no_other(block, zero):
    model = network((2, 2), block, shortcut="project", zero_init_residual=zero, loop="scan")
    last, _ = LAST_OF_BRANCH[block]

    @jit
    def scales(key):  # no kernels, so that none is drawn
        leaves = jax.tree_util.tree_leaves_with_path(model.init(key, IMAGES)["params"])
        named = {jax.tree_util.keystr(path, simple=True): leaf for path, leaf in leaves}
        return {name: leaf for name, leaf in named.items() if name.endswith("scale")}

    found = scales(jax.random.key(0))
    ends = {name for name in found if last in name}
    assert len(ends) == 4
    for name, scale in found.items():
        assert (scale == (0 if zero and name in ends else 1)).all()


def test_momentum_and_epsilon_of_every_norm_are_the_networks():
    found = set()

    def record(call, arguments, keywords, context):
        if isinstance(context.module, nn.BatchNorm):
            found.add((context.module.momentum, context.module.epsilon))
        return call(*arguments, **keywords)

    for block in ("bottleneck", "preact_basic"):
        model = network((2, 2), block, shortcut="project", bn_momentum=0.8, bn_epsilon=1e-3)
        with nn.intercept_methods(record):
            shapes_of(model)
    assert found == {(0.8, 1e-3)}


def test_statistics_move_by_a_tenth_unless_bn_momentum_is_set(draw):
    stem = {}
    for momentum in (None, 0.5):
        model = network((1,), bn_momentum=momentum)
        variables = draw(model, IMAGES)
        _, changed = jit(partial(model.apply, train=True, mutable=["batch_stats"]))(
            variables, IMAGES
        )
        before = variables["batch_stats"]["stem"]["BatchNorm_0"]["mean"]
        stem[momentum] = changed["batch_stats"]["stem"]["BatchNorm_0"]["mean"] - before
    np.testing.assert_allclose(5 * stem[None], stem[0.5], rtol=1e-4, atol=1e-6)


NETWORKS = {
    "residual": {"block": "basic", "shortcut": "pad"},
    "plain": {"block": "basic", "shortcut": "none"},
    "preactivation": {"block": "preact_bottleneck", "shortcut": "project"},
}


@pytest.mark.parametrize("fields", NETWORKS.values(), ids=NETWORKS)
def test_scanned_and_unrolled_train_as_one_network(draw, fields):
    results = {}
    scanned = draw(network((3, 2), loop="scan", **fields), IMAGES)
    for loop, variables in (("scan", scanned), ("unroll", layout.unrolled(scanned))):
        model = network((3, 2), loop=loop, **fields)

        def loss(params, model=model, variables=variables):
            given = {**variables, "params": params}
            logits, changed = model.apply(given, IMAGES, train=True, mutable=["batch_stats"])
            return (logits**2).mean(), (logits, changed)

        results[loop] = jit(jax.grad(loss, has_aux=True))(variables["params"])
    (gradients, (logits, changed)), (expected_gradients, expected) = results.values()
    close(logits, expected[0], "logits")
    close(layout.unrolled(changed), expected[1], "statistics")
    close(layout.unrolled({"params": gradients})["params"], expected_gradients, "gradients")


def test_features_are_the_outputs_of_the_stem_and_every_stage():
    for name, images, sizes in (
        ("cifar_resnet20", (2, 32, 32, 3), [(32, 16), (32, 16), (16, 32), (8, 64)]),
        ("cifar_wrn16_8", (2, 32, 32, 3), [(32, 16), (32, 128), (16, 256), (8, 512)]),
        (
            "resnet50",
            (2, 224, 224, 3),
            [(56, 64), (56, 256), (28, 512), (14, 1024), (7, 2048)],
        ),
    ):
        model, given = build(name), jax.ShapeDtypeStruct(images, jnp.float32)
        variables = shapes_of(model, given)
        apply = partial(model.apply, method="features")
        features = jax.eval_shape(apply, variables, given)
        names = ["stem", *(f"stage{k}" for k in range(1, len(sizes)))]
        assert {name: feature.shape for name, feature in features.items()} == {
            name: (2, side, side, channels)
            for name, (side, channels) in zip(names, sizes, strict=True)
        }


def test_logits_are_a_linear_function_of_the_last_stages_means(draw):
    model = network((1, 1))
    variables = draw(model, IMAGES)
    last = features_of(model, variables)["stage2"].mean((1, 2))
    head = variables["params"]["head"]
    logits = jit(model.apply)(variables, IMAGES)
    np.testing.assert_allclose(logits, last @ head["kernel"] + head["bias"], rtol=1e-4, atol=1e-5)


def test_features_need_no_head(draw):
    model = network((1, 1))
    variables = draw(model, IMAGES)
    expected = features_of(model, variables)
    del variables["params"]["head"]
    jax.tree.map(np.testing.assert_array_equal, features_of(model, variables), expected)


@pytest.mark.parametrize(
    ("block", "shortcut"),
    [
        ("basic", "project_avg"),
        ("basic", "exclusive_gate"),
        ("bottleneck", "scale"),
        ("preact_basic", "pad"),
        ("preact_bottleneck", "project"),
    ],
)
def test_in_bfloat16_logits_parameters_and_statistics_stay_float32(block, shortcut):
    model = network((2, 2), block, shortcut=shortcut, dtype="bfloat16")
    variables = shapes_of(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits, changed = jax.eval_shape(
        partial(model.apply, train=True, mutable=["batch_stats"]), variables, IMAGES
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, changed))} == {jnp.dtype("float32")}
    features = jax.eval_shape(partial(model.apply, method="features"), variables, IMAGES)
    assert {feature.dtype for feature in features.values()} == {jnp.dtype("bfloat16")}


def test_resnet_d_has_three_convolutions_in_its_stem_and_averages_before_projecting():
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = shapes_of(build("resnet50d"), images)["params"]
    kernels = [params["stem"][f"Conv_{i}"]["kernel"].shape for i in range(3)]
    assert kernels == [(3, 3, 3, 32), (3, 3, 32, 32), (3, 3, 32, 64)]
    assert build("resnet50d").shortcut.func.__name__ == "ProjectAverage"


@pytest.mark.parametrize(("blocks", "names"), [(100, 100), (101, 2)])
def test_auto_unrolls_up_to_100_blocks(blocks, names):
    assert len(shapes_of(network((blocks,)))["params"]["stage1"]) == names


class Ones(Block):
    """A block whose branch is one: a stage sums the scales of its branches."""

    @nn.compact
    def __call__(self, x):
        return jnp.ones_like(x) + self.shortcut(self.features, self.strides)(x)


ONE_PIXEL = np.zeros((20_000, 1, 1, 1), np.float32)
LAST_RATE = 0.6


def counting(loop):
    return ResNet((3, 3), Ones, Pad, width=1, stem_width=1, loop=loop, stochastic_depth=LAST_RATE)


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_drop_rates_grow_linearly_up_to_the_last_block(loop):
    model = counting(loop)
    variables = jit(model.init)(jax.random.key(0), ONE_PIXEL)
    features = features_of(
        model,
        variables,
        ONE_PIXEL,
        train=True,
        rngs={"dropout": jax.random.key(1)},
        mutable=["batch_stats"],
    )[0]
    start = 0.0
    for stage, first in (("stage1", 1), ("stage2", 4)):
        keep = np.array([1 - LAST_RATE * block / 6 for block in range(first, first + 3)])
        sums = features[stage][:, 0, 0, 0] - start
        start = features[stage][:, 0, 0, 0]
        for survivors in itertools.product([0, 1], repeat=3):
            chosen = np.array(survivors)
            probability = np.prod(np.where(chosen, keep, 1 - keep))
            seen = np.isclose(sums, (chosen / keep).sum(), atol=1e-4).mean()
            assert seen == pytest.approx(probability, abs=0.015)


@pytest.mark.parametrize(
    ("scale", "factors"),
    [
        (0.5, [0.5] * 6),
        ("1/L", [1 / 6] * 6),
        ((1, 2, 3, 4, 0, 6), [1, 2, 3, 4, 0, 6]),
        ("learned:L^-0.5", [6**-0.5] * 6),
        (jnp.arange(6.0), range(6)),
    ],
    ids=["number", "power", "tuple", "learned", "array"],
)
@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_every_branch_is_scaled_by_its_own_factor(loop, scale, factors):
    model = counting(loop).clone(branch_scale=scale, stochastic_depth=0.0)
    pixel = ONE_PIXEL[:1]
    variables = jit(model.init)(jax.random.key(0), pixel)
    features = features_of(model, variables, pixel)
    first, second = np.sum(factors[:3]), np.sum(factors[3:])
    np.testing.assert_allclose(features["stage1"][0, 0, 0], [first], rtol=1e-6)
    np.testing.assert_allclose(features["stage2"][0, 0, 0], [first + second, second], rtol=1e-6)


def test_dropped_and_scaled_branches_multiply_both():
    model = counting("scan").clone(branch_scale=3.0)
    variables, key = jit(model.init)(jax.random.key(0), ONE_PIXEL), jax.random.key(1)
    options = {"train": True, "rngs": {"dropout": key}, "mutable": ["batch_stats"]}
    tripled, _ = features_of(model, variables, ONE_PIXEL, **options)
    once, _ = features_of(model.clone(branch_scale=1.0), variables, ONE_PIXEL, **options)
    np.testing.assert_allclose(tripled["stage2"], 3 * once["stage2"], rtol=1e-6)


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_a_learned_scale_is_a_parameter_of_each_block_and_opens_it(loop):
    """At 0 a block is its shortcut, and only the scale gets a gradient: ReZero and SkipInit."""
    model = network((3,), loop=loop, branch_scale="learned", norm="none")
    variables = jit(model.init)(jax.random.key(0), IMAGES)
    features = features_of(model, variables)
    np.testing.assert_array_equal(features["stage1"], features["stem"])
    gradients = jit(jax.grad(lambda params: (model.apply({"params": params}, IMAGES) ** 2).sum()))(
        variables["params"]
    )["stage1"]
    blocks = [gradients["blocks"]] if loop == "scan" else [gradients["block2"], gradients["block3"]]
    for block in blocks:
        assert (block["branch_scale"]["scale"] != 0).all()
        assert (block["Conv_0"]["kernel"] == 0).all()


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_a_fixup_network_starts_with_blocks_of_its_depth_and_a_zero_classifier(loop):
    model = network((4,), "fixup_basic", width=64, loop=loop)
    variables = jit(model.init)(jax.random.key(0), IMAGES)
    assert (jit(model.apply)(variables, IMAGES) == 0).all()
    kernel = variables["params"]["stage1"]["block1"]["Conv_0"]["kernel"]
    assert float(kernel.std()) == pytest.approx((2 / (9 * 64)) ** 0.5 / 2, rel=0.05)


@pytest.mark.parametrize("scale", [0.5, "learned"])
def test_a_scaled_branch_keeps_the_type_of_the_network(scale):
    model = network((2,), branch_scale=scale, dtype="bfloat16")
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    features = jax.eval_shape(partial(model.apply, method="features"), variables, IMAGES)
    assert features["stage1"].dtype == jnp.bfloat16


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_a_stage_does_not_change_images_whose_branches_are_all_dropped(draw, loop):
    model = network((3,), loop=loop, stochastic_depth=0.9)  # rates of 0.3, 0.6 and 0.9
    images = np.random.default_rng(1).normal(size=(128, 3, 3, 3)).astype(np.float32)
    options = {"train": True, "mutable": ["batch_stats"]}
    variables = draw(model, images)
    key = {"dropout": jax.random.key(0)}
    features, _ = features_of(model, variables, images, rngs=key, **options)
    unchanged = (features["stem"] == features["stage1"]).all((1, 2, 3))
    assert 5 <= unchanged.sum() <= 40  # 0.162 of 128 are 21
    features, _ = features_of(model, variables, images, **options)
    assert not (features["stem"] == features["stage1"]).all((1, 2, 3)).any()


@pytest.mark.parametrize(
    ("train", "key"), [(True, False), (False, True)], ids=["no key", "evaluation"]
)
def test_nothing_is_dropped_without_a_key_or_in_evaluation(draw, train, key):
    rngs = {"dropout": jax.random.key(0)} if key else None
    model, never = network((2, 2), stochastic_depth=0.9), network((2, 2))
    variables = draw(model, IMAGES)
    logits, expected = (
        jit(partial(one.apply, train=train, mutable=["batch_stats"], rngs=rngs))(variables, IMAGES)
        for one in (model, never)
    )
    close(logits, expected, "logits with and without stochastic depth", 0)


def test_build_accepts_a_name_a_mapping_or_an_object():
    class Section:
        def __init__(self):
            self.name, self.shortcut, self.classes = "cifar_plain56", "pad", 7

    same = {"name": "cifar_plain56", "shortcut": "pad", "classes": 7}
    models = [build("cifar_plain56", shortcut="pad", classes=7), build(same), build(Section())]
    shapes = [shapes_of(model) for model in models]
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0]["params"]["head"]["bias"].shape == (7,)
    assert all(model.stages == (9, 9, 9) for model in models)
    assert all(model.shortcut.func is Pad and model.block.func is BasicBlock for model in models)


@pytest.mark.parametrize(("name", "classes"), [("cifar_resnet8", 10), ("resnet18", 1000)])
def test_the_family_sets_the_default_number_of_classes(name, classes):
    assert build(name).head.features == classes


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_remat_recomputes_no_convolution(loop):
    def convolutions(remat):
        model = network((3, 1), loop=loop, remat=remat)
        variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)

        def loss(params, stats):
            given = {"params": params, "batch_stats": stats}
            return model.apply(given, IMAGES, train=True, mutable=["batch_stats"])[0].sum()

        program = jax.jit(jax.grad(loss)).lower(variables["params"], variables["batch_stats"])
        return program.as_text().count("stablehlo.convolution")

    assert convolutions(remat=True) == convolutions(remat=False)


@pytest.mark.parametrize(
    ("block", "depth", "options"),
    [
        ("basic", 8, {}),
        ("preact_basic", 8, {}),
        ("fixup_basic", 8, {}),
        ("bottleneck", 11, {}),
        ("bottleneck", 11, {"stride_in_1x1": True}),
        ("preact_bottleneck", 11, {}),
    ],
)
@pytest.mark.parametrize("shortcut", ["pad", "project"])
def test_a_dilated_stage_has_the_features_of_the_strided_one_between_others(
    block, depth, options, shortcut
):
    fields = {"depth": depth, "block": block, "block_options": options, "shortcut": shortcut}
    strided = build({"family": "cifar", "width": 4, **fields})
    images = jax.random.normal(jax.random.key(0), (1, 13, 11, 3))
    variables = jit(strided.init)(jax.random.key(1), images)

    def features(model):
        return jit(partial(model.apply, method="features"))(variables, images)

    dilated = features(strided.clone(dilated_stages=2))
    assert dilated["stage3"].shape[1:3] == (13, 11)
    for stage, strides in (("stage2", 2), ("stage3", 4)):
        expected = features(strided)[stage]
        found = dilated[stage][:, ::strides, ::strides]
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


class PoolingBlock(BasicBlock):
    """Halves its output by itself."""

    @nn.compact
    def __call__(self, x):
        y = nn.avg_pool(x, (2, 2), (self.strides,) * 2, "SAME")
        return self.conv(self.features, 3)(y)


def test_a_block_that_strides_by_itself_cannot_be_dilated():
    model = build("cifar_resnet8", width=4, dilated_stages=1)
    model = model.clone(block=PoolingBlock)
    with pytest.raises(ImpossibleNetworkError, match=r"stage3: .*PoolingBlock strides by itself"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("cifar_resnet8", {}),
        ("cifar_resnet8", {"output_stride": 2}),
        ("resnet50", {"output_stride": 8}),
        ("resnet50", {"output_stride": 16}),
        ("resnet50d", {}),
        ("bit_r50x1", {}),
        ("resnet18", {"stem_pool": "none"}),
        ("cifar_wrn16_8", {}),
    ],
)
def test_strides_and_channels_of_features_are_those_declared(name, fields):
    model = build(name, **fields)
    images = jnp.zeros((1, 64, 96, 3))
    shapes = jax.eval_shape(model.clone(head=None).init_with_output, jax.random.key(0), images)[0]
    for key, features in shapes.items():
        stride = model.feature_strides[key]
        assert features.shape == (1, 64 // stride, 96 // stride, model.feature_channels[key])
    assert shapes.keys() == model.feature_strides.keys() == model.feature_channels.keys()
    if "output_stride" in fields:
        assert [*model.feature_strides.values()][-1] == fields["output_stride"]


def test_an_output_stride_that_no_stage_has_is_one_line():
    with pytest.raises(ValueError, match="output_stride must be one of 4, 8, 16, 32, not 6"):
        build("resnet50", output_stride=6)
