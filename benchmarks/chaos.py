"""Chaos: is a run that is killed, cut off or damaged on disk the same run in the end?

    python benchmarks/chaos.py measure
    python benchmarks/chaos.py report

`measure` does to small runs what machines do to large ones, and writes what came of it to
benchmarks/results/ after each part; `report` makes docs/chaos.md of that. `make chaos` does both.
The parts are:

- kills: SIGKILL at random moments of a run in a process, until it ends; then every array and every
  byte of its metrics is compared with those of a run that nothing interrupted.
- damage: a bit flipped, a file cut short or removed, at random places of a checkpoint; what is
  restored then, by resjax and by Orbax alone.
- files: whatever hypothesis thinks of in the files that a run reads back, then every command on it.
- processes: of two that train together one gets SIGTERM, or SIGKILL.
- disk: a file system of a few megabytes that fills up while a run saves there (Linux, root).
- cost: seconds to save and to restore, beside those of Orbax alone.
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
from feeds import source
from throughput import DOCS, HERE, RESULTS, command_line, machine, provenance, table

from resjax import cli
from resjax.config import Config, default_config, load, override, resolve
from resjax.disk import write_atomically
from resjax.errors import UserError
from resjax.run_files import Metric
from resjax.train import checkpoints, loop
from resjax.train.checkpoint_reader import CheckpointReader, named_arrays, read_checkpoint
from resjax.train.checkpoints import CheckpointManager
from resjax.train.step import Program

ERROR = Metric("error", unit="fraction")
QUICKSTART = HERE.parent / "configs" / "quickstart.py"
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
# Trains for as long as it takes to start and to compile.
LONGER = {"train.eval_every": 30, "train.checkpoint_every": 60}


class Plan(NamedTuple):
    """How much is done."""

    kills: int = 100
    steps: int = 1500  # of a run that is killed
    flips: int = 200
    truncations: int = 50
    deletions: int = 50
    inputs: int = 100  # to each file
    seed: int = 0
    cost: tuple[str, ...] = ("cifar10 depth 110", "imagenet depth 50")
    rounds: int = 5  # of the cost


def small(**fields: Any) -> Config:
    changed = {name.replace("__", "."): value for name, value in fields.items()}
    return resolve(override(default_config(), SMALL | changed))


def command(folder: Path, **fields: Any) -> list[str]:
    """`resjax train` of the small config."""
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


def ends(folder: Path) -> tuple[dict[str, Any], bytes]:
    """What a finished run found: digests of all its arrays, and its metrics."""
    newest = CheckpointReader(folder / "checkpoints").steps()[-1]
    return read_checkpoint(folder / "checkpoints" / str(newest))[1]["arrays"], (
        folder / "metrics.jsonl"
    ).read_bytes()


def ended(process: subprocess.Popen[str]) -> str:
    """What a process that ends well told."""
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors)
    return errors


def kills(plan: Plan, folder: Path) -> dict[str, Any]:
    """Kills runs at random moments."""
    chance = random.Random(plan.seed)
    whole = folder / "whole"
    began = time.monotonic()
    longer = LONGER | {"train.steps": plan.steps}
    ended(start(whole, **longer))
    seconds = time.monotonic() - began
    moments: Counter[str] = Counter()
    runs = different = 0
    while sum(moments.values()) < plan.kills:
        run = folder / f"run{runs}"
        while True:
            process = start(run, **longer)
            with suppress(subprocess.TimeoutExpired):
                _, errors = process.communicate(timeout=chance.uniform(0, seconds))
                if process.returncode:
                    raise RuntimeError(errors)
                break
            moments[moment(run)] += 1
            process.kill()
            process.communicate()
        runs += 1
        different += ends(run) != ends(whole)
        shutil.rmtree(run)
    return {
        "kills": sum(moments.values()),
        "moments": dict(moments),
        "runs": runs,
        "different": different,
        "seconds": seconds,
    }


def moment(run: Path) -> str:
    """What a process was doing, as far as its folder shows."""
    if not (run / "lock").exists():
        return "starting, or it had just ended"
    if list(run.glob("checkpoints/*orbax-checkpoint-tmp*")):
        return "saving"
    files = [path.stat().st_mtime for path in run.glob("metrics.jsonl")]
    lock = (run / "lock").stat().st_ctime
    return "training" if files and files[0] >= lock else "compiling or restoring"


class Damage(NamedTuple):
    kind: str
    do: Callable[[Path, random.Random], None]
    times: str  # the plan's field


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = chance.randrange(8 * len(content))
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(content)


def truncate(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def delete(path: Path, chance: random.Random) -> None:
    path.unlink()


DAMAGES = (
    Damage("bit flipped", flip, "flips"),
    Damage("file truncated", truncate, "truncations"),
    Damage("file deleted", delete, "deletions"),
)


def damage(plan: Plan, folder: Path) -> dict[str, Any]:
    """Damages the newest of a run's checkpoints; a file is drawn first, then a place in it."""
    chance = random.Random(plan.seed)
    program = Program(small())
    like = program.saved(program.init(0))
    loop.train(small(train__steps=40), folder / "run")
    stored = CheckpointReader(folder / "run" / "checkpoints")
    steps = stored.steps()
    truth = {step: bits(stored.restore_step(step, like).state) for step in steps}
    results: dict[str, dict[str, dict[str, int]]] = {}
    for kind, do, times in DAMAGES:
        ours: Counter[str] = Counter()
        theirs: Counter[str] = Counter()
        for _ in range(getattr(plan, times)):
            copy = folder / "copy"
            shutil.copytree(stored.folder, copy / "checkpoints")
            newest = copy / "checkpoints" / str(steps[-1])
            files = sorted(path for path in newest.rglob("*") if path.is_file())
            do(chance.choice([path for path in files if path.stat().st_size]), chance)
            theirs[by_orbax(newest, like, truth[steps[-1]])] += 1
            ours[by_resjax(copy / "checkpoints", like, truth)] += 1
            shutil.rmtree(copy)
        results[kind] = {"resjax": dict(ours), "Orbax": dict(theirs)}
    return {"outcomes": results}


