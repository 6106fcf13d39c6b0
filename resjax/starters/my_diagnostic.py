r"""A diagnostic of my own: one value for each layer, measured inside a training step.

    python -m pytest test_my_diagnostic.py
    resjax train --config=quickstart --config.diagnostics.every=25 \
        --config.diagnostics.names=my_diagnostic:my_diagnostic --workdir=runs/my_diagnostic

The values are in layers.jsonl, in `resjax.load_layers("runs/my_diagnostic")` and in the report.
`python -m pydoc resjax.diagnostics.Context` lists what can be measured.
"""

import jax.numpy as jnp


def my_diagnostic(context):
    """Returns the cosine between the step and the descent direction of every parameter array."""

    def cosine(update, gradient):
        norms = jnp.linalg.norm(update) * jnp.linalg.norm(gradient)
        return -jnp.vdot(update, gradient) / jnp.maximum(norms, 1e-30)

    return context.per_array(cosine, context.updates, context.gradients)
