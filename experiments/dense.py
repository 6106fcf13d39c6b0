"""Dense tasks: depth and shortcuts matter for segmentation and detection too

He et al. 2015 (Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.3 and
tables 7 and 8) replace VGG-16 by ResNet-101 as the backbone of Faster R-CNN: the average precision
on COCO rises from 21.2 to 27.2 %, "solely due to the learned representations". The paper does not
compare plain with residual backbones. If degradation is a difficulty of optimization, a deep plain
backbone should be worse than a residual one here as well, and worse than a shallow plain one.

The sweep trains plain and residual backbones of several depths on the config's task, segmentation
or detection, from random weights and, with `pretrained`, from a network that classifies single
digits. Train such networks first:

    resjax train --config=configs/quickstart.py --config.model.shortcut=pad \\
        --config.model.depth=20 --config.data.normalization=channel --workdir=runs/digits-pad-20
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from resjax.analysis import figures as draw
from resjax.analysis.claims import Claim, compare, worse_and_better
from resjax.analysis.final_values import by_category, curves_and_final
from resjax.analysis.runs import primary_metrics
from resjax.sweeps import chain, param, product

BACKBONES = {"none": "plain", "pad": "residual"}
SCRATCH, PRETRAINED = "from random weights", "from single digits"


def sweep(
    depths: Iterable[int] = (8, 20, 56),
    shortcuts: Iterable[str] = tuple(BACKBONES),
    pretrained: str = "",
    seeds: Iterable[int] = (0, 1, 2),
) -> Iterator[dict[str, Any]]:
    """Yields the overrides of each run.

    Args:
      depths: Weight layers of the backbone.
      shortcuts: Shortcuts; "none" is a plain network.
      pretrained: The folder of a run or of weights for each backbone, with {shortcut} and {depth}
        in its name, such as runs/digits-{shortcut}-{depth}; "" trains from random weights only.
      seeds: Seeds.
    """
    depths, shortcuts, seeds = tuple(depths), tuple(shortcuts), tuple(seeds)
    yield from product(
        param("model.depth", depths), param("model.shortcut", shortcuts), param("seed", seeds)
    )
    if pretrained:
        starts = (
            {
                "model.depth": depth,
                "model.shortcut": shortcut,
                "transfer.weights": pretrained.replace("{shortcut}", shortcut).replace(
                    "{depth}", str(depth)
                ),
                "transfer.head": "new",
            }
            for depth in depths
            for shortcut in shortcuts
        )
        yield from product(chain(starts), param("seed", seeds))


@draw.style()
def figures(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """Draws the curves of each backbone and the final metric of the task."""
    final = partial(by_category, category="network", series="start")
    return curves_and_final(described(runs), curves, panel="panel", backbones=final)


def claims(runs: pd.DataFrame) -> list[Claim]:
    """Compares plain with residual backbones, and pretrained with random ones, where deepest."""
    runs = described(runs)
    depth = runs["model.depth"].max()
    [metric] = primary_metrics(runs)
    worse, better = worse_and_better(runs)
    scratch = runs[runs["start"] == SCRATCH]
    plain, residual = (f"{name}, {depth} layers" for name in BACKBONES.values())
    shallow = f"plain, {runs['model.depth'].min()} layers"
    comparisons = [
        (
            f"A {depth}-layer residual backbone has a better {metric.title} than a plain one",
            *(scratch, "network", residual, plain, better),
        ),
        (
            f"A {depth}-layer plain backbone has a worse {metric.title} than a shallow one",
            *(scratch, "network", plain, shallow, worse),
        ),
    ]
    if PRETRAINED in set(runs["start"]):
        statement = "A backbone that was pretrained on classification is better than a random one"
        same = runs[runs["network"] == residual]
        comparisons.append((statement, same, "start", PRETRAINED, SCRATCH, better))
    return [
        compare(
            rows,
            statement,
            "He et al. 2015, section 4.3, by analogy",
            "not compared",
            value=f"test_{metric.name}",
            treatment={column: treatment},
            control={column: control},
            expected=expected,
        )
        for statement, rows, column, treatment, control, expected in comparisons
        if treatment != control
    ]


def described(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds the columns `network` ("plain, 20 layers"), `start` and `panel`."""
    kind = runs["model.shortcut"].map(lambda name: BACKBONES.get(name, name))
    network = kind + runs["model.depth"].map(", {} layers".format)
    weights = runs.get("transfer.weights", pd.Series(index=runs.index, dtype=object))
    start = weights.map(lambda path: SCRATCH if pd.isna(path) else PRETRAINED)
    return runs.assign(network=network, start=start, panel=kind + " backbones, " + start)
