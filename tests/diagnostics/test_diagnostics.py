"""Diagnostics change no result, are recorded layer by layer, and are open to the user's own.

tests/train/test_parallel.py checks gradient norms in every layout and on several devices.
"""

import json
import re
import signal
import sys
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resjax
from resjax.cli import main
from resjax.config import Diagnostics, default_config, override, resolve, to_dict
from resjax.diagnostics import needs_forward
from resjax.diagnostics.conformance import check_diagnostic
from resjax.errors import UserError
from resjax.models.layout import path_name, unrolled_paths
from resjax.train.checkpoint_reader import CheckpointReader
from resjax.train.identity import config_differences
from resjax.train.loop import train
from resjax.train.signals import Stopped, StopRequest
from resjax.train.trainer import Dispatch, Trainer, trainer_for
from resjax.xla.program import Program

SMALL = {
    "model.depth": 14,
    "model.width": 4,
    "model.loop": "scan",
    "model.stochastic_depth": 0.2,
    "data.batch_size": 16,
    "data.crop_padding": 1,
    "data.flip": True,
    "optimizer.clip_norm": 0.5,
    "train.steps": 6,
    "train.log_every": 2,
    "train.eval_every": 6,
    "train.checkpoint_every": 4,
}
RECORDED = SMALL | {"diagnostics.every": 4, "diagnostics.names": "all"}
OF_ARRAYS = {"gradient_norm", "parameter_norm", "update_ratio"}
OF_BLOCKS = {"activation_gradient_norm", "branch_share", "input_output_cosine"}
OF_NORMS = {"response_mean", "response_std", "running_mean", "running_var"}
BLOCKS = {f"stage{stage}/block{block}" for stage in (1, 2, 3) for block in (1, 2)}


def configure(overrides):
    return resolve(override(default_config(), overrides))


# A user's diagnostics.


def update_ratio(context, power=1.0):
    def ratio(update, param):
        return (jnp.linalg.norm(update) / (jnp.linalg.norm(param) + 1e-6)) ** power

    return context.per_array(ratio, context.updates, context.params)


def forgets_the_stacked_axis(context):
    return {
        path_name(path): jnp.sqrt((leaf**2).sum())
        for path, leaf in jax.tree.leaves_with_path(context.gradients)
    }


def returns_vectors(context):
    return {"head/bias": context.gradients["head"]["bias"]}


def returns_no_dict(context):
    return context.loss


def returns_a_nested_dict(context):
    return {"head": {"bias": context.loss}}


def returns_no_value(context):
    return {"head": None}


def returns_text(context):
    return {"head": "large"}


def returns_a_complex_number(context):
    return {"head": context.loss + 1j}


def returns_numbered_layers(context):
    return {3: context.loss}


OWN = (
    update_ratio,
    forgets_the_stacked_axis,
    returns_vectors,
    returns_no_dict,
    returns_a_nested_dict,
    returns_no_value,
    returns_text,
    returns_a_complex_number,
    returns_numbered_layers,
)


def updates(context):
    return context.updates


@pytest.fixture(scope="module", autouse=True)
def own_diagnostics():
    """A module of the user with the functions above."""
    module = ModuleType("own_diagnostics")
    for function in OWN:
        setattr(module, function.__name__, function)
    sys.modules[module.__name__] = module
    yield
    del sys.modules[module.__name__]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The folder of a run with diagnostics that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("recorded") / "run"
    train(configure(RECORDED), workdir)
    return workdir


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def checkpoint(workdir):
    found = CheckpointReader(workdir / "checkpoints").restore_latest(None)
    return {name: (array.dtype, array.tobytes()) for name, array in found.state.items()}


# What a run records.


