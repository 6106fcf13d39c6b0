"""The suite for a user's blocks and shortcuts: ours pass, and each claim refuses what breaks it."""

import sys
import textwrap
from functools import partial

import jax
import pytest

from resjax.models import conformance
from resjax.models.conformance import CLAIMS, SHORTCUT_CLAIMS, check_block, check_shortcut
from resjax.models.presets import BLOCKS, SHORTCUTS
from resjax.models.resnet import build


@pytest.fixture
def my_module(tmp_path, monkeypatch):
    """Writes a user's module of blocks."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source):
        (tmp_path / "my_module.py").write_text(textwrap.dedent(source))
        monkeypatch.delitem(sys.modules, "my_module", raising=False)

    yield write
    sys.modules.pop("my_module", None)


QUICK_BLOCKS = ("basic", "preact_basic", "relu_preact_basic", "fixup_basic")


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
@pytest.mark.parametrize(
    "block",
    [
        block if block in QUICK_BLOCKS else pytest.param(block, marks=pytest.mark.slow)
        for block in BLOCKS
    ],
)
def test_our_blocks_pass_every_claim(block, claim):
    claim(block)


QUICK = ("dropout", "exclusive_gate")


@pytest.mark.parametrize("claim", SHORTCUT_CLAIMS, ids=lambda claim: claim.__name__)
@pytest.mark.parametrize(
    "shortcut",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SHORTCUTS],
)
def test_our_shortcuts_pass_every_claim(shortcut, claim):
    claim(shortcut=shortcut)


MY_BLOCK = '''
    """A wide-kernel block: a 5x5 convolution, then a 1x1 to twice the stage's width."""

    from flax import linen as nn

    from resjax.models.blocks import Block


    class MyBlock(Block):
        expansion = 2

        @nn.compact
        def __call__(self, x):
            out = self.features * self.expansion
            y = self.conv(self.features, 5, self.strides)(x)
            y = self.act(self.norm()(y))
            y = self.norm(last=True)(self.conv(out, 1)(y))
            return self.act(y + self.shortcut(out, self.strides)(x))
