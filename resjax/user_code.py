"""Names of the user's own code, written `package.module:Name`."""

import importlib
import sys
from pathlib import Path
from typing import Any


def import_name(name: str) -> Any:
    """Returns the object of a name such as `my_blocks:ReZeroBlock`.

    Modules in the working directory are found too, which a console script does not search.

    Raises:
      ImportError: the module cannot be imported.
      AttributeError: the module does not define the name.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in module.split(".")):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    return getattr(importlib.import_module(module), attribute)
