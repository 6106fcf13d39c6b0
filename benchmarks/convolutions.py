"""Times other forms of convolutions and of max-pooling on CPU against those that networks use.

    python benchmarks/convolutions.py

Prints, for layers of ResNets, the time of each form relative to the present one: the ratio of the
shortest times over rounds in which the forms take turns, each as four iterations of a scan. An
experimental option of XLA selects oneDNN; jax 0.10 ignores it.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from resjax.xla import convolution
from resjax.xla.compile_options import step_compile
from resjax.xla.pooling import max_pool

ROUNDS = 5
ITERATIONS = 4
TAPS = range(3)
ONEDNN = {"xla_cpu_experimental_onednn_custom_call": True}
Form = Callable[[Array, Array], Any]


class Wide(convolution.Geometry):
    """The geometry of a 1x1 convolution that is computed like a wider one."""

    is_product = False


def geometry(
    shape: tuple[int, ...], side: int, stride: int = 1, kind: type = convolution.Geometry
) -> Any:
    """Returns the geometry of a convolution of such images that is padded by half of its kernel."""
    return kind(shape[1:3], (side, side), (stride, stride), ((side // 2,) * 2,) * 2)


def output(x: Array, kernel: Array, kind: type = convolution.Geometry) -> Any:
    form = geometry(x.shape, len(kernel), kind=kind)
    return convolution._output_p.bind(x, kernel, geometry=form, batches=0)


def plain_output(x: Array, kernel: Array) -> Array:
    pads = geometry(x.shape, len(kernel)).padding
    return lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=convolution.NHWC)


def kernel_gradient(x: Array, dy: Array, side: int = 3) -> Any:
    stride = x.shape[1] // dy.shape[1]
    form = geometry(x.shape, side, stride)
    return convolution._kernel_p.bind(x, dy, geometry=form, batches=0)


def image_gradient(dy: Array, kernel: Array, stride: int = 1) -> Any:
    n, height, width, _ = dy.shape
    form = geometry((n, height * stride, width * stride), len(kernel), stride)
    return convolution._image_p.bind(dy, kernel, geometry=form, batches=0)


def spread(dy: Array) -> Array:
    """Puts a zero between the pixels of dy, and one after them."""
    zero = jnp.zeros((), dy.dtype)
    return lax.pad(dy, zero, [(0, 0, 0), (0, 1, 1), (0, 1, 1), (0, 0, 0)])


def kernel_gradient_by_zeros(x: Array, dy: Array, side: int = 3) -> Any:
    return kernel_gradient(x, spread(dy), side)


def image_gradient_by_zeros(dy: Array, kernel: Array) -> Any:
    return image_gradient(spread(dy), kernel)


def with_gradients(form: Form) -> Form:
    """Returns a function that computes the output and both gradients of a convolution."""
    return jax.grad(lambda x, kernel: (form(x, kernel) ** 2).sum(), (0, 1))


def shifted(x: Array) -> list[Array]:
    """Returns the pixels (n * h * w, c) below each of the nine taps of a 3x3 kernel."""
    height, width, channels = x.shape[1:]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [
        padded[:, i : i + height, j : j + width].reshape(-1, channels)
        for i in range(3)
        for j in range(3)
    ]


def gradient_by_taps(x: Array, dy: Array) -> Array:
    slopes = dy.reshape(-1, dy.shape[-1])
    return jnp.stack([tap.T @ slopes for tap in shifted(x)])


def gradient_by_patches(x: Array, dy: Array) -> Array:
    return jnp.concatenate(shifted(x), 1).T @ dy.reshape(-1, dy.shape[-1])


def gradient_by_rows_and_columns(x: Array, dy: Array) -> Array:
    """One product: x shifted by each column of the kernel, and dy by each row."""
    zero = jnp.zeros((), x.dtype)
    across = [lax.pad(x, zero, [(0, 0, 0), (0, 0, 0), (1 - k, k - 1, 0), (0, 0, 0)]) for k in TAPS]
    down = [lax.pad(dy, zero, [(0, 0, 0), (k - 1, 1 - k, 0), (0, 0, 0), (0, 0, 0)]) for k in TAPS]
    left, right = (jnp.concatenate(y, -1).reshape(-1, 3 * y[0].shape[-1]) for y in (across, down))
    product = left.T @ right
    return product.reshape(3, x.shape[-1], 3, dy.shape[-1]).transpose(2, 0, 1, 3)


def gradient_by_pairs(x: Array, dy: Array) -> Array:
    """Two columns of dy at once, as twice the channels."""
    n, height, width, channels = dy.shape
    pairs = dy.reshape(n, height, width // 2, 2 * channels).transpose(1, 2, 0, 3)
    dkernel = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        pairs,
        (1, 1),
        ((1, 1), (1, 1)),
        rhs_dilation=(1, 2),
        dimension_numbers=convolution.NHWC,
    ).reshape(x.shape[-1], 3, 4, 2, channels)
    return (dkernel[:, :, :3, 0] + dkernel[:, :, 1:, 1]).transpose(1, 2, 0, 3)


def winograd(x: Array, kernel: Array) -> Array:
    """F(2x2, 3x3) of Lavin & Gray 2015 (arXiv 1509.09308), for even sides."""
    n, height, width, channels = x.shape

    def input_transform(image: Array, axis: int, side: int) -> list[Array]:
        a, b, c, d = (lax.slice_in_dim(image, i, i + side - 1, 2, axis) for i in range(4))
        return [a - c, b + c, c - b, b - d]

    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    tiles = [
        part.reshape(-1, channels)
        for row in input_transform(padded, 1, height)
        for part in input_transform(row, 2, width)
    ]
    basis = jnp.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    filters = jnp.einsum("ia,jb,abco->ijco", basis, basis, kernel).reshape(16, channels, -1)
    a, b, c, d = (jnp.stack(tiles) @ filters).reshape(4, 4, n, height // 2, width // 2, -1)
    rows = (a + b + c, b - c - d)
    cells = [[a + b + c, b - c - d] for a, b, c, d in rows]
    return jnp.stack([jnp.stack(row, 3) for row in cells], 2).reshape(n, height, width, -1)


def compiled(form: Form, options: Mapping[str, Any]) -> Form:
    def iterate(x: Array, y: Array) -> Array:
        def body(x: Array, _: None) -> tuple[Array, None]:
            # The mean of a product would be computed from means of its factors.
            total = sum((leaf**2).mean() for leaf in jax.tree.leaves(form(x, y)))
            return x + 1e-9 * total, None

        return lax.scan(body, x, None, length=ITERATIONS)[0]

    return jax.jit(iterate, compiler_options={**(step_compile() or {}), **options})


def compare(name: str, forms: Mapping[str, Form], x: Array, y: Array) -> None:
    """Prints the time of each form relative to that of the first."""
    functions = {
        form: compiled(function, ONEDNN if "oneDNN" in form else {})
        for form, function in forms.items()
    }
    seconds = dict.fromkeys(forms, float("inf"))
    for _ in range(1 + ROUNDS):
        for form, function in functions.items():
            start = time.monotonic()
            function(x, y).block_until_ready()
            seconds[form] = min(seconds[form], time.monotonic() - start)
    first = next(iter(seconds.values()))
    ratios = ", ".join(f"{form} {each / first:.2f}" for form, each in seconds.items())
    print(f"{name} {x.shape}, {y.shape}: {ratios}", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    normal = partial(jax.random.normal, jax.random.key(0))
    for shape, features in (
        ((16, 56, 56, 64), 256),
        ((16, 56, 56, 256), 64),
        ((16, 14, 14, 1024), 256),
    ):
        products = {
            "present": with_gradients(output),
            "convolution": with_gradients(partial(output, kind=Wide)),
        }
        compare("1x1 and gradients", products, normal(shape), normal((1, 1, shape[-1], features)))
    layers = ((128, 32, 32, 16), (128, 16, 16, 32), (128, 8, 8, 64), (16, 14, 14, 256))
    for shape in layers:
        outputs = {"present": output, "oneDNN": plain_output}
        if shape[-1] > convolution.NARROW:
            outputs["Winograd"] = winograd
        compare("3x3", outputs, normal(shape), normal((3, 3, shape[-1], shape[-1])))
    for shape in layers:
        gradients = {
            "present": kernel_gradient,
            "oneDNN": kernel_gradient,
            "by taps": gradient_by_taps,
            "by patches": gradient_by_patches,
            "by rows and columns": gradient_by_rows_and_columns,
            "by pairs": gradient_by_pairs,
        }
        compare("gradient of a 3x3 kernel", gradients, normal(shape), normal(shape))
    for n, side, channels, features, taps in (
        (128, 32, 16, 32, 3),
        (128, 16, 32, 64, 3),
        (8, 56, 128, 128, 3),
        (8, 14, 512, 512, 3),
        (8, 224, 3, 64, 7),
    ):
        dy = normal((n, side // 2, side // 2, features))
        images = normal((n, side, side, channels))
        of_kernel = {
            "present": partial(kernel_gradient, side=taps),
            "with zeros": partial(kernel_gradient_by_zeros, side=taps),
        }
        compare("gradient of a kernel at stride 2", of_kernel, images, dy)
        if channels > 3:
            of_images: dict[str, Form] = {
                "present": partial(image_gradient, stride=2),
                "with zeros": image_gradient_by_zeros,
            }
            kernel = normal((taps, taps, channels, features))
            compare("gradient of images at stride 2", of_images, dy, kernel)
    for shape in ((8, 112, 112, 64), (128, 32, 32, 64)):
        pools = {
            "present": lambda x, _: max_pool(x, 3, 2, 1),
            "Flax": lambda x, _: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))),
        }
        forms = {name: with_gradients(pool) for name, pool in pools.items()}
        compare("maximum of 3x3 and gradient", forms, normal(shape), normal(shape))


if __name__ == "__main__":
    main()