def bits(state: Any) -> list[bytes]:
    return [np.asarray(array).tobytes() for array in named_arrays(state).values()]


def by_resjax(folder: Path, like: Any, truth: dict[int, list[bytes]]) -> str:
    told: list[str] = []
    opened = CheckpointManager(folder, ERROR, told.append)
    restored = opened.restore_latest(like)
    opened.close()
    if restored is None or bits(restored.state) != truth[restored.step]:
        return "restored wrongly"
    if told:
        return "told, and the one before restored"
    return "restored, every array as it was"


def by_orbax(folder: Path, like: Any, truth: list[bytes]) -> str:
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, named_arrays(like(0)))
    arguments = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            arrays = checkpointer.restore(folder, args=arguments)["state"]
    except Exception:
        return "raised"
    found = [np.asarray(arrays[name]).tobytes() for name in target]
    same = found == truth
    return "restored, every array as it was" if same else "restored wrongly"


FILES = ("config.json", "metrics.jsonl", "summary.json", "provenance.json", "record", "sweep.json")


def files(plan: Plan, folder: Path) -> dict[str, Any]:
    """Puts what hypothesis thinks of into each file, and runs every command that reads it."""
    from hypothesis import HealthCheck, given, settings

    sweep = folder / "sweep"
    run = sweep / "runs" / "one"
    settled = small(train__steps=20)
    loop.train(settled, run)
    (sweep / "sweep.json").write_text(json.dumps({"runs": [{"folder": "runs/one"}]}))
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in FILES}

    def trial(name: str) -> Callable[[bytes], None]:
        def tried(content: bytes) -> None:
            copy = folder / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(sweep, copy)
            place(copy, name).write_bytes(content)
            if name != "summary.json":  # the run goes on
                place(copy, "summary.json").unlink()
            before = {each.name for each in copy.rglob("*.json*")}
            for typed in commands(copy):
                outcomes[name][answer(typed)] += 1
            if gone := before - {each.name for each in copy.rglob("*.json*")}:
                raise AssertionError(f"{', '.join(gone)} gone")

        return tried

    asked = settings(
        max_examples=plan.inputs,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    for name in FILES:
        asked(given(bad(place(sweep, name).read_bytes()))(trial(name)))()
    return {"outcomes": {name: dict(counted) for name, counted in outcomes.items()}}


def bad(original: bytes) -> Any:
    """Strategy: a file's content damaged, emptied, or another JSON value."""
    from hypothesis import strategies as st

    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    values = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner)
    )
    cut = st.integers(0, len(original)).map(lambda end: original[:end])
    spliced = st.tuples(st.integers(0, len(original) - 1), st.binary(min_size=1, max_size=4)).map(
        lambda at: original[: at[0]] + at[1] + original[at[0] + len(at[1]) :]
    )
    json_text = values.map(lambda value: json.dumps(value).encode())

    def changed(pair: tuple[int, Any]) -> bytes:
        """One value of the object is another."""
        with suppress(ValueError):
            content = json.loads(original.splitlines()[0] if b"}\n{" in original else original)
            name = sorted(content)[pair[0] % len(content)]
            return json.dumps({**content, name: pair[1]}).encode() + b"\n"
        return original[:-1]

    swapped = st.tuples(st.integers(0, 99), values).map(changed)
    return cut | spliced | st.binary(max_size=20) | json_text | swapped


