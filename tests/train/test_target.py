"""Programs are traced and compiled for the target's devices, not for those of this machine."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from resjax.models.resnet import build
from resjax.train.estimate import forward_seconds
from resjax.train.parallel import device_memory
from resjax.train.plan import plan
from resjax.train.trainer import Trainer
from resjax.xla.compile_options import quick_compile, step_compile
from resjax.xla.target import Target, compiling_for


def on(platform):
    """A target with one device of a platform, of which nothing but the platform is known."""
    return compiling_for(Target([SimpleNamespace(platform=platform)], memory=2**30))


def primitives(platform):
    """The names of the convolutions in the gradient of a network, traced for a platform."""
    model = build("cifar_resnet8", width=4)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    with on(platform):
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        traced = jax.make_jaxpr(jax.grad(lambda v, x: model.apply(v, x).sum()))(variables, images)
    return {name for name in ("fast_convolution", "conv_general_dilated") if name in str(traced)}


@pytest.mark.parametrize("platform", ["tpu", "gpu", "cuda"])
def test_convolutions_for_an_accelerator_have_the_gradients_of_jax(platform):
    assert primitives(platform) == {"conv_general_dilated"}


def test_convolutions_for_a_cpu_have_fast_gradients():
    assert "fast_convolution" in primitives("cpu")


def test_compile_options_for_a_cpu_are_not_given_to_other_compilers():
    with on("tpu"):
        assert step_compile() is quick_compile() is None
    with on("cpu"):
        assert step_compile()
        assert quick_compile()


def test_the_estimate_of_a_steps_time_and_the_memory_are_those_of_the_target():
    work = {"images": 128, "macs": 10**9, "depth": 50, "devices": 1}
    with on("cpu"):
        slow = forward_seconds(**work)
    with on("tpu"):
        assert forward_seconds(**work) < slow
        assert device_memory() == 2**30


def test_after_the_block_programs_are_for_this_machine_again():
    before = step_compile()
    with pytest.raises(RuntimeError, match="inside"), on("tpu"):
        raise RuntimeError("inside")
    assert step_compile() == before


def instructions(compiled):
    """The text of a compiled program without its references to lines of source code."""
    tables, blank, program = compiled.as_text().partition("\n\n%")
    assert blank, tables
    return re.sub(r", metadata={[^}]*}", "", program)


@pytest.mark.usefixtures("regression")  # compiles in no time
@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_programs_for_described_devices_are_those_of_a_run(configure, backend):
    config = configure({"parallel.backend": backend})
    run = Trainer(config)
    with compiling_for(Target(jax.devices(), memory=2**30)):
        described = Trainer(config)
        shapes, dispatch = described.start(0), plan(described, 0)[0]
        compiled = [described.compile_dispatch(shapes, dispatch).call]
        compiled += [described.compile_evaluation(shapes).call]
    state = run.start(0)
    assert {type(leaf) for leaf in jax.tree.leaves(shapes)} == {jax.ShapeDtypeStruct}
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, state)
    calls = [run.compile_dispatch(state, dispatch).call, run.compile_evaluation(state).call]
    assert list(map(instructions, compiled)) == list(map(instructions, calls))