'''


def test_a_users_block_takes_one_short_file(my_module):
    assert len(MY_BLOCK.strip().splitlines()) <= 25
    my_module(MY_BLOCK)
    check_block("my_module:MyBlock")


@pytest.mark.parametrize("parent", ["Block", "nn.Module"])
def test_a_block_with_only_the_fields_in_the_readme_works(my_module, parent):
    fields = """
            features: Any
            strides: Any
            conv: Any
            norm: Any
            act: Any
            shortcut: Any
    """
    my_module(f"""
        from typing import Any

        from flax import linen as nn

        from resjax.models.blocks import Block


        class MyBlock({parent}):
            {fields.strip() if parent == "nn.Module" else ""}
            preactivation = True

            @nn.compact
            def __call__(self, x):
                y = self.act(self.norm()(x))
                y = self.conv(self.features, 3, self.strides)(y)
                y = self.conv(self.features, 3)(self.act(self.norm()(y)))
                return y + self.shortcut(self.features, self.strides)(x)
    """)
    check_block("my_module:MyBlock")


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_conv_and_norm_take_the_keywords_that_the_docstring_of_block_lists(my_module, norm):
    my_module("""
        import jax
        from flax import linen as nn

        from resjax.models.blocks import Block


        class MyBlock(Block):
            @nn.compact
            def __call__(self, x):
                ones, channels = nn.initializers.ones, x.shape[-1]
                y = self.conv(channels, 3, self.strides, feature_group_count=channels)(x)
                y = self.norm(use_bias=False, name="unshifted")(y)
                y = self.norm(use_scale=False, bias_init=ones, epsilon=1e-3, name="unscaled")(y)
                y = self.conv(self.features, (3, 3), kernel_dilation=2, kernel_init=ones)(y)
                y = self.conv(self.features, 3, padding="SAME", use_bias=True, bias_init=ones)(y)
                return self.norm(last=True)(y) + self.shortcut(self.features, self.strides)(x)
    """)
    model = build({}, block="my_module:MyBlock", depth=8, width=32, norm=norm)
    images = jax.numpy.zeros((2, 8, 8, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    train = partial(model.apply, train=True, mutable=["batch_stats"])
    assert jax.eval_shape(train, variables, images)[0].shape == (2, 10)
    block = variables["params"]["stage1"]["block1"]
    norms = {
        "batch": {"unshifted": {"scale"}, "BatchNorm_0": {"scale", "bias"}},
        "group": {"unshifted": {"scale"}, "GroupNorm_0": {"scale", "bias"}},
        "none": {"Bias_0": {"bias"}},
    }
    assert {name: set(layer) for name, layer in block.items()} == {
        "Conv_0": {"kernel"},
        "unscaled": {"bias"},
        "Conv_1": {"kernel"},
        "Conv_2": {"kernel", "bias"},
        **norms[norm],
    }


def breaking(body):
    """Returns the source of a user's block that contains `body`."""
    return f"""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from resjax.models.blocks import Block
    from resjax.models.shortcuts import pad


    class MyBlock(Block):
        @nn.compact
        def __call__(self, x):
            y = self.conv(self.features, 3, self.strides)(x)
            {body}
            return self.act(y + self.shortcut(self.features, self.strides)(x))
    """


BROKEN = {
    "another width": (
        conformance.shape,
        "return jnp.concatenate([y, y], -1)",
        r"stage1 returns \(2, 9, 9, 16\); expected \(2, 9, 9, 8\)",
    ),
    "no stride": (
        conformance.shape,
        "return jnp.repeat(jnp.repeat(y, self.strides, 1), self.strides, 2)",
        r"stage2 returns \(2, 10, 10, 16\); expected \(2, 5, 5, 16\)",
    ),
    "float32 alone": (
        conformance.dtype,
        "return nn.relu(y.astype(jnp.float32))",
        "returns float32, not bfloat16",
    ),
    "bfloat16 parameters": (
        conformance.dtype,
        "y = y * self.param('gain', nn.initializers.ones, (), jnp.bfloat16)",
        "gain is bfloat16; create it as float32",
    ),
    "a gradient that is not finite": (
        conformance.finite_gradients,
        "y = y * jnp.sqrt(self.param('gain', nn.initializers.zeros, ()))",
        "the gradient of .*/gain is not finite",
    ),
    "dependence on the layout": (
        conformance.scanned_equals_unrolled,
        "y = y * (2.0 if self.name == 'block2' else 1.0)",
        "logits of both layouts differ by",
    ),
    "a gradient that depends on the layout": (
        conformance.scanned_equals_unrolled,
        "y = 2 * y - jax.lax.stop_gradient(y) if self.name == 'block2' else y",
        "gradients of both layouts differ by",
    ),
    "a norm that never trains": (
        conformance.train_and_eval_modes,
        "y = nn.BatchNorm(use_running_average=True)(y)",
        "training does not update .*BatchNorm_0",
    ),
    "a norm that never evaluates": (
        conformance.train_and_eval_modes,
        "y = nn.BatchNorm(use_running_average=False)(y)",
        "statistics before and after evaluation differ by",
    ),
    "images that affect each other": (
        conformance.train_and_eval_modes,
        "y = y - y.mean(0)",
        "logits of an image beside itself and beside another differ by",
    ),
}


@pytest.mark.parametrize(("claim", "body", "message"), BROKEN.values(), ids=BROKEN)
def test_a_claim_refuses_a_block_that_breaks_it(my_module, claim, body, message):
    my_module(breaking(body))
    with pytest.raises(AssertionError, match=message):
        claim("my_module:MyBlock")


def breaking_shortcut(result):
    """A user's shortcut that returns `result`."""
    return f"""
    import jax.numpy as jnp
    from flax import linen as nn

    from resjax.models.shortcuts import Scaled, Shortcut, pad


    class MyShortcut(Shortcut):
        @nn.compact
        def __call__(self, x):
            padded = pad(x, self.features, self.strides)
            return {result}
    """


BROKEN_SHORTCUTS = {
    "no stride": (
        conformance.addition,
        "pad(x, self.features, 1)",
        r"with strides=2 the shortcut adds \(2, 9, 9, 16\) to a branch of \(2, 5, 5, 16\)",
    ),
    "one value per channel": (
        conformance.addition,
        "padded.mean((1, 2), keepdims=True)",
        r"with strides=1 the shortcut adds \(2, 1, 1, 8\) to a branch of \(2, 9, 9, 8\)",
    ),
    "float32 scale of the branch": (
        conformance.addition,
        "Scaled(padded, jnp.ones(()))",
        "adds float32 to a branch of bfloat16",
    ),
    "bfloat16 parameters": (
        conformance.dtype,
        "padded * self.param('gain', nn.initializers.ones, (), jnp.bfloat16)",
        "shortcut/gain is bfloat16; create it as float32",
    ),
    "infinite gradient": (
        conformance.finite_gradients,
        "padded * jnp.sqrt(self.param('gain', nn.initializers.zeros, ()))",
        "the gradient of .*shortcut/gain is not finite",
    ),
    "dependence on the layout": (
        conformance.scanned_equals_unrolled,
        "padded * (2.0 if 'block2' in self.path else 1.0)",
        "logits of both layouts differ by",
    ),
    "norm that never trains": (
        conformance.train_and_eval_modes,
        "nn.BatchNorm(use_running_average=True)(padded)",
        "training does not update .*shortcut/BatchNorm_0",
    ),
    "images that affect each other": (
        conformance.train_and_eval_modes,
        "padded - padded.mean(0)",
        "logits of an image beside itself and beside another differ by",
    ),
}


@pytest.mark.parametrize(
    ("claim", "result", "message"), BROKEN_SHORTCUTS.values(), ids=BROKEN_SHORTCUTS
)
def test_a_claim_refuses_a_shortcut_that_breaks_it(my_module, claim, result, message):
    my_module(breaking_shortcut(result))
    with pytest.raises(AssertionError, match=message):
        claim(shortcut="my_module:MyShortcut")


@pytest.mark.parametrize(
    ("check", "claims", "name"),
    [(check_block, "CLAIMS", "basic"), (check_shortcut, "SHORTCUT_CLAIMS", "pad")],
)
def test_a_check_prints_each_claim_that_holds_and_stops_at_the_first_that_does_not(
    monkeypatch, capsys, check, claims, name
):
    def holds(block="basic", shortcut="pad"):
        """It holds."""

    def fails(block="basic", shortcut="pad"):
        """It does not hold."""
        raise AssertionError((block, shortcut))

    monkeypatch.setattr(conformance, claims, (holds, fails, holds))
    with pytest.raises(AssertionError, match=r"\('basic', 'pad'\)"):
        check(name)
    assert capsys.readouterr().out == f"{name}: It holds.\n"


def test_every_claim_is_one_line():
    for claim in {*CLAIMS, *SHORTCUT_CLAIMS}:
        assert claim.__doc__.endswith(".")
        assert "\n" not in claim.__doc__


def test_trees_differ_by_their_worst_leaf_relative_to_its_largest():
    these, those = {"a": jax.numpy.array([100.0, 0.01])}, {"a": jax.numpy.array([100.0, 0.0])}
    conformance.close(these, those, "close trees", 2e-4)
    with pytest.raises(AssertionError, match=r"distant trees differ by 1.0e-04"):
        conformance.close(these, those, "distant trees", 5e-5)


def test_a_block_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no module named 'no_such_module'"):
        check_block("no_such_module:MyBlock")