def place(sweep: Path, name: str) -> Path:
    run = sweep / "runs" / "one"
    if name == "record":
        return run / "checkpoints" / "20" / "record" / "metadata"
    return sweep / name if name == "sweep.json" else run / name


def commands(sweep: Path) -> Iterator[list[str]]:
    """All that read a run folder."""
    run = sweep / "runs" / "one"
    yield ["verify", str(sweep)]
    yield ["evaluate", f"--workdir={run}", "--checkpoint=best"]
    yield ["report", str(sweep)]
    fields = [f"--config.{name}={value}" for name, value in (SMALL | {"train.steps": 20}).items()]
    yield ["train", f"--config={QUICKSTART}", f"--workdir={run}", *fields]


def answer(typed: list[str]) -> str:
    """How a command ended, without a traceback; whatever it raises is a fault of ours."""
    errors = StringIO()
    with redirect_stdout(StringIO()), redirect_stderr(errors):
        code = cli.main(typed)
    if code == 2 and errors.getvalue().count("resjax: error") != 1:
        raise AssertionError(f"{typed}: {errors.getvalue()}")
    return f"{typed[0]} {code}"


def processes(plan: Plan, folder: Path) -> dict[str, Any]:
    """Stops, then kills, one of two processes that train together."""
    steps = {"train.steps": 60}  # collectives over a socket take their time
    for process in together(folder / "whole", **steps):
        ended(process)
    found = {}
    for by in (signal.SIGTERM, signal.SIGKILL):
        run = folder / by.name
        pair = together(run, **steps)
        wait_for(lambda run=run: CheckpointReader(run / "checkpoints").steps(), pair)
        pair[1].send_signal(by)
        began = time.monotonic()
        told = [process.communicate()[1] for process in pair]
        seconds = time.monotonic() - began
        codes = [process.returncode for process in pair]
        stopped = [line for text in told for line in text.splitlines() if "stopped by" in line]
        for process in together(run, **steps):
            ended(process)
        found[by.name] = {
            "codes": codes,
            "seconds": seconds,
            "stopped": stopped,
            "different": ends(run) != ends(folder / "whole"),
        }
    return {"signals": found}


