"""Chaos: do runs survive being killed and damaged on disk, with exactly the same results?

    python benchmarks/chaos.py measure
    python benchmarks/chaos.py report

`measure` exposes small runs to the failures of large ones and writes the results of each part to
benchmarks/results/; `report` writes docs/chaos.md from them. `make chaos` does both. The parts are

- kills: sends SIGKILL to a run at random moments until it finishes, then compares all arrays and
  metrics.jsonl with those of a run that was not interrupted.
- boundaries: sends SIGKILL to a run before each change that Python makes in its checkpoints/ in
  turn; after each kill every checkpoint must be whole. `resjax verify` must find the same in a run
  that is in training.
- damage: flips a bit in a checkpoint, truncates or deletes one of its files, and restores it with
  resjax and with Orbax alone.
- files: replaces files of a run folder by examples from hypothesis, then runs every command.
- processes: sends SIGTERM or SIGKILL to one of two processes that train together.
- disk: fills a file system of a few megabytes while a run saves there (Linux, as root).
- cost: measures the seconds to save and restore, compared with Orbax alone.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from reporting import (
    DOCS,
    RESULTS,
    ROOT,
    command_line,
    machine,
    provenance,
    source,
    spread,
    table,
)

from resjax import cli
from resjax.config import Config, default_config, load, override, resolve
from resjax.disk import write_atomically
from resjax.errors import UserError
from resjax.run_files import Metric
from resjax.train import checkpoints, loop
from resjax.train.checkpoint_reader import CheckpointReader, named_arrays, read_checkpoint
from resjax.train.checkpoints import CheckpointManager
from resjax.train.trainer import Trainer
from resjax.train.verify import verify

ERROR = Metric("error", unit="fraction")
QUICKSTART = ROOT / "configs" / "quickstart.py"
SMALL = {
    "model.family": "cifar",
    "model.depth": 8,
    "model.width": 4,
    "data.batch_size": 16,
    "train.steps": 120,
    "train.log_every": 5,
    "train.eval_every": 15,
    "train.checkpoint_every": 10,
}
# A run with these fields trains for about as long as it starts and compiles.
LONGER = {"train.eval_every": 30, "train.checkpoint_every": 60}


class Plan(NamedTuple):
    """The number of failures of each kind, and the amount of measurement."""

    kills: int = 100
    steps: int = 1500  # of a run that is killed
    boundary_kills: int = 200
    flips: int = 200
    truncations: int = 50
    deletions: int = 50
    inputs: int = 100  # per file
    seed: int = 0
    cost: tuple[str, ...] = ("cifar10 depth 110", "imagenet depth 50")
    rounds: int = 5  # in which costs are measured


def small_config(**fields: Any) -> Config:
    changed = {name.replace("__", "."): value for name, value in fields.items()}
    return resolve(override(default_config(), SMALL | changed))


def command(folder: Path, **fields: Any) -> list[str]:
    """Returns the words of a `resjax train` command with the small config."""
    options = [f"--config.{name}={value}" for name, value in (SMALL | fields).items()]
    program = [sys.executable, "-c", "import sys; from resjax.cli import main; sys.exit(main())"]
    return [*program, "train", f"--config={QUICKSTART}", f"--workdir={folder}", *options]


def start(folder: Path, *options: str, **fields: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command(folder, **fields), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Returns the digests of the last arrays and the metrics of a finished run."""
    newest = CheckpointReader(folder / "checkpoints").steps()[-1]
    return read_checkpoint(folder / "checkpoints" / str(newest))[1]["arrays"], (
        folder / "metrics.jsonl"
    ).read_bytes()


def wait(process: subprocess.Popen[str]) -> None:
    """Waits for a process and raises RuntimeError if it failed."""
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors)