def test_a_run_records_one_line_per_layer_at_step_0_and_at_each_interval(recorded):
    lines = read_lines(recorded / "layers.jsonl")
    assert list(dict.fromkeys(line["step"] for line in lines)) == [0, 4]
    by_step = {step: [line for line in lines if line["step"] == step] for step in (0, 4)}
    layers = [line["layer"] for line in by_step[0]]
    assert layers == [line["layer"] for line in by_step[4]]
    assert len(set(layers)) == len(layers)
    assert layers[0].startswith("stem/")
    assert layers[-1].startswith("head/")
    assert layers.index("stage1/block2") < layers.index("stage2/block1")
    assert {line["layer"] for line in lines if "activation_gradient_norm" in line} == BLOCKS
    params = trainer_for(configure(RECORDED)).shapes["params"]
    paths = {path for paths in unrolled_paths(params).values() for path in paths}
    assert {line["layer"] for line in lines if "gradient_norm" in line} == paths
    for line in lines:
        layer, measured = line["layer"], line.keys() - {"step", "layer"}
        if layer in BLOCKS:
            assert measured == OF_BLOCKS
        elif layer in paths:
            assert measured == OF_ARRAYS
        elif "BatchNorm" in layer:
            assert measured == OF_NORMS
        elif layer == "head":
            assert measured == {"response_mean", "response_std"}
        else:
            assert re.fullmatch(r"(stem|stage\d/block\d)/relu_[01]", layer)
            assert measured == {"dead_relu_share"}
        assert line["step"] == 0 or None not in line.values()


def test_recording_changes_no_metric_and_no_checkpoint_and_writes_nothing_when_it_is_off(
    recorded, tmp_path
):
    train(configure(SMALL), tmp_path)
    assert not (tmp_path / "layers.jsonl").exists()
    metrics = [(run / "metrics.jsonl").read_bytes() for run in (tmp_path, recorded)]
    assert metrics[0] == metrics[1]
    assert checkpoint(tmp_path) == checkpoint(recorded)


def test_the_compiled_step_is_the_same_with_and_without_diagnostics():
    programs = []
    for overrides in (SMALL, RECORDED):
        trainer = trainer_for(configure(overrides))
        call = trainer.compile_dispatch(trainer.init(0), Dispatch(0, 2)).call
        instructions = re.findall(r"^ .*", call.as_text(), re.MULTILINE)  # no source locations
        programs.append([re.sub(r", metadata=\{[^}]*\}", "", line) for line in instructions])
    assert len(programs[0]) > 100
    assert programs[0] == programs[1]


