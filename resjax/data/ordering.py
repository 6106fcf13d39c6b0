"""The order in which training sees the examples.

It is a pure function of a key and the step, so there is no state to save: a run that resumes at
any step continues with the same batches.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key


def batch_indices(
    key: Key[Array, ""], first_step: Int[Array, ""], steps: int, batch_size: int, examples: int
) -> Int[Array, "steps batch"]:
    """Returns the indices of the examples in the batches from `first_step` on.

    The batches cut an endless sequence of epochs, each a permutation of all examples. So each epoch
    contains every example exactly once, and a batch may span two epochs.

    Args:
      key: of the run; epoch e is permuted with `fold_in(key, e)`.
      first_step: may be traced; the other sizes are static.
      steps: number of batches.
      batch_size: examples per batch.
      examples: size of the training split.
    """
    first = first_step * batch_size
    epoch = first // examples
    epochs = -(-steps * batch_size // examples) + 1  # the most that these steps can touch
    order = jax.vmap(lambda e: jax.random.permutation(jax.random.fold_in(key, e), examples))(
        epoch + jnp.arange(epochs)
    )
    position = first - epoch * examples + jnp.arange(steps * batch_size)
    return order.reshape(-1)[position].reshape(steps, batch_size)