def kills(plan: Plan, folder: Path) -> dict[str, Any]:
    """Kills runs at random moments."""
    generator = random.Random(plan.seed)
    reference = folder / "reference"
    began = time.monotonic()
    longer = LONGER | {"train.steps": plan.steps}
    wait(start(reference, **longer))
    seconds = time.monotonic() - began
    moments: Counter[str] = Counter()
    runs = different = 0
    while sum(moments.values()) < plan.kills:
        run = folder / f"run{runs}"
        while True:
            process = start(run, **longer)
            with suppress(subprocess.TimeoutExpired):
                _, errors = process.communicate(timeout=generator.uniform(0, seconds))
                if process.returncode:
                    raise RuntimeError(errors)
                break
            moments[moment(run)] += 1
            process.kill()
            process.communicate()
        runs += 1
        different += result(run) != result(reference)
        shutil.rmtree(run)
    return {
        "kills": sum(moments.values()),
        "moments": dict(moments),
        "runs": runs,
        "different": different,
        "seconds": seconds,
    }


def moment(run: Path) -> str:
    """Returns what a process was doing, as far as its run folder shows."""
    if not (run / "lock").exists():
        return "starting or just finished"
    if list(run.glob("checkpoints/*orbax-checkpoint-tmp*")):
        return "saving"
    files = [path.stat().st_mtime for path in run.glob("metrics.jsonl")]
    lock = (run / "lock").stat().st_ctime
    return "training" if files and files[0] >= lock else "compiling or restoring"


KILL_AT_CHANGE = """
import atexit, os, signal, sys
left = first = int(os.environ["KILL_AT_CHANGE"])

def changes(event, arguments):
    if event in ("os.remove", "os.rmdir") and arguments[1] != -1:  # by shutil.rmtree
        return True
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return False
    names = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
    return event in names and "/checkpoints/" in str(arguments[0])

def count(event, arguments):
    global left
    if changes(event, arguments):
        left -= 1
        if left == 0:
            print("killed before", event, file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

atexit.register(lambda: print("changes", first - left, file=sys.stderr))
sys.addaudithook(count)
from resjax.cli import main
sys.exit(main())
"""


