"""Command lines, provenance and Markdown pages of the benchmarks.

Importing this module imports neither JAX nor the rest of resjax, so that worker processes that
import a benchmark start quickly.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"


def command_line(doc: str | None) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Returns the parser of a benchmark and the parser of its subcommand `measure`."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="measure on this machine")
    commands.add_parser("report", help="write the page in docs/ from all results")
    return parser, measuring


def regular_expression(text: str) -> re.Pattern[str]:
    """Compiles a regular expression, as a type of argparse."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text}: no regular expression: {error}") from error


def provenance(*packages: str) -> dict[str, Any]:
    """Returns the commit, versions, device, command and time of a measurement.

    Args:
      packages: Names of distributions whose versions are recorded beside those of JAX and PyTorch.
    """
    import jax

    from resjax.machine import available_cores

    names = ("jax", "jaxlib", "flax", "optax", "torch", *packages)
    return {
        "commit": _git("rev-parse", "HEAD"),
        # A measurement of many cases writes its results as it goes.
        "dirty": bool(
            _git("status", "--porcelain", "--untracked-files=no", ":!benchmarks/results")
        ),
        "versions": {name: version for name in names if (version := _version(name))},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "start": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def results_file(benchmark: str) -> Path:
    """Returns the file for the results of a benchmark on this machine's device."""
    import jax

    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    return RESULTS / f"{benchmark}-{kind}.json"


def machine(origin: dict[str, Any]) -> str:
    """Returns the name of the machine in a provenance: "AMD EPYC, 2 cores"."""
    cpu = f"{origin['cpu']}, {origin['cores']} cores"
    return cpu if origin["device"] == "cpu" else f"{origin['device']} ({cpu})"


def source(origin: dict[str, Any]) -> str:
    """Returns time, command, commit and versions of a provenance as a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    commit = f"commit {origin['commit']}" if origin["commit"] else "no git checkout"
    changed = " and changes" if origin["dirty"] else ""
    command = f"{origin.get('xla_flags', '')} {origin['command']}".strip()
    return (
        f"{origin['start']}, `{command}`; {commit}{changed}; Python {origin['python']}, {versions}."
    )


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a Markdown table, with the first column left-aligned and the others right-aligned."""
    heads = list(heads)
    rules = [":--", *["--:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rules, *rows))


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Returns the median and range of measurements: "600 (400 to 800)"."""
    low, middle, high = (f"{q:,.{digits}f}" for q in np.quantile(values, (0, 0.5, 1)))
    return f"{middle} ({low} to {high})"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> str:
    """Returns the median of the ratios of measurements from the same rounds."""
    return f"{np.median(np.divide(numerators, denominators)):.2f}"


def _git(*words: str) -> str | None:
    """Returns the output of git for this checkout, or None without a checkout."""
    command = ["git", *words]
    try:
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux only
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return found[1] if found else platform.machine()
