"""Does a learned scale on the shortcut help a deep network?"""

from resjax.analysis import figures as draw
from resjax.sweeps import param, product


def sweep(depths=(20, 56), seeds=(0, 1, 2)):
    shortcuts = ("pad", "my_shortcuts:LearnedScale")
    yield from product(
        param("model.depth", depths), param("model.shortcut", shortcuts), param("seed", seeds)
    )


@draw.style()
def figures(runs, curves):
    columns = runs[["folder", "model.depth", "model.shortcut"]]
    curves = curves.merge(columns, on="folder")
    return {"curves": draw.error_curves(curves, panel="model.shortcut", series="model.depth")}