def boundaries(plan: Plan, folder: Path) -> dict[str, Any]:
    """Kills runs before each change in their checkpoints in turn."""
    fields = {"train.steps": plan.steps}
    reference = folder / "reference"
    code, errors = run_until_change(reference, 10**9, fields)
    if code:
        raise RuntimeError(errors)
    saves = -(-plan.steps // small_config().train.checkpoint_every)
    per_save = int(errors.split("changes ")[1].split()[0]) // saves
    kinds: Counter[str] = Counter()
    runs = different = refused = lost = 0
    while sum(kinds.values()) < plan.boundary_kills:
        run, newest = folder / f"run{runs}", 0
        while True:
            # In the second save of the process, so that there is work between two kills.
            code, errors = run_until_change(
                run, per_save + 1 + sum(kinds.values()) % per_save, fields
            )
            if code == 0:
                break
            if code != -signal.SIGKILL:
                raise RuntimeError(errors)
            kinds[errors.split("killed before ")[1].split()[0]] += 1
            steps = whole_checkpoints(run)
            refused += sum(not whole for whole in steps.values())
            lost += max(steps, default=0) < newest
            newest = max(steps, default=0)
        runs += 1
        different += result(run) != result(reference)
        shutil.rmtree(run)
    return {
        "kills": sum(kinds.values()),
        "per_save": per_save,
        "kinds": dict(kinds),
        "runs": runs,
        "different": different,
        "refused": refused,
        "lost": lost,
        "live": verify_in_training(folder / "live", fields),
    }


def run_until_change(run: Path, number: int, fields: dict[str, Any]) -> tuple[int, str]:
    """Trains until a change in checkpoints/ or to the end; returns exit code and error output."""
    words = [sys.executable, "-c", KILL_AT_CHANGE, *command(run, **fields)[3:]]
    environment = os.environ | {"KILL_AT_CHANGE": str(number)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    return done.returncode, done.stderr


def whole_checkpoints(run: Path) -> dict[int, bool]:
    """Returns for each step in a run's checkpoints/ whether its checkpoint passes verification."""
    reader = CheckpointReader(run / "checkpoints")
    return {step: reader.restore_step(step, None) is not None for step in reader.steps()}


def verify_in_training(run: Path, fields: dict[str, Any]) -> dict[str, int]:
    """Verifies a run again and again while it trains."""
    process = start(run, **fields)
    times = damaged = 0
    while process.poll() is None:
        if (run / "metrics.jsonl").exists():
            damaged += sum(finding.damaged for finding in verify(run))
            times += 1
    wait(process)
    return {"times": times, "damaged": damaged}


class Damage(NamedTuple):
    kind: str
    apply: Callable[[Path, random.Random], None]
    times: str  # a field of the plan


def flip(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = generator.randrange(8 * len(content))
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(content)


def truncate(path: Path, generator: random.Random) -> None:
    os.truncate(path, generator.randrange(path.stat().st_size))


def delete(path: Path, generator: random.Random) -> None:
    path.unlink()


DAMAGES = (
    Damage("bit flipped", flip, "flips"),
    Damage("file truncated", truncate, "truncations"),
    Damage("file deleted", delete, "deletions"),
)


def damage(plan: Plan, folder: Path) -> dict[str, Any]:
    """Damages a random file of the newest checkpoint at a random position, and restores it."""
    generator = random.Random(plan.seed)
    trainer = Trainer(small_config())
    template = trainer.checkpoint_template(trainer.init(0))
    loop.train(small_config(train__steps=40), folder / "run")
    reader = CheckpointReader(folder / "run" / "checkpoints")
    steps = reader.steps()
    intact = ((step, reader.restore_step(step, template)) for step in steps)
    expected = {step: contents(restored.state) for step, restored in intact if restored}
    results: dict[str, dict[str, dict[str, int]]] = {}
    for kind, apply, times in DAMAGES:
        outcomes: dict[str, Counter[str]] = {"resjax": Counter(), "Orbax": Counter()}
        for _ in range(getattr(plan, times)):
            copy = folder / "copy"
            shutil.copytree(reader.folder, copy / "checkpoints")
            newest = copy / "checkpoints" / str(steps[-1])
            files = sorted(path for path in newest.rglob("*") if path.is_file())
            apply(generator.choice([path for path in files if path.stat().st_size]), generator)
            outcomes["Orbax"][by_orbax(newest, template, expected[steps[-1]])] += 1
            outcomes["resjax"][by_resjax(copy / "checkpoints", template, expected)] += 1
            shutil.rmtree(copy)
        results[kind] = {name: dict(counted) for name, counted in outcomes.items()}
    return {"outcomes": results}


def contents(state: Any) -> list[bytes]:
    return [np.asarray(array).tobytes() for array in named_arrays(state).values()]


OUTCOMES = (
    "restored with wrong values",
    "restored correctly",
    "reported, previous checkpoint restored",
    "error raised",
)
WRONG, CORRECT, PREVIOUS, RAISED = OUTCOMES


def by_resjax(folder: Path, template: Any, expected: dict[int, list[bytes]]) -> str:
    """Returns the outcome of restoring the newest checkpoint of a folder with resjax."""
    warnings: list[str] = []
    manager = CheckpointManager(folder, ERROR, warnings.append)
    restored = manager.restore_latest(template)
    manager.close()
    if restored is None or contents(restored.state) != expected[restored.step]:
        return WRONG
    return PREVIOUS if warnings else CORRECT


def by_orbax(folder: Path, template: Any, expected: list[bytes]) -> str:
    """Returns the outcome of restoring a checkpoint with Orbax alone."""
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, named_arrays(template(0)))
    arguments = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            arrays = checkpointer.restore(folder, args=arguments)["state"]
    except Exception:
        return RAISED
    found = [np.asarray(arrays[name]).tobytes() for name in target]
    return CORRECT if found == expected else WRONG


FILES = ("config.json", "metrics.jsonl", "summary.json", "provenance.json", "record", "sweep.json")


def files(plan: Plan, folder: Path) -> dict[str, Any]:
    """Replaces each file by examples from hypothesis and runs all commands that read it."""
    from hypothesis import HealthCheck, given, settings

    sweep = folder / "sweep"
    run = sweep / "runs" / "one"
    loop.train(small_config(train__steps=20), run)
    (sweep / "sweep.json").write_text(json.dumps({"runs": [{"folder": "runs/one"}]}))
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in FILES}

    def trial(name: str) -> Callable[[bytes], None]:
        def run_commands(content: bytes) -> None:
            copy = folder / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(sweep, copy)
            locate(copy, name).write_bytes(content)
            if name != "summary.json":  # lets the run continue
                locate(copy, "summary.json").unlink()
            before = {each.name for each in copy.rglob("*.json*")}
            for words in commands(copy):
                outcomes[name][exit_code(words)] += 1
            if deleted := before - {each.name for each in copy.rglob("*.json*")}:
                raise AssertionError(f"{', '.join(deleted)} deleted")

        return run_commands

    examples = settings(
        max_examples=plan.inputs,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    for name in FILES:
        examples(given(damaged_contents(locate(sweep, name).read_bytes()))(trial(name)))()
    return {"outcomes": {name: dict(counted) for name, counted in outcomes.items()}}


def damaged_contents(original: bytes) -> Any:
    """Returns a strategy of truncated, spliced, random and changed contents of a JSON file."""
    from hypothesis import strategies as st

    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    values = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner)
    )
    truncated = st.integers(0, len(original)).map(lambda end: original[:end])
    spliced = st.tuples(st.integers(0, len(original) - 1), st.binary(min_size=1, max_size=4)).map(
        lambda splice: original[: splice[0]] + splice[1] + original[splice[0] + len(splice[1]) :]
    )
    json_text = values.map(lambda value: json.dumps(value).encode())

    def change_value(pair: tuple[int, Any]) -> bytes:
        with suppress(ValueError):
            content = json.loads(original.splitlines()[0] if b"}\n{" in original else original)
            name = sorted(content)[pair[0] % len(content)]
            return json.dumps({**content, name: pair[1]}).encode() + b"\n"
        return original[:-1]

    changed = st.tuples(st.integers(0, 99), values).map(change_value)
    return truncated | spliced | st.binary(max_size=20) | json_text | changed


