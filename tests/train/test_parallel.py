"""A run is the same however it is spread over devices and processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from resjax.config import default_config, override, resolve
from resjax.data.ordering import batch_indices
from resjax.models.layout import path_name
from resjax.train import parallel
from resjax.train.loop import evaluate
from resjax.train.state import order_key
from resjax.train.trainer import Trainer
from resjax.xla.compile_options import quick_compile

RUN = {
    "model.depth": 8,
    "model.width": 8,
    "data.batch_size": 32,
    "data.eval_batch_size": 100,  # 4 batches of 90, which do not divide among eight devices
    "data.crop_padding": 1,
    "data.flip": True,
    "data.random_erasing": 0.5,
    "data.mixup": 1.0,
    "data.cutmix": 1.0,
    "model.stochastic_depth": 0.5,
    "optimizer.learning_rate": 0.01,  # so small that rounding does not grow
    "optimizer.ema_decay": 0.9,
    "train.log_every": 2,
    "train.eval_every": 10,
    "train.checkpoint_every": 10,
    "train.steps": 20,
}
UNMIXED = {"data.mixup": 0.0, "data.cutmix": 0.0}
FEW_DRAWS = {"data.random_erasing": 0.0, **UNMIXED}
"""Crops and flips alone; more augmentation takes as long to compile as the network."""
PARTS = {"train.accumulation_steps": 2}
FROZEN = {"transfer.freeze": "stem,stage1", **PARTS, **FEW_DRAWS}
ONE = {"one device": {}, "one device, frozen and accumulated": FROZEN}
JIT = {
    "jit": {},
    "jit, 8 shards": {"parallel.shard_parameters": 8},
    "jit, bn alone": {"parallel.bn_devices": 1, **FEW_DRAWS},
    "jit, 2 shards, bn in pairs": {
        **{"parallel.shard_parameters": 2, "parallel.bn_devices": 2},
        **FEW_DRAWS,
    },
    "jit, 2 shards, frozen and accumulated": {"parallel.shard_parameters": 2, **FROZEN},
}
USE_PMAP = {"parallel.backend": "pmap"}
PMAP = {
    "pmap": USE_PMAP,
    "pmap, bn alone": {**USE_PMAP, "parallel.bn_devices": 1, **FEW_DRAWS},
    "pmap, bn in pairs": {**USE_PMAP, "parallel.bn_devices": 2, **FEW_DRAWS},
    "pmap, frozen and accumulated": {**USE_PMAP, **FROZEN},
}
PLAIN = {"data.crop_padding": 0, "data.flip": False, **FEW_DRAWS}
STREAM = {"data.feed": "stream", "data.workers": 0, **PARTS, **PLAIN}
STREAMS = {
    "one": {"stream": STREAM},
    "jit": {"stream, jit": STREAM},
    "pmap": {"stream, pmap": {**STREAM, **USE_PMAP}},
}
OWN_BLOCK = {
    "model.depth": 20,
    "model.width": 4,
    "model.block": "own_blocks:Gated",
    "model.stochastic_depth": 0.0,
    "diagnostics.names": "all",
    **PLAIN,
}
"""A network of a user's blocks, three in each stage, in which nothing is random."""
SCAN, UNROLL = OWN_BLOCK | {"model.loop": "scan"}, OWN_BLOCK | {"model.loop": "unroll"}
FORWARD = (
    "response_mean",
    "response_std",
    "branch_share",
    "input_output_cosine",
    "dead_relu_share",
    "running_mean",
    "running_var",
)
DIAGNOSTICS = {
    "one": {
        "unrolled": UNROLL,
        "scanned": SCAN,
        "remat": SCAN | {"model.remat": True},
        "accumulated": SCAN | PARTS,
    },
    "jit": {"jit, 8 shards": SCAN | {"parallel.shard_parameters": 8}},
    "pmap": {"pmap": SCAN | USE_PMAP, "pmap, accumulated": SCAN | PARTS | USE_PMAP},
}
EVERY_WAY = (*ONE, *JIT, *PMAP)
REFUSED = {
    "batch": {"data.batch_size": 36, **UNMIXED},
    "batch of too few": {"data.batch_size": 4, **UNMIXED},
    "accumulated batch": {"data.batch_size": 40, "train.accumulation_steps": 3, **UNMIXED},
    "pairs": {"data.batch_size": 40},
    "shards": {"parallel.shard_parameters": 3},
    "bn": {"parallel.bn_devices": 3},
    "bn under pmap": {"parallel.backend": "pmap", "parallel.bn_devices": 16},
    "shards under pmap": {"parallel.backend": "pmap", "parallel.shard_parameters": 2},
}