def together(folder: Path, **fields: Any) -> list[subprocess.Popen[str]]:
    """Two processes that train one run."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    cluster = [f"--coordinator=127.0.0.1:{port}", "--processes=2"]
    return [start(folder, *cluster, f"--process={index}", **fields) for index in range(2)]


def wait_for(what: Callable[[], Any], pair: Iterable[subprocess.Popen[str]]) -> None:
    while not what():
        if gone := [process for process in pair if process.poll() is not None]:
            raise RuntimeError(gone[0].communicate()[1])
        time.sleep(0.05)


def disk(plan: Plan, folder: Path) -> dict[str, Any]:
    """Fills a file system while a run saves there: until it has room again, then to the end."""
    whole = folder / "whole"
    loop.train(small(), whole)
    found = {}
    with ExitStack() as stack:
        stack.enter_context(replaced(checkpoints, "RETRY_SECONDS", 0.0))
        small_disk = stack.enter_context(mounted(folder / "disk", megabytes=4))
        for name, frees_at in (("for a while", 80), ("to the end", None)):
            run, told = small_disk / "run", list[str]()
            ballast = small_disk / "ballast"

            def fill(progress: Any, ballast: Path = ballast, frees_at: Any = frees_at) -> None:
                if 40 <= progress.step < (frees_at or progress.steps + 1):
                    write_until_full(ballast)  # again: a save that failed gives its room back
                elif progress.step == frees_at:
                    ballast.unlink(missing_ok=True)

            error = ""
            try:
                loop.train(small(), run, fill, warn=told.append)
            except UserError as refused:
                error = str(refused)
            steps = CheckpointReader(run / "checkpoints").steps()
            ballast.unlink(missing_ok=True)
            loop.train(small(), run)
            found[name] = {
                "warnings": len(told),
                "first": told[0] if told else "",
                "error": error.replace(str(small_disk), "DISK"),
                "checkpoints": steps,
                "different": ends(run) != ends(whole),
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
    """A file system in memory.

    Raises:
      PermissionError: this process may not mount one.
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
    """Saves and restores whole states, ours and Orbax's in turn."""
    found = {}
    for name in plan.cost:
        file, _, depth = name.split()
        images = {"cifar10": "synthetic_cifar", "imagenet": "synthetic_imagenet"}[file]
        fields = {"model.depth": int(depth), "data.name": images}
        config = resolve(override(load(HERE.parent / "configs" / f"{file}.py"), fields))
        program = Program(config)
        state = program.init(0)
        jax.block_until_ready(state)
        rounds = [one_round(folder / f"{file}{i}", state) for i in range(plan.rounds + 1)][1:]
        found[name] = {
            "megabytes": sum(leaf.nbytes for leaf in named_arrays(state).values()) / 1e6,
            "checkpoint_every": config.train.checkpoint_every,
            **{kind: [each[kind] for each in rounds] for kind in rounds[0]},
        }
    return {"cost": found}


def one_round(folder: Path, state: Any) -> dict[str, float]:
    """Seconds of each."""
    took: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        took[name] = time.monotonic() - began

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
    return took


PARTS: dict[str, Callable[[Plan, Path], dict[str, Any]]] = {
    "kills": kills,
    "damage": damage,
    "files": files,
    "processes": processes,
    "disk": disk,
    "cost": cost,
}


def measure(plan: Plan, path: Path, parts: Iterable[str] = PARTS) -> None:
    """Does one part after the other, and writes `path` anew after each; others are kept."""
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="resjax-chaos-") as folder:
            found = PARTS[part](plan, Path(folder))
        result[part] = {"provenance": provenance(), "plan": plan._asdict(), **found}
        write_atomically(path, json.dumps(result, indent=1) + "\n")
        print(part, json.dumps(found, indent=1), flush=True)


PREAMBLE = """\
# Chaos

Made by `python benchmarks/chaos.py report` from the files of `benchmarks/results/`; the script
says what is done and how. A run ends as if nothing had happened when every array of its last
checkpoint and every byte of its metrics.jsonl are those of a run that nothing interrupted.
"""


def report(results: Path, docs: Path) -> None:
    """Writes chaos.md to `docs`, from the files in `results`."""
    sections = [PREAMBLE]
    for path in sorted(results.glob("chaos-*.json")):
        file = json.loads(path.read_text())
        sections.append(f"## {machine(next(iter(file.values()))['provenance'])}\n")
        for part, shown in SHOWN.items():
            if part in file:
                sections += [f"### {shown.__doc__}\n", source(file[part]) + "\n", shown(file[part])]
    write_atomically(docs / "chaos.md", "\n".join(sections) + "\n")