def locate(sweep: Path, name: str) -> Path:
    run = sweep / "runs" / "one"
    if name == "record":
        return run / "checkpoints" / "20" / "record" / "metadata"
    return sweep / name if name == "sweep.json" else run / name


def commands(sweep: Path) -> Iterator[list[str]]:
    """Yields the words of all commands that read a run folder."""
    run = sweep / "runs" / "one"
    yield ["verify", str(sweep)]
    yield ["evaluate", f"--workdir={run}", "--checkpoint=best"]
    yield ["report", str(sweep)]
    fields = [f"--config.{name}={value}" for name, value in (SMALL | {"train.steps": 20}).items()]
    yield ["train", f"--config={QUICKSTART}", f"--workdir={run}", *fields]


def exit_code(words: list[str]) -> str:
    """Runs a command and returns its name and exit code; an exception is a fault of resjax."""
    errors = StringIO()
    with redirect_stdout(StringIO()), redirect_stderr(errors):
        code = cli.main(words)
    if code == 2 and errors.getvalue().count("resjax: error") != 1:
        raise AssertionError(f"{words}: {errors.getvalue()}")
    return f"{words[0]} {code}"


def processes(plan: Plan, folder: Path) -> dict[str, Any]:
    """Stops, then kills, one of two processes that train together."""
    steps = {"train.steps": 60}  # few, because collectives over a socket are slow
    for process in together(folder / "reference", **steps):
        wait(process)
    found = {}
    for by in (signal.SIGTERM, signal.SIGKILL):
        run = folder / by.name
        pair = together(run, **steps)
        wait_for(CheckpointReader(run / "checkpoints").steps, pair)
        pair[1].send_signal(by)
        began = time.monotonic()
        messages = [process.communicate()[1] for process in pair]
        seconds = time.monotonic() - began
        codes = [process.returncode for process in pair]
        stopped = [line for text in messages for line in text.splitlines() if "stopped by" in line]
        for process in together(run, **steps):
            wait(process)
        found[by.name] = {
            "codes": codes,
            "seconds": seconds,
            "stopped": stopped,
            "different": result(run) != result(folder / "reference"),
        }
    return {"signals": found}