def send(process, line):
    process.stdin.write(line + "\n")
    process.stdin.flush()


def receive(process):
    line = process.stdout.readline()
    assert line, "virtual_devices.py failed; its traceback is on the standard error"
    return json.loads(line)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The answers of virtual_devices.py: on one device, on eight under jit, on eight under pmap."""
    folders = tmp_path_factory.mktemp("saved")
    program = [sys.executable, str(Path(__file__).with_name("virtual_devices.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    requests = {
        "one": {"devices": 1, "ways": ONE, "saves": "one device"},
        "jit": {"devices": 8, "ways": JIT, "saves": "jit, 8 shards", "refused": REFUSED},
        "pmap": {"devices": 8, "ways": PMAP, "saves": "pmap"},
    }
    for name, streams in STREAMS.items():
        over_devices = [name] if name in ("jit", "pmap") else []
        requests[name] |= {
            "diagnostics": DIAGNOSTICS[name],
            "draws": {name: PLAIN | (USE_PMAP if name == "pmap" else {})},
            "streams": streams,
            "epochs": over_devices,
            "norms": over_devices,
        }
    processes = {name: subprocess.Popen(program, **pipes) for name in requests}
    try:
        for name, process in processes.items():
            send(process, json.dumps(requests[name] | {"run": RUN, "folder": str(folders / name)}))
        answers = {"resumed": {}}
        for process in processes.values():
            found = receive(process)
            answers |= {what: found[what] for what in found if found[what]}
        for name, saved_by in [("one", "pmap"), ("jit", "pmap"), ("pmap", "one")]:
            send(processes[name], str(folders / saved_by))
            answers["resumed"][f"{name} from {saved_by}"] = receive(processes[name])
        return answers
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


same = partial(pytest.approx, rel=1e-4)


@pytest.mark.parametrize(
    ("way", "reference"),
    [
        ("jit", "one device"),
        ("jit, 8 shards", "one device"),
        ("pmap", "one device"),
        ("pmap, bn alone", "jit, bn alone"),
        ("jit, 2 shards, bn in pairs", "pmap, bn in pairs"),
        ("jit, 2 shards, frozen and accumulated", "one device, frozen and accumulated"),
        ("pmap, frozen and accumulated", "one device, frozen and accumulated"),
    ],
)
def test_twenty_steps_have_the_same_losses(measured, way, reference):
    assert len(measured[way]["losses"]) == 10
    assert measured[way]["losses"] == same(measured[reference]["losses"])
    for found, expected in zip(
        measured[way]["statistics"], measured[reference]["statistics"], strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", ["stream, jit", "stream, pmap"])
def test_a_stream_yields_the_same_batches_on_any_devices(measured, way):
    assert measured[way]["losses"] == same(measured["stream"]["losses"])
    assert measured[way]["test"] == same(measured["stream"]["test"])


@pytest.fixture(scope="module")
def diagnosed():
    """Diagnostics of the first step by number of parts, computed in another way.

    Gradients are those of jax.grad. Activation gradients are those of a zero that is added to the
    output of each block of the unrolled network. The rest is computed by NumPy from the outputs of
    all modules.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        config = resolve(override(default_config(), RUN | UNROLL))
        trainer = Trainer(config)
    state = trainer.init(0)
    arrays = jax.device_get(trainer.source.example_arrays()[0])
    size, examples = config.data.batch_size, trainer.source.examples["train"]
    indices = np.asarray(batch_indices(order_key(state.key), jnp.int32(0), 1, size, examples))
    images = np.float32(arrays["image"][indices[0]] / 255 - trainer.statistics.mean)
    labels = arrays["label"][indices[0]]

    def logits(params, images, zeros, shapes):
        def add_zero(call, arguments, keywords, context):
            output, path = call(*arguments, **keywords), "/".join(context.module.path)
            if not re.fullmatch(r"stage\d/block\d", path) or context.method_name != "__call__":
                return output
            shapes[path] = output.shape
            return output + zeros.get(path, 0)

        variables = {"params": params, "batch_stats": state.batch_stats}
        with nn.intercept_methods(add_zero):
            return trainer.model.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    @partial(jax.jit, compiler_options=quick_compile())
    def outputs(batch_stats, images):
        """Returns the first argument and the output of every module, and the new statistics."""
        seen = {}

        def keep(call, arguments, keywords, context):
            output = call(*arguments, **keywords)
            if context.method_name == "__call__" and context.module.path:
                seen["/".join(context.module.path)] = arguments[0], output
            return output

        variables = {"params": state.params, "batch_stats": batch_stats}
        with nn.intercept_methods(keep):
            _, updated = trainer.model.apply(variables, images, train=True, mutable=["batch_stats"])
        return seen, updated["batch_stats"]

    def forward(batches):
        statistics, parts = state.batch_stats, []
        for batch in batches:
            seen, statistics = outputs(statistics, batch)
            parts.append(jax.device_get(seen))
        whole = jax.tree.map(lambda *each: np.concatenate(each).astype(np.float64), *parts)
        blocks = {
            path: pair
            for path, pair in whole.items()
            if path.count("/block") == path.count("/") == 1
        }
        found = {name: {} for name in FORWARD}
        for path, (_, output) in whole.items():
            if "BatchNorm" in path or path == "head":
                found["response_mean"][path] = output.mean()
                found["response_std"][path] = output.std()
        for path, (x, output) in blocks.items():
            branch, (_, carried) = 0.5 * whole[f"{path}/BatchNorm_1"][1], whole[f"{path}/shortcut"]
            norms = np.linalg.norm(branch), np.linalg.norm(carried)
            found["branch_share"][path] = norms[0] / sum(norms)
            stride = x.shape[1] // output.shape[1]
            x = x[:, ::stride, ::stride]
            pairs = zip(x, output[..., : x.shape[-1]], output, strict=True)
            cosines = [
                (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(whole) for a, b, whole in pairs
            ]
            found["input_output_cosine"][path] = np.mean(cosines)
        for path, layer in [("stem", "BatchNorm_0"), *((path, "BatchNorm_0") for path in blocks)]:
            active = (whole[f"{path}/{layer}"][1] > 0).any((0, 1, 2))
            found["dead_relu_share"][f"{path}/relu_0"] = 1 - active.mean()
        for path, (_, output) in blocks.items():
            found["dead_relu_share"][f"{path}/relu_1"] = 1 - (output > 0).any((0, 1, 2)).mean()
        for path, leaf in jax.tree.leaves_with_path(jax.device_get(statistics)):
            layer, _, name = path_name(path).rpartition("/")
            value = np.sqrt((leaf**2).mean()) if name == "mean" else leaf.mean()
            found[f"running_{name}"][layer] = value
        return found

    def norms(parts):
        batches = images.reshape(parts, -1, *images.shape[1:]), labels.reshape(parts, -1)
        shapes = {}
        jax.eval_shape(lambda batch: logits(state.params, batch, {}, shapes), batches[0][0])

        def loss(params, zeros):
            losses = [
                optax.softmax_cross_entropy_with_integer_labels(
                    logits(params, batch, part_zeros, {}), targets
                ).mean()
                for batch, targets, part_zeros in zip(*batches, zeros, strict=True)
            ]
            return sum(losses) / parts

        zeros = [{path: jnp.zeros(shape) for path, shape in shapes.items()}] * parts
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=quick_compile())
        params, activations = jax.device_get(gradient(state.params, zeros))
        return {
            **forward(batches[0]),
            "parameter_norm": {
                path_name(path): np.linalg.norm(leaf)
                for path, leaf in jax.tree.leaves_with_path(jax.device_get(state.params))
            },
            "gradient_norm": {
                path_name(path): np.linalg.norm(leaf)
                for path, leaf in jax.tree.leaves_with_path(params)
            },
            "activation_gradient_norm": {
                path: np.sqrt(sum(np.square(part[path]).sum() for part in activations))
                for path in shapes
            },
        }

    return {parts: norms(parts) for parts in (1, 2)}


