"""Puts small faults into a copy of the code, one at a time, and tells which ones no test finds.

    python tests/mutants.py            # all of them (an hour on two cores)
    python tests/mutants.py NAME...    # those whose name contains one of these

A fault is an edit of one place, and the tests that must fail with it. A mistake that a test did not
notice belongs in this list. `tests/test_mutants.py` checks that every edit still applies.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Fault(NamedTuple):
    """An edit: `old`, which the file contains once, becomes `new`.

    Attributes:
      name: what is wrong.
      file: relative to the root.
      old, new: of the edit.
      tests: arguments of pytest, one of whose tests must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


WIRING = "tests/train/test_wiring.py"
INTERRUPTION = "tests/train/test_interruption.py"
NORM = "tests/models/test_normalization.py"
MEASURE = "tests/sweeps/test_measure.py"
DIAGNOSTICS = "tests/diagnostics/test_diagnostics.py"
STATISTICS = "tests/analysis/test_statistics.py"
CLAIMS = "tests/analysis/test_claims.py"
QUEUE = "tests/sweeps/test_queue.py"
LOCK_PROTOCOL = "tests/train/test_lock_protocol.py"
LESIONS = "tests/measurements/test_lesions.py"
SURFACE = "tests/measurements/test_loss_surface.py"
FAULTS = (
    Fault(
        "every step draws with the same key",
        "resjax/train/state.py",
        "return jax.random.fold_in(jax.random.split(key)[1], step)",
        "return jax.random.split(key)[1]",
        f"{WIRING} -k draws_of_its_own",
    ),
    Fault(
        "every step of a dispatch draws with the same key",
        "resjax/train/step.py",
        "    def body(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:\n"
        "        state, output = step(state, batch, step_key(state.key, state.step))",
        "    first = state.step\n\n"
        "    def body(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:\n"
        "        state, output = step(state, batch, step_key(state.key, first))",
        f"{WIRING} -k three_dispatches",
    ),
    Fault(
        "a checkpoint within a line forgets the steps of the line",
        "resjax/train/loop.py",
        '"parts": records.encode_metrics(jax.device_get(parts)),',
        '"parts": [],',
        f"{INTERRUPTION} -k stops_within",
    ),
    Fault(
        "an interrupted evaluation is not repeated",
        "resjax/train/loop.py",
        '"unevaluated": unevaluated,',
        '"unevaluated": [],',
        f"{INTERRUPTION} -k stops_within",
    ),
    Fault(
        "a state whose loss was not finite is saved within a line",
        "resjax/train/loop.py",
        "if int(saved.step) < step:",
        "if False:",
        f"{INTERRUPTION} -k not_finite_within",
    ),
    Fault(
        "the tap of activation gradients averages instead of summing",
        "resjax/diagnostics/taps.py",
        "jnp.sum(gradient.astype(jnp.float32) ** 2)",
        "jnp.mean(gradient.astype(jnp.float32) ** 2)",
        "tests/diagnostics/test_torch_twin.py -k slopes",
    ),
    Fault(
        "the deviation of a response is taken about zero",
        "resjax/diagnostics/forward.py",
        "variance = jnp.square(response - mean).mean()",
        "variance = jnp.square(response).mean()",
        "tests/diagnostics/test_torch_twin.py -k plain-scan",
    ),
    Fault(
        "a diagnostic may return what is no number",
        "resjax/diagnostics/__init__.py",
        "            if not _is_real(value):\n",
        "            if False:\n",
        f"{DIAGNOSTICS} -k returns_text",
    ),
    Fault(
        "a measurement destroys the state",
        "resjax/train/parallel.py",
        "return jax.jit(function, out_shardings=self._sharding())",
        "return jax.jit(function, out_shardings=self._sharding(), donate_argnums=0)",
        f"{DIAGNOSTICS} -k unrolled",
    ),
    Fault(
        "all images of a batch are augmented with one key",
        "resjax/train/step.py",
        "image_keys = jax.random.split(image_key, (parts, part_size))",
        "image_keys = jnp.broadcast_to(image_key, (parts, part_size))",
        f"{WIRING} -k draws_of_its_own",
    ),
    Fault(
        "training has no key for dropout",
        "resjax/train/step.py",
        '            rngs={"dropout": key},\n',
        "",
        f"{WIRING} -k draws_of_its_own",
    ),
    Fault(
        "under pmap all devices draw the same masks",
        "resjax/train/parallel.py",
        "return jax.random.wrap_key_data(jax.random.key_data(key), impl=self._sharded_draws)",
        "return key",
        "tests/train/test_parallel.py -k masks",
    ),
    Fault(
        "gradients are not clipped",
        "resjax/train/optimizer.py",
        "return optax.chain(*clip, scheduled)",
        "return optax.chain(scheduled)",
        f"{WIRING} -k clip_norm",
    ),
    Fault(
        "the factors of the learning rate are not passed on",
        "resjax/train/trainer.py",
        "tx = make_optimizer(self.config, self.phases[: number + 1], factors)",
        "tx = make_optimizer(self.config, self.phases[: number + 1], {})",
        f"{WIRING} -k layer_decay",
    ),
    Fault(
        "first_rate is not passed on",
        "resjax/train/freezing.py",
        "if transfer.first_rate is not None:",
        "if False:",
        f"{WIRING} -k first_rate",
    ),
    Fault(
        "under pmap running statistics are not averaged",
        "resjax/train/step.py",
        "params, moving, loss = backend.mean((gradients, moving, own.loss))",
        "params, loss = backend.mean((gradients, own.loss))",
        "tests/train/test_parallel.py -k twenty_steps",
    ),
    Fault(
        "digests of arrays are not compared",
        "resjax/train/checkpoint_reader.py",
        "if describe_array(arrays[name]) != saved[name]]",
        "if False]",
        "tests/train/test_checkpoints.py -k digest_alone",
    ),
    Fault(
        "a run of another weight decay is taken for the same",
        "resjax/train/identity.py",
        'MAY_CHANGE = (\n    "train.steps",\n',
        'MAY_CHANGE = (\n    "train.steps",\n    "optimizer.weight_decay",\n',
        f"{WIRING} -k continues",
    ),
    Fault(
        "the order of a stream ignores the seed",
        "resjax/train/sources.py",
        "EpochOrder(order_key(run_key(jax.random.key(seed))), self.examples",
        "EpochOrder(order_key(run_key(jax.random.key(0))), self.examples",
        f"{WIRING} -k order_of_the_images",
    ),
    Fault(
        "the crops of a stream ignore the seed",
        "resjax/train/sources.py",
        "            seed=seed,\n",
        "            seed=0,\n",
        "tests/train/test_sources.py -k order_of_a_stream",
    ),
    Fault(
        "boxes of CutMix have odd sides",
        "resjax/data/augmentation.py",
        "even = sides.astype(int) // 2 * 2",
        "even = sides.astype(int)",
        "tests/data/test_augmentation.py -k pasted",
    ),
    Fault(
        "strengths of TrivialAugment are rounded otherwise than torchvision's",
        "resjax/data/trivial_augment.py",
        "np.where(index < STRENGTHS // 2, from_low, from_high)",
        "from_low",
        "tests/data/test_trivial_augment.py -k translation",
    ),
    Fault(
        "hidden folders hold images",
        "resjax/data/image_files.py",
        'return name.startswith(".") or name.casefold() in SYSTEM_NAMES',
        "return name.casefold() in SYSTEM_NAMES",
        "tests/data/test_user_data.py -k hidden",
    ),
    Fault(
        "numbers in data.classes are always indices",
        "resjax/data/subsets.py",
        "if isinstance(each, str) or numbered:",
        "if isinstance(each, str):",
        "tests/data/test_user_data.py -k numbers",
    ),
    Fault(
        "random crops have a quarter of the area or more",
        "resjax/data/crops.py",
        "AREA = (0.08, 1.0)",
        "AREA = (0.25, 1.0)",
        "tests/data/test_crops.py",
    ),
    Fault(
        "random erasing draws near squares only",
        "resjax/data/augmentation.py",
        "ERASED_RATIO = (0.3, 3.3)",
        "ERASED_RATIO = (0.9, 1.1)",
        "tests/data/test_augmentation.py -k erased",
    ),
    Fault(
        "a new head ignores its key",
        "resjax/transfer/surgery.py",
        "jax.random.key(0) if key is None else key, shape",
        "jax.random.key(0), shape",
        "tests/transfer/test_surgery.py -k with_its_key",
    ),
    Fault(
        "runs of other data.per_class are averaged together",
        "resjax/analysis/runs.py",
        'REPEATS = ("data.subset_seed",)',
        'REPEATS = ("data.subset_seed", "data.per_class")',
        "tests/analysis/test_runs.py -k separates_groups",
    ),
    Fault(
        "three seeds that agree decide a claim",
        "resjax/analysis/claims.py",
        "low, high = found.outer",
        "low, high = found.bootstrap",
        f"{CLAIMS} -k scatter",
    ),
    Fault(
        "one diverged run decides a claim",
        "resjax/analysis/claims.py",
        "if treatment.all() and not control.any()",
        "if treatment.any() and not control.any()",
        f"{CLAIMS} -k all_its_runs_diverged",
    ),
    Fault(
        "the divergence of two seeds decides a claim",
        "resjax/analysis/claims.py",
        'if pairs["seed"].nunique() < FEWEST_SEEDS or not',
        "if not",
        f"{CLAIMS} -k three_seeds_only",
    ),
    Fault(
        "a trend over runs that are being trained was tested",
        "resjax/analysis/claims.py",
        '    ended = chosen[chosen["finished"] | chosen["diverged"]]\n',
        "    ended = chosen\n",
        f"{CLAIMS} -k has_not_ended",
    ),
    Fault(
        "no run is chosen by a field that it lacks",
        "resjax/analysis/statistics.py",
        "cells = runs[column].astype(object).where(runs[column].notna(), None)",
        "cells = runs[column].astype(object)",
        f"{STATISTICS} -k several_or_none",
    ),
    Fault(
        "runs on other draws of examples are paired",
        "resjax/analysis/statistics.py",
        'keys = ["seed", *repeats, *(name',
        'keys = ["seed", *(name',
        f"{STATISTICS} -k draw_of_the_examples",
    ),
    Fault(
        "a seed has a mean although one of its pairs has no value",
        "resjax/analysis/statistics.py",
        "groups.agg(lambda values: values.mean(skipna=False))",
        "groups.agg(lambda values: values.mean())",
        f"{STATISTICS} -k has_no_mean",
    ),
    Fault(
        "a slope counts diverged runs",
        "resjax/analysis/statistics.py",
        'chosen = chosen[chosen["finished"] & ~chosen["diverged"]]',
        'chosen = chosen[chosen["finished"]]',
        f"{STATISTICS} -k has_no_slope",
    ),
    Fault(
        "an interval counts diverged runs",
        "resjax/analysis/statistics.py",
        'averaged = group[group["finished"] & ~group["diverged"]]',
        'averaged = group[group["finished"]]',
        f"{STATISTICS} -k intervals_are",
    ),
    Fault(
        "paired differences of a field are averaged over sweeps",
        "resjax/analysis/statistics.py",
        'n == "sweep" or _is_field(n)',
        "_is_field(n)",
        "tests/analysis/test_report_sweeps.py -k compared_at_equal_seed",
    ),
    Fault(
        "a LaTeX table across two fields hides that settings have different numbers of seeds",
        "resjax/analysis/latex.py",
        'len(by) != 2 or results["seeds"].nunique() > 1 or',
        "len(by) != 2 or",
        "tests/analysis/test_latex.py -k fewer_seeds",
    ),
    Fault(
        "the evaluation of the training split stops at the length of the test split",
        "resjax/train/sources.py",
        "examples, devices = self.examples[split], self._backend.devices",
        'examples, devices = self.examples["test"], self._backend.devices',
        "tests/train/test_loop.py -k whole_training_split",
    ),
    Fault(
        "BN's variance cancels",
        "resjax/models/normalization.py",
        "    shifted = _single(x) - shift\n",
        "    shift = 0 * shift\n    shifted = _single(x) - shift\n",
        f"{NORM} -k ten_times",
    ),
    Fault(
        "devices subtract pixels of their own",
        "resjax/models/normalization.py",
        "(shift,) = _shared((_single(pixel),), devices)",
        "shift = _single(pixel)",
        f"{NORM} -k ten_times",
    ),
    Fault(
        "running variances are never unbiased",
        "resjax/models/resnet.py",
        "            unbiased=self.bn_unbiased,\n",
        "",
        "tests/train/test_torch_training.py -k plain",
    ),
    Fault(
        "a block's factor is that of its neighbor",
        "resjax/models/resnet.py",
        "x, _ = scanned(stacked, x, self.branches[1:])",
        "x, _ = scanned(stacked, x, self.branches[:-1])",
        "tests/models/test_resnet.py -k own_factor",
    ),
    Fault(
        "Fixup's weights start alike at every depth",
        "resjax/models/blocks.py",
        "variance = 2 * self.network_blocks ** (-1 / len(inner))",
        "variance = 2.0",
        "tests/models/test_blocks.py -k fixup",
    ),
    Fault(
        "Fixup's classifier starts at random",
        "resjax/models/resnet.py",
        'changed = {"kernel_init": nn.initializers.zeros} if self.norm == "fixup" else {}',
        "changed: dict[str, Any] = {}",
        "tests/models/test_resnet.py -k fixup",
    ),
    Fault(
        "ReLU-only pre-activation shares no activation with projections",
        "resjax/models/blocks.py",
        "return y + self.shortcut(out, self.strides)(active if changes else x)",
        "return y + self.shortcut(out, self.strides)(x)",
        "tests/models/test_blocks.py -k formula",
    ),
    Fault(
        "imported networks have Flax's running variance",
        "resjax/transfer/importing.py",
        'fields["bn_unbiased"] = True',
        'fields["bn_unbiased"] = False',
        "tests/transfer/test_importing.py -k are_recognized",
    ),
    Fault(
        "relu loses NaN",
        "resjax/models/activation.py",
        "active = jnp.where(x <= 0, 0, x)",
        "active = jnp.maximum(x, 0)",
        "tests/test_nonfinite.py -k evaluation",
    ),
    Fault(
        "an image with a logit of NaN belongs to class 0",
        "resjax/tasks/classification.py",
        "_any_nan(logits) | (logits.argmax(-1) != label)",
        "(logits.argmax(-1) != label)",
        "tests/test_nonfinite.py -k logit",
    ),
    Fault(
        "momentum is not Nesterov's",
        "resjax/train/optimizer.py",
        "momentum = optax.trace(config.momentum, config.nesterov)",
        "momentum = optax.trace(config.momentum)",
        f"{WIRING} -k nesterov",
    ),
    Fault(
        "label smoothing is lost",
        "resjax/tasks/classification.py",
        "optax.smooth_labels(label, self.label_smoothing)",
        "label",
        f"{WIRING} -k task.options",
    ),
    Fault(
        "a finished run is never measured by a later launch",
        "resjax/sweeps/settled.py",
        "(measure and needs_measuring(measure, folder))",
        "False",
        f"{MEASURE} -k gets_a_measure_later",
    ),
    Fault(
        "a launch trains runs that another process holds",
        "resjax/sweeps/queue.py",
        "self._watch.state(run.folder) != lock.HELD",
        "True",
        f"{QUEUE} -k leaves_a_held_run",
    ),
    Fault(
        "a failed run is tried once less than it should be",
        "resjax/sweeps/failures.py",
        "attempts <= self.limit",
        "attempts < self.limit",
        f"{QUEUE} -k failed_run_is_tried_again",
    ),
    Fault(
        "a diverged run is trained again",
        "resjax/sweeps/settled.py",
        "if reason := _diverged(content, folder):",
        "if reason := '':",
        f"{QUEUE} -k diverged_run_is_final",
    ),
    Fault(
        "a run is measured at every launch",
        "resjax/sweeps/measure.py",
        "    return found.code != measure.code and bool(checkpoint)\n",
        "    return bool(checkpoint)\n",
        f"{MEASURE} -k measured_once",
    ),
    Fault(
        "a lock is taken over without a check who holds it now",
        "resjax/train/lock.py",
        "elif token not in (tokens := [look.token for look in _chain(folder)]):",
        "elif not (tokens := [token]):",
        LOCK_PROTOCOL,
    ),
    Fault(
        "a release removes the lock of a successor",
        "resjax/train/lock.py",
        "    if own := _is_file_of(successor, token, file):\n",
        "    if own := True:\n",
        f"{LOCK_PROTOCOL} -k paused",
    ),
    Fault(
        "a lock whose release was interrupted is never free again",
        "resjax/train/lock.py",
        'look = look._replace(token=f"{look.token}.released")',
        "break",
        LOCK_PROTOCOL,
    ),
    Fault(
        "the kernel of another machine decides who is dead",
        "resjax/train/lock.py",
        '(holder.get("boot"), holder.get("host")) == (_boot_id(), socket.gethostname())',
        "True",
        LOCK_PROTOCOL,
    ),
    Fault(
        "a watch that did not look for long finds a holder dead",
        "resjax/train/lock.py",
        "min(now - before.time, HEARTBEAT_SECONDS)",
        "(now - before.time)",
        "tests/train/test_lock.py -k does_not_look",
    ),
    Fault(
        "a change of what measure calls is not noticed",
        "resjax/sweeps/measure.py",
        "            waiting += [node.id for node in",
        "            waiting += [] and [node.id for node in",
        f"{MEASURE} -k measure_changes",
    ),
    Fault(
        "a run that was trained again keeps its measurement",
        "resjax/sweeps/measure.py",
        '    if checkpoint not in ("", found.checkpoint):\n        return True\n',
        "",
        f"{MEASURE} -k whose_checkpoint",
    ),
    Fault(
        "a diverged run is measured",
        "resjax/sweeps/measure.py",
        "        if find_divergence(folder):\n            return False\n",
        "        find_divergence(folder)\n",
        f"{MEASURE} -k diverged",
    ),
    Fault(
        "an error in measure names no line",
        "resjax/sweeps/measure.py",
        "            raise UserError(error_in(measure.file, error)) from error",
        "            raise UserError(str(error)) from error",
        f"{MEASURE} -k one_line",
    ),
    Fault(
        "a measurement of an earlier step is in the table",
        "resjax/analysis/runs.py",
        "        if found.step == steps\n",
        "",
        "tests/analysis/test_runs.py -k that_measure_returned",
    ),
    Fault(
        "examples that fill a batch are evaluated",
        "resjax/train/sources.py",
        "            weight = (np.arange(batch_size) < len(own)).astype(np.float32)",
        "            weight = np.ones(batch_size, np.float32)",
        "tests/measurements/test_base.py -k was_in",
    ),
    Fault(
        "a deleted block of a plain network passes nothing on",
        "resjax/measurements/lesions.py",
        "        return Scaled((1 - keep) * pad(x, shortcut.features, shortcut.strides), keep)",
        "        return Scaled(0 * keep, keep)",
        f"{LESIONS} -k without_a_block",
    ),
    Fault(
        "blocks exchange places one off",
        "resjax/measurements/lesions.py",
        "        places = np.array(order) - 2\n",
        "        places = np.array(order) % len(order)\n",
        f"{LESIONS} -k first_place",
    ),
    Fault(
        "a direction has the norm of a whole layer",
        "resjax/measurements/loss_surface.py",
        "    inputs = tuple(range(int(stacked), weights.ndim - 1))",
        "    inputs = tuple(range(int(stacked), weights.ndim - (weights.ndim < 2)))",
        f"{SURFACE} -k filter",
    ),
    Fault(
        "a surface moves along one direction only",
        "resjax/measurements/loss_surface.py",
        "lambda w, *d: w + sum(x * each for x, each in zip(point, d, strict=True))",
        "lambda w, *d: w + point[0] * d[0]",
        f"{SURFACE} -k moved",
    ),
)


def survives(fault: Fault, tree: Path) -> str:
    """Returns how a fault survives its tests in a copy of the code; "" if they find it."""
    path = tree / fault.file
    whole = path.read_text("utf-8")
    path.write_text(whole.replace(fault.old, fault.new), "utf-8")
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *fault.tests.split()], cwd=tree, env=environment, capture_output=True
        )
    finally:
        path.write_text(whole, "utf-8")
    # Any other code is a mistake in this list, such as tests that do not exist.
    return {0: "no test fails", 1: ""}.get(done.returncode, done.stdout.decode()[-400:])


def copy_code(tree: Path) -> None:
    """Copies the files that git knows, and new ones that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)


def main(names: Sequence[str]) -> int:
    chosen = [fault for fault in FAULTS if any(name in fault.name for name in names or [""])]
    if not chosen:
        sys.exit(f"no fault has a name with {' or '.join(names)}")
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy_code(Path(folder))
        for fault in chosen:
            how = survives(fault, Path(folder))
            survivors += bool(how)
            print(f"{'SURVIVES: ' + how if how else 'found':14} {fault.name}", flush=True)
    print(f"{len(chosen)} faults, {survivors} survive")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