MODES = {
    "scanned": {"model.depth": 14, "model.loop": "scan"},
    "unrolled": {"model.loop": "unroll"},
    "remat": {"model.remat": True},
    "accumulated": {"train.accumulation_steps": 2},
    "ema": {"optimizer.ema_decay": 0.9},
    "pmap": {"parallel.backend": "pmap"},
    "stream": {"data.feed": "stream", "data.workers": 0},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_in_every_mode_diagnostics_leave_the_step_and_its_state_as_they_are(mode, monkeypatch):
    monkeypatch.setattr(
        "resjax.train.trainer.compile_for", lambda step, *at: step.lower(*at).as_text()
    )
    steps = set()
    for overrides in (SMALL, RECORDED):
        trainer = Trainer(configure(overrides | {"model.depth": 8} | mode))
        state = trainer.init(0)
        steps.add(trainer.compile_dispatch(state, Dispatch(0, 2)))
    [step] = steps
    donated = re.compile(r"tf\.aliasing_output|jax\.buffer_donor")
    assert donated.search(step)
    assert not donated.search(trainer.compile_diagnosis(state, 0))


def test_the_default_diagnostics_need_the_arithmetic_of_a_step_and_no_more_memory():
    overrides = {"model.depth": 14, "data.batch_size": 64, "diagnostics.every": 2}
    trainer = Trainer(configure(SMALL | overrides))
    state = trainer.init(0)
    step = trainer.compile_dispatch(state, Dispatch(0, 1))
    measurement = trainer.compile_diagnosis(state, 0)
    assert measurement.peak_bytes <= step.peak_bytes
    flops = [
        sum(kernel.flops * kernel.times for kernel in Program(made.call.as_text()).kernels)
        for made in (measurement, step)
    ]
    assert 0 < flops[0] <= 1.05 * flops[1]


class StopAfter(StopRequest):
    """Requests a stop after so many dispatches."""

    def __init__(self, dispatches):
        super().__init__()
        self._left = dispatches

    def requested(self):
        self._left -= 1
        if self._left == 0:
            self.signal = signal.SIGTERM
        return self._left <= 0


@pytest.mark.parametrize("dispatches", [1, 2])  # before and at a measurement
def test_a_run_that_is_stopped_and_resumed_has_the_same_layers(recorded, tmp_path, dispatches):
    config = configure(RECORDED)
    with pytest.raises(Stopped):
        train(config, tmp_path, stop=StopAfter(dispatches))
    train(config, tmp_path)
    files = [(run / "layers.jsonl").read_bytes() for run in (tmp_path, recorded)]
    assert files[0] == files[1]


def test_load_layers_reads_what_a_run_wrote(recorded):
    table = resjax.load_layers(recorded)
    assert set(table) >= {"step", "layer", "gradient_norm", "activation_gradient_norm"}
    lines = read_lines(recorded / "layers.jsonl")
    assert len(table) == len(lines)
    for row, line in zip(table.to_dict("records"), lines, strict=True):
        assert (row["step"], row["layer"]) == (line["step"], line["layer"])
        for name in ("gradient_norm", "activation_gradient_norm"):
            assert row[name] == pytest.approx(line.get(name, float("nan")), nan_ok=True)


def test_patterns_choose_the_layers_that_are_recorded(tmp_path):
    chosen = {"diagnostics.layers": "stage1/block2, *_0"}
    train(configure(RECORDED | chosen), tmp_path)
    layers = {line["layer"] for line in read_lines(tmp_path / "layers.jsonl")}
    assert {"stage1/block2", "stage1/block2/Conv_1/kernel", "stage3/block2/relu_0"} <= layers
    assert "stage3/block1/BatchNorm_0/scale" in layers
    assert not layers & {"stage1/block1", "stage3/block2/BatchNorm_1", "head"}


# What a diagnostic sees.


def test_the_context_is_that_of_the_next_step_after_clipping_momentum_and_freezing():
    """The measured updates are what the step that follows adds to the parameters."""
    overrides = SMALL | {
        "transfer.freeze": "stem,stage1",
        "optimizer.warmup_steps": 1,
        "diagnostics.names": ("gradient_norm", "own_diagnostics:update_ratio"),
        "diagnostics.options": {"update_ratio": {"power": 2.0}},
    }
    trainer = Trainer(configure(overrides))
    arrays, _ = trainer.source.example_arrays()
    one_step = trainer.compile_dispatch(trainer.init(0), Dispatch(0, 1)).call
    state, _ = one_step(trainer.init(0), arrays)
    state, _ = one_step(state, arrays)
    found = trainer.compile_diagnosis(state, 0, updates).call(state, arrays)
    ratios = trainer.compile_diagnosis(state, 0).call(state, arrays)["update_ratio"]
    before = jax.device_get(state.params)
    after = jax.device_get(one_step(state, arrays)[0].params)
    assert {name.partition("/")[0] for name in ratios} == {"stage2", "stage3", "head"}
    for name in ("stage2", "stage3", "head"):
        expected = jax.tree.map(jnp.subtract, after[name], before[name])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
            found[name],
            expected,
        )
    kernel, old = expected["kernel"], before["head"]["kernel"]
    ratio = (np.linalg.norm(kernel) / np.linalg.norm(old)) ** 2
    assert float(ratios["head/kernel"]) == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("gradient_norm", "running_mean"), False),
        (("gradient_norm", "dead_relu_share"), True),
        (("all",), True),
        (("own_diagnostics:update_ratio",), True),
    ],
)
def test_the_forward_pass_is_recorded_if_a_diagnostic_may_use_it(names, expected):
    assert needs_forward(Diagnostics(names=names)) is expected