DIAGNOSED = [way for ways in DIAGNOSTICS.values() for way in ways]


@pytest.mark.parametrize("way", DIAGNOSED)
def test_diagnostics_are_those_of_an_independent_computation(measured, diagnosed, way):
    expected = diagnosed[2 if "accumulated" in way else 1]
    found = measured[f"diagnostics, {way}"]
    assert found.keys() == {*expected, "update_ratio"}
    assert len(found["activation_gradient_norm"]) == 9
    assert "stage2/block3/gate" in found["gradient_norm"]
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("way", DIAGNOSED)
def test_update_ratios_are_the_same_on_any_devices(measured, way):
    reference = "accumulated" if "accumulated" in way else "unrolled"
    expected = measured[f"diagnostics, {reference}"]["update_ratio"]
    assert measured[f"diagnostics, {way}"]["update_ratio"] == same(expected)


@pytest.mark.parametrize("way", ["jit", "pmap"])
def test_the_masks_of_an_image_depend_on_its_place_in_the_batch_and_not_on_the_device(
    measured, way
):
    draws = measured[f"draws, {way}"]
    np.testing.assert_allclose(draws, measured["draws, one"], rtol=1e-6)  # a mean over devices
    assert len({own for own, _ in draws}) == 32  # of two steps
    assert len({shared for _, shared in draws}) == 2


