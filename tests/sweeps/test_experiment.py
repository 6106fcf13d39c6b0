"""A plan is complete and valid, or its experiment is refused in one line."""

import json

import numpy as np
import pytest

from resjax.config import Variations, default_config, digest, override, resolve, to_dict
from resjax.config.fields import Field
from resjax.errors import UserError
from resjax.sweeps.experiment import plan

SWEEP = """
from resjax.sweeps import param, product

def sweep(depths=(8, 14), shortcuts=("none", "pad"), seeds=(0,)):
    return product(
        param("model.depth", depths), param("model.shortcut", shortcuts), param("seed", seeds)
    )
"""


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "ablation.py"
    path.write_text(SWEEP)
    return path


def written(path, body):
    path.write_text(body)
    return path


def planned(experiment, **sweep):
    fields = {f"sweep.{name}": value for name, value in sweep.items()}
    return plan(experiment, override(default_config(), fields))


def refusal(experiment, **sweep):
    with pytest.raises(UserError) as refused:
        planned(experiment, **sweep)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_plan_holds_the_runs_of_the_sweep_in_order(experiment):
    runs = planned(experiment).runs
    assert [(run.config.model.depth, run.config.model.shortcut) for run in runs] == [
        (8, "none"),
        (8, "pad"),
        (14, "none"),
        (14, "pad"),
    ]


def test_config_sweep_sets_the_keywords_of_sweep(experiment):
    runs = planned(experiment, depths="8", shortcuts="pad", seeds="3,4").runs
    assert [run.overrides for run in runs] == [
        {"model.depth": 8, "model.shortcut": "pad", "seed": seed} for seed in (3, 4)
    ]


OTHER = {"sweep.other": {"depths": (20,), "examples": (5,)}}


def test_values_below_an_experiments_name_hold_for_that_experiment_only(experiment):
    config = override(default_config(), OTHER)
    other = experiment.with_name("other.py")
    other.write_text("def sweep(depths=(), examples=()):\n  yield {'model.depth': depths[0]}\n")
    assert {run.config.model.depth for run in plan(experiment, config).runs} == {8, 14}
    assert {run.config.model.depth for run in plan(other, config).runs} == {20}


def test_typed_values_hold_for_every_experiment_and_come_first(experiment):
    config = override(default_config(), OTHER | {"sweep.ablation": {"depths": (14, 20)}})
    config = override(config, {"sweep.depths": "8"})
    assert {run.config.model.depth for run in plan(experiment, config).runs} == {8}


def test_the_copy_of_an_experiment_in_its_sweep_folder_keeps_its_name(experiment):
    copy = experiment.with_name("experiment.py")
    copy.write_text(SWEEP)
    copy.with_name("sweep.json").write_text('{"experiment": "ablation"}')
    config = override(default_config(), {"sweep.ablation": {"depths": (20,)}})
    assert {run.config.model.depth for run in plan(copy, config).runs} == {20}


def test_a_plan_says_where_each_keyword_comes_from(experiment):
    config = override(default_config(), {"sweep.ablation": {"depths": (8,)}, "sweep.seeds": "1,2"})
    assert plan(experiment, config, "my.py", ["sweep.seeds"]).description.splitlines() == [
        f"{experiment}: 4 runs",
        "  depths=8 (my.py)",
        "  shortcuts=none,pad (default)",
        "  seeds=1,2 (the command line)",
    ]


def sourced_refusal(experiment, fields, typed):
    with pytest.raises(UserError) as refused:
        plan(experiment, override(default_config(), fields), "my.py", typed)
    return str(refused.value)


def test_a_refusal_names_the_file_or_the_option_that_the_value_comes_from(experiment):
    misspelt = {"sweep.ablation.dephts": (8,)}
    assert "my.py: sweep.ablation.dephts: " in sourced_refusal(experiment, misspelt, ())
    assert "--config.sweep.ablation.dephts: " in sourced_refusal(experiment, misspelt, misspelt)
    wrong = {"sweep.depths": (8, 57)}
    assert "depths=8,57 (my.py)" in sourced_refusal(experiment, wrong, ())
    assert "depths=8,57 (the command line)" in sourced_refusal(experiment, wrong, wrong)
    foreign = {"sweep.other.depths": 8}
    message = "--config.sweep.other.depths: this experiment is ablation, not other"
    assert message in sourced_refusal(experiment, foreign, foreign)


def test_an_override_changes_its_field_of_the_base_config_only(experiment):
    base = override(default_config(), {"model.depth": 110, "model.width": 4})
    models = [run.config.model for run in plan(experiment, base).runs]
    assert {(model.depth, model.width) for model in models} == {(8, 4), (14, 4)}


def test_a_runs_name_is_readable_and_unique(experiment):
    names = [run.name for run in planned(experiment).runs]
    assert names[0].startswith("depth8-none-seed0-")
    assert len({name.rpartition("-")[2] for name in names}) == len(names)