# Mistakes, and conformance.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"names": ("gradient_norms",)},
            r"names=gradient_norms: no such diagnostic; did you mean 'gradient_norm'\?",
        ),
        (
            {"names": ("nowhere:f",)},
            r"diagnostics\.names=nowhere:f: no module named 'nowhere' here",
        ),
        ({"names": ("own_diagnostics:f",)}, r"own_diagnostics:f: .* has no attribute 'f'"),
        (
            {"names": ("gradient_norm", "gradient_norm")},
            r"diagnostics\.names: two diagnostics are called gradient_norm",
        ),
        (
            {
                "names": ("own_diagnostics:update_ratio",),
                "options": {"update_ratio": {"powers": 2}},
            },
            r"diagnostics\.options\.update_ratio: .* unexpected keyword argument 'powers'",
        ),
        (
            {"names": ("gradient_norm",), "options": {"update_ratio": {"power": 2}}},
            r"diagnostics\.options\.update_ratio: no such diagnostic is measured",
        ),
    ],
)
def test_a_mistake_in_the_choice_of_diagnostics_is_one_line(tmp_path, fields, message):
    overrides = {f"diagnostics.{name}": value for name, value in fields.items()}
    with pytest.raises(UserError, match=message) as refusal:
        train(configure(RECORDED | overrides), tmp_path / "run")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "forgets_the_stacked_axis",
            r"diagnostics\.names=forgets_the_stacked_axis: the value of stage1/blocks/\S+ has the "
            r"shape \(\), expected one number per block; use context\.per_array",
        ),
        ("returns_vectors", r"the value of head/bias has the shape \(10,\), expected a scalar"),
        ("returns_no_dict", r"returns_no_dict: must return a dict from paths of layers to scalars"),
        ("returns_a_nested_dict", r"the value of head is dict, expected a real number"),
        ("returns_no_value", r"the value of head is NoneType, expected a real number"),
        ("returns_text", r"names=returns_text: the value of head is str, expected a real number"),
        ("returns_a_complex_number", r"the value of head is complex64, expected a real number"),
        ("returns_numbered_layers", r"the key 3 is not the path of a layer, such as 'stage1/block"),
    ],
)
def test_a_diagnostic_with_values_of_the_wrong_kind_or_shape_is_refused_in_one_line(name, message):
    trainer = Trainer(configure(RECORDED | {"diagnostics.names": (f"own_diagnostics:{name}",)}))
    with pytest.raises(UserError, match=message) as refusal:
        trainer.compile_diagnosis(trainer.init(0), 0)
    assert "\n" not in str(refusal.value)


def test_a_layer_pattern_that_matches_nothing_is_refused_in_one_line():
    trainer = trainer_for(configure(RECORDED | {"diagnostics.layers": "stem,stage9/*"}))
    message = r"diagnostics\.layers=stage9/\*: matches no layer that a diagnostic measures; .*"
    with pytest.raises(UserError, match=message) as refusal:
        trainer.compile_diagnosis(trainer.init(0), 0)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_a_layer_pattern_that_matches_nothing_is_refused_before_a_step_is_compiled(
    backend, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("resjax.train.trainer.compile_for", pytest.fail)
    config = tmp_path / "config.py"
    config.write_text("from resjax.config import default_config as get_config\n")
    fields = RECORDED | {"diagnostics.layers": "stem,stage9/*", "parallel.backend": backend}
    options = [f"--config.{name}={value}" for name, value in fields.items()]
    assert main(["train", f"--config={config}", *options, f"--workdir={tmp_path / 'run'}"]) == 2
    assert "diagnostics.layers=stage9/*: matches no layer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gradient_norm", {}),
        ("activation_gradient_norm", {}),
        ("response_std", {}),
        ("own_diagnostics:update_ratio", {"power": 0.5}),
    ],
)
def test_a_diagnostic_that_conforms_passes_the_conformance_check(name, options):
    assert len(check_diagnostic(name, **options)) == 3


def test_options_of_diagnostics_may_change_when_a_run_continues():
    old = to_dict(configure(RECORDED))
    options = {"update_ratio": {"power": 2}}
    names = ("own_diagnostics:update_ratio",)
    new = configure(RECORDED | {"diagnostics.options": options, "diagnostics.names": names})
    assert not config_differences(old, to_dict(new))


def test_the_conformance_check_fails_for_a_diagnostic_that_forgets_the_stacked_axis():
    with pytest.raises(AssertionError, match=r"stage1/blocks/\S+ has the shape \(\), expected"):
        check_diagnostic("own_diagnostics:forgets_the_stacked_axis")
    with pytest.raises(UserError, match="no such diagnostic"):
        check_diagnostic("norm_of_gradients")
