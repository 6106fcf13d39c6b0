"""resjax: residual-network experiments in JAX and Flax.

The public names load on first use, so that `import resjax` imports neither JAX nor pandas.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resjax.analysis.runs import load_curves as load_curves
    from resjax.analysis.runs import load_layers as load_layers
    from resjax.analysis.runs import load_measurements as load_measurements
    from resjax.analysis.runs import load_runs as load_runs
    from resjax.inference.loading import load_pretrained as load_pretrained
    from resjax.models.count import count as count
    from resjax.models.resnet import build as build

    __version__: str

_MODULES = {
    "build": "resjax.models.resnet",
    "count": "resjax.models.count",
    "load_curves": "resjax.analysis.runs",
    "load_layers": "resjax.analysis.runs",
    "load_measurements": "resjax.analysis.runs",
    "load_pretrained": "resjax.inference.loading",
    "load_runs": "resjax.analysis.runs",
}

__all__ = ["__version__", *_MODULES]


if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("resjax")
        if name in _MODULES:
            return getattr(import_module(_MODULES[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