def together(folder: Path, **fields: Any) -> list[subprocess.Popen[str]]:
    """Starts two processes that train one run."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    cluster = [f"--coordinator=127.0.0.1:{port}", "--processes=2"]
    return [start(folder, *cluster, f"--process={index}", **fields) for index in range(2)]


def wait_for(condition: Callable[[], Any], pair: Iterable[subprocess.Popen[str]]) -> None:
    """Waits for a condition; raises RuntimeError if a process ends before."""
    while not condition():
        if ended := [process for process in pair if process.poll() is not None]:
            raise RuntimeError(ended[0].communicate()[1])
        time.sleep(0.05)


def disk(plan: Plan, folder: Path) -> dict[str, Any]:
    """Fills a file system while a run saves there, first for a while and then to the end."""
    reference = folder / "reference"
    loop.train(small_config(), reference)
    found = {}
    with ExitStack() as stack:
        stack.enter_context(replaced(checkpoints, "RETRY_SECONDS", 0.0))
        small_disk = stack.enter_context(mounted(folder / "disk", megabytes=4))
        for name, freed_at in (("for a while", 80), ("to the end", None)):
            run, warnings = small_disk / "run", list[str]()
            ballast = small_disk / "ballast"

            def fill(progress: Any, ballast: Path = ballast, freed_at: Any = freed_at) -> None:
                if 40 <= progress.step < (freed_at or progress.steps + 1):
                    write_until_full(
                        ballast
                    )  # in each dispatch, because a failed save frees its space
                elif progress.step == freed_at:
                    ballast.unlink(missing_ok=True)

            error = ""
            try:
                loop.train(small_config(), run, fill, warn=warnings.append)
            except UserError as raised:
                error = str(raised)
            steps = CheckpointReader(run / "checkpoints").steps()
            ballast.unlink(missing_ok=True)
            loop.train(small_config(), run)
            found[name] = {
                "warnings": len(warnings),
                "first": warnings[0] if warnings else "",
                "error": error.replace(str(small_disk), "DISK"),
                "checkpoints": steps,
                "different": result(run) != result(reference),
            }
            shutil.rmtree(run)
    return {"disks": found}


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def mounted(folder: Path, megabytes: int) -> Iterator[Path]:
    """Mounts a file system in memory.

    Raises:
      PermissionError: this process has no permission to mount it.
    """
    folder.mkdir(parents=True)
    size = f"size={megabytes}m"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder]).returncode:
        raise PermissionError(f"{folder}: cannot mount a file system there")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def write_until_full(path: Path) -> None:
    with path.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1024))


def cost(plan: Plan, folder: Path) -> dict[str, Any]:
    """Measures saving and restoring whole states with resjax and Orbax in turns."""
    found = {}
    for name in plan.cost:
        file, _, depth = name.split()
        images = {"cifar10": "synthetic_cifar", "imagenet": "synthetic_imagenet"}[file]
        fields = {"model.depth": int(depth), "data.name": images}
        config = resolve(override(load(ROOT / "configs" / f"{file}.py"), fields))
        state = jax.block_until_ready(Trainer(config).init(0))
        rounds = [one_round(folder / f"{file}{i}", state) for i in range(plan.rounds + 1)][1:]
        found[name] = {
            "megabytes": sum(leaf.nbytes for leaf in named_arrays(state).values()) / 1e6,
            "checkpoint_every": config.train.checkpoint_every,
            **{kind: [each[kind] for each in rounds] for kind in rounds[0]},
        }
    return {"cost": found}


def one_round(folder: Path, state: Any) -> dict[str, float]:
    """Returns the seconds of each operation."""
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        seconds[name] = time.monotonic() - began

    ours = CheckpointManager(folder / "ours", ERROR)
    record = {"metrics": "", "config": {}, "seconds": 0.0}
    with timed("resjax saves, training waits"):
        ours.save(state, 1, record)
    with timed("resjax saves, in the background"):
        ours.wait()
    with timed("resjax restores"):
        assert ours.restore_latest(lambda _: state)
    ours.close()
    manager = ocp.CheckpointManager(folder / "theirs")
    with timed("Orbax saves, training waits"):
        manager.save(1, args=ocp.args.StandardSave(named_arrays(state)))
    with timed("Orbax saves, in the background"):
        manager.wait_until_finished()
    with timed("Orbax restores"):
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, named_arrays(state))
        jax.block_until_ready(manager.restore(1, args=ocp.args.StandardRestore(target)))
    manager.close()
    shutil.rmtree(folder)
    return seconds


PARTS: dict[str, Callable[[Plan, Path], dict[str, Any]]] = {
    "kills": kills,
    "boundaries": boundaries,
    "damage": damage,
    "files": files,
    "processes": processes,
    "disk": disk,
    "cost": cost,
}


def measure(plan: Plan, path: Path, parts: Iterable[str] = PARTS) -> None:
    """Runs each of `parts` and rewrites `path` after each; other parts are preserved."""
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="resjax-chaos-") as folder:
            found = PARTS[part](plan, Path(folder))
        result[part] = {"provenance": provenance(), "plan": plan._asdict(), **found}
        write_atomically(path, json.dumps(result, indent=1) + "\n")
        print(part, json.dumps(found, indent=1), flush=True)


PREAMBLE = """\
# Chaos