def shown_kills(part: dict[str, Any]) -> str:
    """Killed at random moments"""
    moments = ", ".join(f"{count} {name}" for name, count in sorted(part["moments"].items()))
    return (
        f"{part['kills']} SIGKILLs ({moments}) in {part['runs']} runs, each of which takes "
        f"{part['seconds']:.0f} s if nothing interrupts it. Runs that ended differently: "
        f"{part['different']}.\n"
    )


def shown_damage(part: dict[str, Any]) -> str:
    """Damaged checkpoints"""
    rows = [
        [kind, who, str(sum(counted.values())), *(str(counted.get(how, 0)) for how in OUTCOMES)]
        for kind, both in part["outcomes"].items()
        for who, counted in both.items()
    ]
    return table(("damage", "restored by", "times", *OUTCOMES), rows) + "\n"


OUTCOMES = (
    "restored wrongly",
    "restored, every array as it was",
    "told, and the one before restored",
    "raised",
)


def shown_files(part: dict[str, Any]) -> str:
    """Bad files"""
    rows = [
        [name, ", ".join(f"{how}: {count}" for how, count in sorted(counted.items()))]
        for name, counted in part["outcomes"].items()
    ]
    return (
        "Commands and their exit codes: 0 done, 1 damage found, 2 refused in one line. None ended "
        "in a traceback, and none deleted a file.\n\n" + table(("file", "answers"), rows) + "\n"
    )


def shown_processes(part: dict[str, Any]) -> str:
    """One of two processes stopped, or killed"""
    lines = []
    for name, found in part["signals"].items():
        stopped = "; ".join(sorted(set(found["stopped"]))) or "nothing more was saved"
        lines.append(
            f"- {name}: exit codes {found['codes']} after {found['seconds']:.1f} s; {stopped}; "
            f"launched again, ended {'differently' if found['different'] else 'the same'}."
        )
    return "\n".join(lines) + "\n"


def shown_disk(part: dict[str, Any]) -> str:
    """A full disk"""
    lines = []
    for name, found in part["disks"].items():
        lines.append(
            f"- Full {name}: {found['warnings']} warnings, the first: “{found['first']}”. "
            f"At the end: {found['error'] or 'nothing was missing'}. "
            f"Checkpoints there: {found['checkpoints']}. With room, launched again: ended "
            f"{'differently' if found['different'] else 'the same'}."
        )
    return "\n".join(lines) + "\n"


def shown_cost(part: dict[str, Any]) -> str:
    """What it costs"""
    names = [kind for kind in next(iter(part["cost"].values())) if kind.startswith(("r", "O"))]
    rows = []
    for network, found in part["cost"].items():
        blocked = median(found["resjax saves, training waits"])
        least = 1e3 * blocked / (0.02 * found["checkpoint_every"])
        rows.append(
            [
                network,
                f"{found['megabytes']:.1f}",
                *(seconds(found[name]) for name in names),
                f"{least:.2f}",
            ]
        )
    heads = ("network", "MB", *(f"{name}, s" for name in names), "ms a step for 2 %")
    return (
        table(heads, rows)
        + "\n\nMedian and range of the rounds, in which the two take turns. Last: "
        "with a step of that length or longer, what training waits for saves at the default "
        "cadence is at most 2 % of the time.\n"
    )


def seconds(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


SHOWN: dict[str, Callable[[dict[str, Any]], str]] = {
    "kills": shown_kills,
    "damage": shown_damage,
    "files": shown_files,
    "processes": shown_processes,
    "disk": shown_disk,
    "cost": shown_cost,
}


def main() -> None:
    parser, measuring = command_line(__doc__)
    measuring.add_argument("--only", choices=PARTS, help="one part; others are kept")
    measuring.add_argument("--out", type=Path, default=RESULTS / "chaos-cpu.json")
    asked = parser.parse_args()
    if asked.command == "report":
        report(RESULTS, DOCS)
    else:
        measure(Plan(), asked.out, [asked.only] if asked.only else PARTS)


if __name__ == "__main__":
    main()
