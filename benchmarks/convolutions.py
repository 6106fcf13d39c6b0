"""Times other forms of a convolution on CPU against the one that networks use.

    python benchmarks/convolutions.py

Prints, for layers of ResNets, the time of each form relative to the present one: the ratio of the
shortest times over rounds in which the forms take turns, each as four iterations of a scan.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from resjax.xla import convolution
from resjax.xla.compile_options import step_compile

ROUNDS = 5
ITERATIONS = 4
Form = Callable[[Array, Array], Any]


class Wide(convolution.Geometry):
    """The geometry of a 1x1 convolution that is computed like a wider one."""

    is_product = False


def geometry(shape: tuple[int, ...], side: int, kind: type = convolution.Geometry) -> Any:
    """Returns the geometry of a convolution that keeps the height and width of such images."""
    return kind(shape[1:3], (side, side), (1, 1), ((side // 2,) * 2,) * 2)


def output(x: Array, kernel: Array, kind: type = convolution.Geometry) -> Any:
    form = geometry(x.shape, len(kernel), kind)
    return convolution._output_p.bind(x, kernel, geometry=form, batches=0)


def kernel_gradient(x: Array, dy: Array) -> Any:
    return convolution._kernel_p.bind(x, dy, geometry=geometry(x.shape, 3), batches=0)


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


def compiled(form: Form) -> Form:
    def iterate(x: Array, y: Array) -> Array:
        def body(x: Array, _: None) -> tuple[Array, None]:
            # The mean of a product would be computed from means of its factors.
            total = sum((leaf**2).mean() for leaf in jax.tree.leaves(form(x, y)))
            return x + 1e-9 * total, None

        return lax.scan(body, x, None, length=ITERATIONS)[0]

    return jax.jit(iterate, compiler_options=step_compile())


def compare(name: str, forms: Mapping[str, Form], x: Array, y: Array) -> None:
    """Prints the time of each form relative to that of the first."""
    functions = {form: compiled(function) for form, function in forms.items()}
    seconds = dict.fromkeys(forms, float("inf"))
    for _ in range(1 + ROUNDS):
        for form, function in functions.items():
            start = time.monotonic()
            function(x, y).block_until_ready()
            seconds[form] = min(seconds[form], time.monotonic() - start)
    first = next(iter(seconds.values()))
    ratios = ", ".join(f"{form} {each / first:.2f}" for form, each in seconds.items())
    print(f"{name} {x.shape}: {ratios}", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    normal = partial(jax.random.normal, jax.random.key(0))
    for shape, features in (
        ((16, 56, 56, 64), 256),
        ((16, 56, 56, 256), 64),
        ((16, 14, 14, 1024), 256),
    ):
        forms = {
            "convolution": with_gradients(partial(output, kind=Wide)),
            "product": with_gradients(output),
        }
        compare("1x1 and gradients", forms, normal(shape), normal((1, 1, shape[-1], features)))
    layers = ((128, 32, 32, 16), (128, 16, 16, 32), (128, 8, 8, 64), (16, 14, 14, 256))
    for shape in layers:
        gradients = {
            "present": kernel_gradient,
            "by taps": gradient_by_taps,
            "by patches": gradient_by_patches,
        }
        compare("gradient of a 3x3 kernel", gradients, normal(shape), normal(shape))
    for shape in layers[1:]:
        outputs = {"present": output, "Winograd": winograd}
        compare("3x3", outputs, normal(shape), normal((3, 3, shape[-1], shape[-1])))


if __name__ == "__main__":
    main()
