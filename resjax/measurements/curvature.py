"""Curvature of the loss: Hessian-vector products, extreme eigenvalues and the spectral density.

Products differentiate the gradient in forward mode (Pearlmutter 1994), so they cost a few gradients
and need no matrix. The Lanczos method (by matfree, with full reorthogonalization) turns a few dozen
of them into extreme eigenvalues, and stochastic Lanczos quadrature into a density of all
eigenvalues (Ghorbani et al. 2019, arXiv 1901.10159; Papyan 2018, arXiv 1811.07062).

With batch norm there are two Hessians. In evaluation mode BN has its running statistics, which are
constants, so the loss is a mean over independent examples: the network that is evaluated. In
training mode BN normalizes by the statistics of the batch, through which derivatives pass, so the
loss is a mean over batches and depends on their size: the network that is trained. Its loss does
not change if a kernel before a norm is scaled, so along a kernel it has no curvature.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key
from matfree import decomp

from resjax.errors import UserError
from resjax.tasks import Task
from resjax.tasks.base import Batch
from resjax.train.step import eval_step, scan

Params = Any


class Eigenpairs(NamedTuple):
    """Eigenvalues from the largest to the smallest, which may be negative.

    Attributes:
      values: the eigenvalues.
      errors: an eigenvalue of the Hessian lies within this distance of each value, up to rounding.
      vectors: for each value the eigenvector of norm 1, like the parameters.
    """

    values: Float[np.ndarray, "count"]
    errors: Float[np.ndarray, "count"]
    vectors: list[Params]


class SpectralDensity(NamedTuple):
    """The density of eigenvalues: for each random vector, points with weights that sum to 1."""

    values: Float[np.ndarray, "probes steps"]
    weights: Float[np.ndarray, "probes steps"]

    def smooth(self, at: Float[np.ndarray, "points"], width: float) -> Float[np.ndarray, "points"]:
        """Returns the mean density at some points; its integral is 1.

        Args:
          at: the points.
          width: the standard deviation of the Gaussian that stands for each eigenvalue.
        """
        distances = (np.asarray(at)[:, None, None] - self.values) / width
        kernels = np.exp(-(distances**2) / 2) / (width * np.sqrt(2 * np.pi))
        return (kernels * self.weights).sum(-1).mean(-1)

    def share_below(self, value: float) -> float:
        """Returns the share of eigenvalues below a value, as in `density.share_below(0)`."""
        return float((self.weights * (self.values < value)).sum(-1).mean())


class Hessian:
    """The Hessian of the mean loss over some examples, with respect to all parameters.

    Attributes:
      size: the number of parameters.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        variables: Mapping[str, Any],
        batches: Iterable[Batch],
        train: bool = False,
    ):
        """Keeps the batches on the device.

        Args:
          model: has `apply`.
          task: its metric `loss` is differentiated, which has no label smoothing.
          variables: `params`, and `batch_stats` if there are any.
          batches: of one shape, as `FinishedRun.batches` yields them.
          train: whether BN normalizes by the statistics of each batch, as in training, instead of
            its running statistics. Examples of weight 0 would change the former, so a last batch
            that is not full is left out, or cut if it is the only one. Dropout and stochastic depth
            are off.

        Raises:
          UserError: there is no example.
        """
        given = list(batches)
        if train:
            given = _full(given)
        if not given:
            raise UserError("the Hessian of a loss needs at least one batch of examples")
        stacked = jax.tree.map(lambda *each: jnp.stack(each), *given)
        self._network = _TrainMode(model) if train else model
        self._task = task
        self._weights, self._unravel = ravel_pytree(variables["params"])
        self.size: int = self._weights.size
        self._data = {name: variables[name] for name in variables.keys() - {"params"}}, stacked
        self._total = jax.jit(self._sum)(self._weights, self._data)
        self._compiled_product = jax.jit(self._product)
        self._compiled_lanczos = jax.jit(self._lanczos, static_argnums=0)

    def loss(self) -> float:
        """Returns the mean loss."""
        numerator, weight = self._total
        return float(numerator / weight)

    def product(self, direction: Params) -> Params:
        """Returns the Hessian times a vector.

        Args:
          direction: like the parameters.
        """
        vector, _ = ravel_pytree(direction)
        return self._unravel(self._compiled_product(vector, self._weights, self._data))

    def dense(self) -> Float[np.ndarray, "size size"]:
        """Returns the whole matrix, by one product per parameter; for small networks."""
        return np.stack(
            [
                self._compiled_product(vector, self._weights, self._data)
                for vector in np.eye(self.size, dtype=self._weights.dtype)
            ]
        )

    def eigenvalues(
        self, key: Key[Array, ""], largest: int = 5, smallest: int = 1, steps: int = 50
    ) -> Eigenpairs:
        """Returns the ends of the spectrum.

        Args:
          key: of the random vector that the Lanczos method starts from.
          largest: how many of the largest eigenvalues.
          smallest: how many of the smallest, which are negative at a saddle of the loss.
          steps: products with the Hessian, each of which stores a vector like the parameters. More
            make the errors smaller.

        Raises:
          ValueError: more eigenvalues than steps.
        """
        if largest + smallest > min(steps, self.size):
            raise ValueError(
                f"{largest + smallest} eigenvalues need as many steps; set steps, now {steps}"
            )
        basis, matrix, rest = self._decompose(key, steps)
        values, coordinates = np.linalg.eigh(matrix)
        chosen = [*range(-1, -largest - 1, -1), *range(smallest - 1, -1, -1)]
        vectors = jnp.asarray(coordinates[:, chosen].T, basis.dtype) @ basis
        errors = rest * np.abs(coordinates[-1, chosen])
        return Eigenpairs(values[chosen], errors, [self._unravel(each) for each in vectors])

    def spectral_density(
        self, key: Key[Array, ""], probes: int = 4, steps: int = 50
    ) -> SpectralDensity:
        """Estimates the density of all eigenvalues by stochastic Lanczos quadrature.

        Args:
          key: of the random vectors.
          probes: random vectors, over which densities are averaged.
          steps: products with the Hessian for each of them: the points of its density.
        """
        found = []
        for own in jax.random.split(key, probes):
            values, coordinates = np.linalg.eigh(self._decompose(own, steps)[1])
            found.append((values, coordinates[0] ** 2))
        values, weights = map(np.stack, zip(*found, strict=True))
        return SpectralDensity(values, weights)

    def _decompose(self, key: Key[Array, ""], steps: int) -> tuple[Array, np.ndarray, float]:
        """Returns the Lanczos vectors, the tridiagonal matrix and the norm of the residual."""
        start = jax.random.normal(key, (self.size,), self._weights.dtype)
        steps = min(steps, self.size)
        basis, matrix, rest = self._compiled_lanczos(steps, start, self._weights, self._data)
        return basis, np.asarray(matrix, np.float64), float(rest)

    def _lanczos(self, steps: int, start: Array, weights: Array, data: Any) -> Any:
        decompose = decomp.tridiag_sym(steps, custom_vjp=False)
        found = decompose(partial(self._product, weights=weights, data=data), start)
        return found.Q_tall, found.J_small, jnp.linalg.vector_norm(found.residual)

    def _product(self, vector: Array, weights: Array, data: Any) -> Array:
        collections, batches = data

        def add_batch(total: Array, batch: Batch) -> tuple[Array, None]:
            def numerator(weights: Array) -> Array:
                return self._sums(weights, collections, batch)[0]

            added = jax.jvp(jax.grad(numerator), (weights,), (vector,))[1]
            return total + added, None

        return scan(add_batch, jnp.zeros_like(weights), batches)[0] / self._total[1]

    def _sum(self, weights: Array, data: Any) -> tuple[Array, Array]:
        """Returns numerator and weight of the loss over all batches."""
        collections, batches = data

        def add_batch(total: Any, batch: Batch) -> tuple[Any, None]:
            added = self._sums(weights, collections, batch)
            return jax.tree.map(jnp.add, total, added), None

        zero = jnp.zeros((), weights.dtype)
        return scan(add_batch, (zero, zero), batches)[0]

    def _sums(self, weights: Array, collections: Any, batch: Batch) -> tuple[Array, Array]:
        variables = {**collections, "params": self._unravel(weights)}
        numerator, weight = eval_step(variables, batch, model=self._network, task=self._task)[
            "loss"
        ]
        return numerator.sum(), weight.sum().astype(weights.dtype)


class _TrainMode:
    """A network whose `apply` computes in training mode and forgets the running statistics."""

    def __init__(self, model: Any):
        self._model = model

    def apply(self, variables: Mapping[str, Any], images: Array) -> Any:
        return self._model.apply(variables, images, train=True, mutable=["batch_stats"])[0]


def _full(batches: list[Batch]) -> list[Batch]:
    """Returns the batches without examples of weight 0, all of one shape."""
    whole = [batch for batch in batches if np.all(batch["weight"])]
    if whole or not batches:
        return whole
    counted = np.flatnonzero(batches[0]["weight"])
    return [jax.tree.map(lambda array: array[counted], batches[0])]
