"""The network of `transfer.weights`, which fills the model fields that a config leaves open."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resjax.config.schema import FIELDS, Model
from resjax.errors import UserError
from resjax.models.presets import ARCHITECTURE, architecture
from resjax.run_files import DamagedFileError, read_json_object
from resjax.user_code import require_trusted

WEIGHTS_DESCRIPTION = "weights.json"
"""The file of a weights folder that describes the network; a run folder has config.json."""


def model_of(folder: Path) -> Mapping[str, Any]:
    """Returns the model section that describes a weights folder or a run folder."""
    where = f"transfer.weights={folder}"
    if not folder.is_dir():
        what, file = ("is a file", folder) if folder.is_file() else ("no such folder", "FILE")
        raise UserError(f"{where}: {what}; make a weights folder: `resjax import {file} --out=DIR`")
    names = WEIGHTS_DESCRIPTION, "config.json"
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise UserError(
            f"{where}: holds neither weights nor a run: it has no {' and no '.join(names)}"
        )
    model = read_json_object(found[0]).get("model")
    if not isinstance(model, dict):
        raise DamagedFileError(found[0], "describes no model")
    return model


def fill_model(model: Model, described: Mapping[str, Any]) -> Model:
    """Returns `model` with the described network's values for the fields that are None."""
    known = {
        name: FIELDS[f"model.{name}"].check(value, f"transfer.weights: model.{name}")
        for name, value in described.items()
        if f"model.{name}" in FIELDS
    }
    given, options = vars(model), {}
    for kind in ("block", "shortcut"):
        remedy = f"set model.{kind}={{name}}"
        require_trusted([known.get(kind)], "transfer.weights", remedy)
    if model.name is None:
        known |= architecture(**{name: known.get(name) for name in ARCHITECTURE})
        for kind in ("block", "shortcut"):  # options belong to the class they were written for
            if given[kind] in (None, known[kind]):
                options[f"{kind}_options"] = known[f"{kind}_options"] | given[f"{kind}_options"]
    else:  # a published architecture sets all of its fields
        known = {name: value for name, value in known.items() if name not in ARCHITECTURE}
    filled = {name: value for name, value in known.items() if given[name] is None}
    return Model(**{**given, **filled, **options})
