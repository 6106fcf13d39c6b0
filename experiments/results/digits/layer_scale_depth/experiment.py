"""LayerScale: learned scales of branches help deep networks if they start small

Touvron et al. 2021 (arXiv 2103.17239) multiply each channel of a branch by a learned number that
starts near zero, and find that deep Transformers converge better. In a network with BN, such a
scale multiplies one that BN has already, so the network can compute nothing new. With scales that
start at 0.1 every block is nearly its shortcut; scales that start at 1 are the control.
"""

from functools import partial

from resjax.analysis import figures as draw
from resjax.analysis.claims import compare
from resjax.analysis.final_values import by_depth, curves_and_final
from resjax.analysis.runs import name_settings
from resjax.sweeps import param, product

BASIC, SMALL, ONE = "basic", "LayerScale from 0.1", "LayerScale from 1"
BLOCK = "layer_scale:LayerScale"
NETWORKS = {
    BASIC: {"model.block": "basic"},
    SMALL: {"model.block": BLOCK, "model.block_options.start": 0.1},
    ONE: {"model.block": BLOCK, "model.block_options.start": 1.0},
}


def sweep(depths=(8, 20, 56), seeds=(0, 1, 2)):
    """Yields the overrides of each run."""
    yield from product(param("model.depth", depths), NETWORKS.values(), param("seed", seeds))


@draw.style()
def figures(runs, curves):
    """Draws the curves of each network, and the final errors against depth."""
    depth = partial(by_depth, series="network")
    return curves_and_final(named(runs), curves, panel="network", depth=depth)


def claims(runs):
    """Compares the networks at the greatest depth."""
    deepest = named(runs[runs["model.depth"] == runs["model.depth"].max()])
    rows = [
        ("Scales from 0.1 lower the training error", "train_error", SMALL, "lower", 0.0),
        ("Scales from 0.1 lower the test error", "test_error", SMALL, "lower", 0.0),
        ("Scales from 1 leave the test error within 2 points", "test_error", ONE, "same", 0.02),
    ]
    return [
        compare(
            deepest,
            statement,
            source="Touvron et al. 2021" if treatment == SMALL else "a control of this experiment",
            published="no number for convolutional networks" if treatment == SMALL else "",
            value=value,
            treatment={"network": treatment},
            control={"network": BASIC},
            expected=expected,
            margin=margin,
        )
        for statement, value, treatment, expected, margin in rows
    ]


def named(runs):
    """Adds the column `network`, the name of the network."""
    return runs.assign(network=name_settings(runs, NETWORKS))