def is_exactly_once(epoch):
    return sorted(epoch["gathered"][:75]) == list(range(75))


@pytest.mark.parametrize("way", ["jit", "pmap"])
def test_an_epoch_has_every_example_exactly_once(measured, way):
    assert is_exactly_once(measured[f"epoch of {way}"])


@pytest.mark.parametrize("way", ["jit", "pmap"])
def test_each_device_holds_only_its_part_of_resident_data(measured, way):
    assert measured[f"epoch of {way}"]["held"] == 10  # of 75


def test_in_two_processes_an_epoch_has_every_example_exactly_once(measured, coordinator):
    program = [sys.executable, str(Path(__file__).with_name("virtual_devices.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(program, **pipes) for _ in range(2)]
    for number, process in enumerate(processes):
        request = {"devices": 4, "cluster": [coordinator, 2, number], "epochs": ["jit", "pmap"]}
        send(process, json.dumps(request))
    answers = [process.communicate(timeout=100)[0].splitlines()[-1] for process in processes]
    for found in map(json.loads, answers):  # lines of Gloo come before
        for way in ("jit", "pmap"):
            assert is_exactly_once(found[f"epoch of {way}"])
            assert found[f"epoch of {way}"] == measured[f"epoch of {way}"]


@pytest.mark.parametrize("way", ["jit", "pmap"])
def test_bn_over_devices_is_exact_far_from_zero(measured, way):
    assert measured[f"error of BN under {way}"] < 2e-6  # PyTorch's on one device is 7e-4


@pytest.mark.parametrize("way", ["jit", "pmap"])
def test_a_hessian_product_passes_through_statistics_over_devices(measured, way):
    assert measured[f"error of a Hessian product under {way}"] < 1e-5


def test_bn_over_fewer_images_has_other_losses(measured):
    pairs, alone = (measured[f"pmap, bn {way}"]["losses"][0] for way in ("in pairs", "alone"))
    assert abs(pairs / alone - 1) > 0.001


@pytest.mark.parametrize("name", ["jit", "pmap"])
def test_on_one_device_bn_is_over_the_batch_for_every_choice_of_bn_devices(configure, name):
    whole, alone = (
        parallel.make_backend(configure({"parallel.backend": name, "parallel.bn_devices": devices}))
        for devices in (0, 1)
    )
    assert whole.norm_options() in ({}, {"groups": 1})
    assert alone.norm_options() == whole.norm_options()


def test_evaluation_counts_every_example_once_for_batches_that_do_not_divide(measured):
    one = measured["one device"]["test"]
    for way in ("jit, 8 shards", "pmap"):
        assert measured[way]["test"] == pytest.approx(one, rel=1e-5)
    assert all(abs(360 * one[name] % 1 - 0.5) > 0.499 for name in ("error", "ema_error"))


@pytest.mark.parametrize(
    ("way", "shards"), [("jit, 2 shards, bn in pairs", 2), ("jit, 8 shards", 8)]
)
def test_parameters_and_optimizer_state_are_sharded(measured, way, shards):
    placed = measured[way]["placed"]
    for shape, parts in placed:
        assert len(parts) == 8
        divisible = any(side % shards == 0 for side in shape)
        per_device = prod(shape) // shards if divisible else prod(shape)
        assert {prod(part) for part in parts} == {per_device}
    whole = sum(prod(shape) for shape, _ in placed)
    per_device = sum(prod(parts[0]) for _, parts in placed)
    assert per_device < 1.05 * whole / shards


def test_without_shards_every_device_holds_all_parameters(measured):
    assert all(part == shape for shape, parts in measured["jit"]["placed"] for part in parts)


@pytest.mark.parametrize("way", EVERY_WAY)
def test_a_dispatch_moves_nothing_between_host_and_devices(measured, way):
    assert measured[way]["moved"] is None


@pytest.mark.parametrize("way", EVERY_WAY)
def test_the_memory_of_the_old_state_is_reused_for_the_new_one(measured, way):
    assert measured[way]["donated"]


@pytest.mark.parametrize(
    "resumed",
    ["one from pmap", "pmap from one", "jit from pmap"],  # jit: onto parameters in 8 parts
)
def test_a_run_continues_from_the_checkpoint_of_another_backend(measured, resumed):
    assert measured["resumed"][resumed] == same(measured["one device"]["losses"][5:])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "batch",
            "data.batch_size=36 does not divide among 8 devices; nearest: 32 or 40; numbers of "
            "devices that divide it: 1, 2, 3, 4, 6",
        ),
        (
            "batch of too few",
            "data.batch_size=4 does not divide among 8 devices; nearest: 8; numbers of devices "
            "that divide it: 1, 2, 4",
        ),
        (
            "accumulated batch",
            "data.batch_size=40 does not divide among 8 devices and 3 accumulated parts; "
            "nearest: 24 or 48",
        ),
        (
            "pairs",
            "data.batch_size=40 does not divide among 8 devices, into pairs of images to mix; "
            "nearest: 32 or 48; numbers of devices that divide it: 1, 2, 4, 5",
        ),
        ("shards", "parallel.shard_parameters=3 does not divide 8 devices; valid: 1, 2, 4, 8"),
        (
            "bn",
            "parallel.bn_devices=3 does not divide 8 devices; valid: 1, 2, 4, 8, and 0 for all",
        ),
        (
            "bn under pmap",
            "parallel.bn_devices=16 does not divide 8 devices; valid: 1, 2, 4, 8, and 0 for all",
        ),
        ("shards under pmap", "parallel.shard_parameters=2 needs parallel.backend=jit"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_do(measured, case, message):
    assert measured["refused"][case] == message


@pytest.fixture
def coordinator():
    """An address at which two processes can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def launch(tmp_path, coordinator):
    """A function from overrides to two processes of two devices each that train one run."""
    (tmp_path / "config.py").write_text(
        "from resjax.config import default_config\nget_config = default_config\n"
    )
    program = (
        "import sys\n"
        "from resjax.cli import main\n"
        "from resjax.train import trainer\n"
        "from resjax.xla.compile_options import quick_compile\n"
        "trainer.step_compile = quick_compile\n"
        "sys.exit(main())\n"
    )
    command = (sys.executable, "-c", program)
    started = []

    def launch(overrides):
        fields = [f"--config.{name}={value}" for name, value in (RUN | overrides).items()]
        for process in (0, 1):
            typed = (
                "train",
                f"--config={tmp_path / 'config.py'}",
                f"--workdir={tmp_path / 'run'}",
                f"--coordinator={coordinator}",
                "--processes=2",
                f"--process={process}",
            )
            with (tmp_path / f"out{process}").open("w") as out:
                environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
                started.append(
                    subprocess.Popen((*command, *typed, *fields), stdout=out, env=environment)
                )
        return started

    yield launch
    for process in started:
        process.kill()
        process.wait()


RECORDED = {"diagnostics.every": 10, "diagnostics.names": "all"}


def recorded_steps(workdir):
    """Returns the steps at which every layer was measured."""
    lines = [json.loads(line) for line in (workdir / "layers.jsonl").read_text().splitlines()]
    layers = {line["layer"] for line in lines}
    steps = dict.fromkeys(line["step"] for line in lines)
    return [step for step in steps if {x["layer"] for x in lines if x["step"] == step} == layers]


def train_losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["split"] == "train"]


def test_two_processes_have_the_losses_of_one_and_only_the_first_writes(measured, launch, tmp_path):
    assert [process.wait(timeout=120) for process in launch(RECORDED)] == [0, 0]
    assert recorded_steps(tmp_path / "run") == [0, 10, 20]
    assert train_losses(tmp_path / "run") == same(measured["one device"]["losses"])
    assert (tmp_path / "run" / "summary.json").exists()
    outputs = [(tmp_path / f"out{process}").read_text() for process in (0, 1)]
    assert ["run folder: " in text for text in outputs] == [True, False]  # Gloo prints too


@pytest.mark.slow
def test_two_processes_under_pmap_have_the_losses_of_one(measured, launch, tmp_path):
    processes = launch(RECORDED | {"parallel.backend": "pmap"})
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert recorded_steps(tmp_path / "run") == [0, 10, 20]
    assert train_losses(tmp_path / "run") == same(measured["one device"]["losses"])


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_if_a_process_is_killed_the_other_exits_and_the_last_checkpoint_is_intact(
    launch, tmp_path, victim
):
    workdir = tmp_path / "run"
    processes = launch({"train.steps": 1_000_000})
    deadline = time.monotonic() + 120
    while not (workdir / "checkpoints" / "20").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    processes[victim].send_signal(signal.SIGKILL)
    assert processes[1 - victim].wait(timeout=60) != 0
    assert not (workdir / "summary.json").exists()
    found = evaluate(workdir)
    assert found["step"] >= 20
    assert 0 < found["test_loss"] < 10
