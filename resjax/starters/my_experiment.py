"""Does pre-activation lower the test error of deep networks?

    python -m pytest test_my_experiment.py
    resjax sweep my_experiment.py --config=quickstart --workdir=runs/my_experiment

The keywords of `sweep` are options, such as --config.sweep.depths=8,20. `figures` and `claims` get
the tables that their parameters name: `runs`, `curves`, `layers` and `measurements`.
"""

from resjax.analysis import figures as draw
from resjax.analysis.claims import compare
from resjax.sweeps import param, product

OLD, NEW = "basic", "preact_basic"  # or a block of your own, such as my_block:MyBlock


def sweep(depths=(20, 56), seeds=(0, 1, 2)):
    """Yields the overrides of each run."""
    yield from product(
        param("model.depth", depths), param("model.block", (OLD, NEW)), param("seed", seeds)
    )


@draw.style()
def figures(runs, curves):
    """Returns figures by name: here, the metrics of each network by step."""
    curves = curves.merge(runs[["folder", "model.depth", "model.block"]], on="folder")
    return {"curves": draw.metric_curves(curves, panel="model.block", series="model.depth")}


def claims(runs):
    """Judges the claim by paired differences at equal seed and depth."""
    return [
        compare(
            runs,
            statement="Pre-activation lowers the test error",
            source="He et al. 2016, table 2",
            published="6.37 against 6.61 % (ResNet-110, CIFAR-10)",
            value="test_error",
            treatment={"model.block": NEW},
            control={"model.block": OLD},
            expected="lower",
        )
    ]