def test_a_runs_name_is_a_safe_folder_name(tmp_path):
    body = "def sweep():\n  yield {'optimizer.boundaries': (0.1, 0.2), 'model.width': 4}\n"
    (run,) = planned(written(tmp_path / "x.py", body)).runs
    assert run.name.startswith("boundaries_0.1_0.2-width4-")


def test_overrides_hold_parsed_values(tmp_path):
    body = "import numpy as np\ndef sweep(seeds=()):\n  yield {'seed': np.int64(3)}\n"
    (run,) = planned(written(tmp_path / "x.py", body), seeds=np.int64(2)).runs
    assert type(run.overrides["seed"]) is int


def test_an_impossible_depth_is_refused_with_its_run(experiment):
    message = refusal(experiment, depths=(8, 57))
    assert "run model.depth=57 model.shortcut=none seed=0: model: depth 57 is not 6n + 2" in message


@pytest.mark.parametrize(
    ("blocks", "nearest"),
    [
        (("basic", "bottleneck"), "; for all blocks of the sweep: 20 and 38"),
        ((None, "bottleneck"), "; for all blocks of the sweep: 20 and 38"),
        (("basic", "preact_basic"), "; nearest: 32 and 38"),
        (("basic", "nowhere:Block"), "; nearest: 32 and 38"),
    ],
)
def test_the_nearest_depths_of_a_sweep_suit_all_of_its_blocks(tmp_path, blocks, nearest):
    body = f"def sweep():\n  for block in {blocks}:\n    "
    body += "yield {'model.depth': 35} | ({'model.block': block} if block else {})\n"
    assert refusal(written(tmp_path / "x.py", body)).endswith(nearest)


def test_an_unknown_keyword_is_refused_with_the_known_ones(experiment):
    assert "sweep.dephts" in refusal(experiment, dephts=(8,))
    assert "known: depths, shortcuts, seeds" in refusal(experiment, examples=(8,))


def test_a_missing_experiment_is_refused_with_the_nearest_name(experiment):
    assert "ablation.py" in refusal(experiment.with_name("ablatoin.py"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1\n", "has no function sweep()"),
        ("def sweep():\n  return []\n", "yields no run"),
        ("def sweep():\n  yield 3\n", "must yield dicts of overrides"),
        ("def sweep():\n  yield {'seed': 1}\n  yield {'seed': 1}\n", "are the same: seed=1 and"),
        ("def sweep():\n  yield {'seed': 0}\n  yield {'model.depth': 20}\n", "are the same"),
        ("def sweep():\n  yield {}\n  raise OSError('no disk')\n", "x.py:3: OSError: no disk"),
        ("def sweep():\n  yield {'model.dept': 8}\n", "did you mean model.depth?"),
    ],
)
def test_a_broken_experiment_is_refused(tmp_path, body, message):
    assert message in refusal(written(tmp_path / "x.py", body))


VARIATIONS = (
    {},
    {"seed": np.int64(3), "optimizer.learning_rate": np.float32(0.5)},
    {"optimizer.boundaries": "0.3", "data.classes": "cat,5", "data.mixup": 1},
    {"model.name": "cifar_resnet56", "model.branch_scale": "L^-0.5"},
    {"model.branch_scale": [1, 0.5, *(1,) * 7]},
    {"optimizer.options": {"b": 4, "a": True}, "optimizer.name": "lion"},
    {"task.options.z": "1", "task.options.label_smoothing": "0.1", "task.options.a": {"b": [1]}},
    {"transfer.thaw": {"stem": 2, "head": 1}, "transfer.freeze": "stem,head"},
    {"sweep.other": 3},
)


@pytest.mark.parametrize("overrides", VARIATIONS, ids=str)
def test_the_config_of_a_run_is_that_of_the_same_overrides_on_the_command_line(overrides):
    base = override(default_config(), {"task.options.y": 1})
    variations = Variations(base)
    variations.resolve({"seed": 5, "task.options.x": 1})  # leaves nothing behind
    config = variations.resolve(overrides)[1]
    expected = resolve(override(base, overrides))
    assert config == expected
    assert json.dumps(to_dict(config)) == json.dumps(to_dict(expected))


def test_a_plan_checks_the_fields_that_its_runs_share_once(experiment, monkeypatch):
    checked, check = [], Field.check
    monkeypatch.setattr(Field, "check", lambda *a: checked.append(a[2]) or check(*a))
    planned(experiment, depths="8,14,20", seeds=",".join(map(str, range(50))))
    assert checked.count("model.width") >= 300
    assert checked.count("train.steps") == checked.count("optimizer.momentum") == 1


def test_the_name_of_a_run_ends_with_the_digest_of_its_config(experiment):
    for run in planned(experiment).runs:
        assert run.name.endswith(f"-{digest(run.config)}")