Written by `python benchmarks/chaos.py report` from the files in `benchmarks/results/`; the script
documents the measurements. Two runs end the same if every array of their last checkpoints and every
byte of metrics.jsonl are equal; each run is compared with one that was not interrupted.
"""


def report(results: Path, docs: Path) -> None:
    """Writes chaos.md to `docs` from the files in `results`."""
    sections = [PREAMBLE]
    for path in sorted(results.glob("chaos-*.json")):
        file = json.loads(path.read_text())
        sections.append(f"## {machine(next(iter(file.values()))['provenance'])}\n")
        for part, shown in SHOWN.items():
            if part in file:
                origin = source(file[part]["provenance"])
                sections += [f"### {shown.__doc__}\n", f"{origin}\n", shown(file[part])]
    write_atomically(docs / "chaos.md", "\n".join(sections) + "\n")


def shown_kills(part: dict[str, Any]) -> str:
    """Killed at random moments"""
    moments = ", ".join(f"{count} {name}" for name, count in sorted(part["moments"].items()))
    return (
        f"{part['kills']} SIGKILLs ({moments}) in {part['runs']} runs, each of which takes "
        f"{part['seconds']:.0f} s without interruption. Runs that ended differently: "
        f"{part['different']}.\n"
    )


def shown_boundaries(part: dict[str, Any]) -> str:
    """Killed at every boundary of a save"""
    kinds = ", ".join(f"{count} before {kind}" for kind, count in sorted(part["kinds"].items()))
    live = part["live"]
    return (
        f"{part['kills']} SIGKILLs ({kinds}), spread evenly over the {part['per_save']} changes "
        "that Python makes in checkpoints/ during a save, with a whole save and the training before"
        f" it between two kills, in {part['runs']} runs. Checkpoints refused: {part['refused']}. "
        "Kills after which the newest checkpoint was older than before: "
        f"{part['lost']}. Runs that ended differently: {part['different']}. Verified "
        f"{live['times']} times in training, a run was found damaged {live['damaged']} times.\n"
    )


def shown_damage(part: dict[str, Any]) -> str:
    """Damaged checkpoints"""
    rows = [
        [kind, who, str(sum(counted.values())), *(str(counted.get(how, 0)) for how in OUTCOMES)]
        for kind, both in part["outcomes"].items()
        for who, counted in both.items()
    ]
    return table(("damage", "restored by", "times", *OUTCOMES), rows) + "\n"


def shown_files(part: dict[str, Any]) -> str:
    """Damaged files of a run folder"""
    rows = [
        [name, ", ".join(f"{how}: {count}" for how, count in sorted(counted.items()))]
        for name, counted in part["outcomes"].items()
    ]
    return (
        "Exit codes are 0 for success, 1 for damage found, and 2 for an error in one line. No "
        "command ended in a traceback, and none deleted a file.\n\n"
        + table(("file", "command, exit code: times"), rows)
        + "\n"
    )


def shown_processes(part: dict[str, Any]) -> str:
    """One of two processes stopped or killed"""
    lines = []
    for name, found in part["signals"].items():
        stopped = "; ".join(sorted(set(found["stopped"]))) or "nothing was saved afterwards"
        lines.append(
            f"- {name}: exit codes {found['codes']} after {found['seconds']:.1f} s; {stopped}; "
            f"after a relaunch the run ended {'differently' if found['different'] else 'the same'}."
        )
    return "\n".join(lines) + "\n"


def shown_disk(part: dict[str, Any]) -> str:
    """A full disk"""
    lines = []
    for name, found in part["disks"].items():
        lines.append(
            f"- Full {name}: {found['warnings']} warnings, the first: “{found['first']}”. "
            f"At the end: {found['error'] or 'no error'}. Steps of the checkpoints: "
            f"{found['checkpoints']}. After a relaunch with free space the run ended "
            f"{'differently' if found['different'] else 'the same'}."
        )
    return "\n".join(lines) + "\n"


def shown_cost(part: dict[str, Any]) -> str:
    """Cost of checkpoints"""
    names = [kind for kind in next(iter(part["cost"].values())) if kind.startswith(("r", "O"))]
    rows = []
    for network, found in part["cost"].items():
        blocked = median(found["resjax saves, training waits"])
        least = 1e3 * blocked / (0.02 * found["checkpoint_every"])
        rows.append(
            [
                network,
                f"{found['megabytes']:.1f}",
                *(spread(found[name], digits=2) for name in names),
                f"{least:.2f}",
            ]
        )
    heads = ("network", "MB", *(f"{name}, s" for name in names), "ms per step for 2 %")
    explanation = (
        "Median and range over rounds in which the two take turns. If a step is at least as long "
        "as in the last column, training waits for at most 2 % of the time at the default "
        "checkpoint interval."
    )
    return f"{table(heads, rows)}\n\n{explanation}\n"


SHOWN: dict[str, Callable[[dict[str, Any]], str]] = {
    "kills": shown_kills,
    "boundaries": shown_boundaries,
    "damage": shown_damage,
    "files": shown_files,
    "processes": shown_processes,
    "disk": shown_disk,
    "cost": shown_cost,
}


def main() -> None:
    parser, measuring = command_line(__doc__)
    measuring.add_argument("--only", choices=PARTS, help="the part to measure")
    measuring.add_argument("--out", type=Path, default=RESULTS / "chaos-cpu.json")
    arguments = parser.parse_args()
    if arguments.command == "report":
        report(RESULTS, DOCS)
    else:
        measure(Plan(), arguments.out, [arguments.only] if arguments.only else PARTS)


if __name__ == "__main__":
    main()
