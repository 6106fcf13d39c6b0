"""The schema, the ways to set its fields, and the one-line message of every mistake."""

import dataclasses
import hashlib
import json
import math
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resjax import tasks
from resjax.config import (
    FIRST_FIELDS,
    Config,
    checks,
    default_config,
    digest,
    from_dict,
    load,
    override,
    resolve,
    to_dict,
)
from resjax.config.fields import documentation
from resjax.config.schema import FIELDS, SECTIONS
from resjax.errors import UserError
from resjax.models.presets import ARCHITECTURE

CONFIGS = Path(__file__).parents[1] / "configs"


def resolved(**fields):
    """Resolves the default config with some fields changed; `__` stands for the dot."""
    return resolve(
        override(default_config(), {name.replace("__", "."): v for name, v in fields.items()})
    )


def refusal(action):
    with pytest.raises(UserError) as refused:
        action()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def config_file(folder, body):
    path = folder / "c.py"
    path.write_text(body)
    return path


def test_neither_the_schema_nor_a_refusal_imports_jax():
    program = (
        "import sys; from resjax.config import default_config, override, resolve\n"
        "config = override(default_config(), {'model.shortcut': 'none'}); resolve(config)\n"
        "assert not {'jax', 'flax'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_known_tasks_are_those_of_resjax_tasks():
    assert set(checks.TASKS) == set(tasks.TASKS)


def test_every_field_of_the_schema_is_documented():
    for section in (Config, *SECTIONS.values()):
        documented = documentation(section)
        names = [each.name for each in dataclasses.fields(section)]
        assert set(documented) == {name for name in names if name not in SECTIONS}
        assert all(text.endswith(".") for text in documented.values())


def test_resolving_fills_every_open_field_of_the_architecture():
    model = resolved(model__name="cifar_plain56").model
    assert (model.family, model.depth, model.shortcut, model.width) == ("cifar", 56, "none", 16)
    open_fields = [name for name in ARCHITECTURE if getattr(model, name) is None]
    assert open_fields == ["name"]


def test_a_field_takes_precedence_over_the_preset():
    assert resolved(model__name="cifar_plain56", model__shortcut="pad").model.shortcut == "pad"


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("model.depth", "56", 56),
        ("model.depth", "None", None),
        ("model.shortcut", "none", "none"),
        ("model.name", "None", None),
        ("data.flip", "true", True),
        ("data.flip", "False", False),
        ("optimizer.learning_rate", "1e-2", 0.01),
        ("optimizer.learning_rate", "1", 1.0),
        ("optimizer.boundaries", "0.25,0.5", (0.25, 0.5)),
        ("optimizer.boundaries", "(0.25, 0.5)", (0.25, 0.5)),
        ("optimizer.boundaries", "", ()),
        ("data.color_jitter", "0.4,0.4,0", (0.4, 0.4, 0.0)),
        ("data.classes", "5,0", (5, 0)),
        ("data.classes", "cat, a dog,5,007,true", ("cat", "a dog", 5, "007", "true")),
        ("data.classes", "'a,b','5'", ("a,b", "5")),
        ("data.random_erasing", "1", 1.0),
        ("diagnostics.names", "a, my:b", ("a", "my:b")),
        ("model.block_options.groups", "32", 32),
        ("model.block_options", "{'groups': 32}", {"groups": 32}),
        ("sweep.depths", "8,20", (8, 20)),
        ("sweep.shortcuts", "none,pad", ("none", "pad")),
        ("sweep.shortcut", "none", "none"),
        ("sweep.flips", "true,false", (True, False)),
        ("sweep.of.widths", "[8, 16]", (8, 16)),
        ("sweep.name", "{[]: 1}", "{[]: 1}"),
    ],
)
def test_a_string_is_parsed_by_the_type_of_its_field(field, text, value):
    config = override(default_config(), {field: text}).to_dict()
    for name in field.split("."):
        config = config[name]
    assert config == value
    assert type(config) is type(value)


def test_override_does_not_change_the_original_config():
    config = default_config()
    override(config, {"model.block_options.groups": 2, "seed": 3})
    assert config == default_config()


def test_a_value_inside_a_dict_has_no_fields():
    config = override(default_config(), {"sweep.depths": 8})
    assert "depths holds 8" in refusal(lambda: override(config, {"sweep.depths.x": 1}))


def test_an_overridden_config_is_locked_but_for_its_dicts():
    config = override(default_config(), {"sweep.depths": (8,)})
    config.sweep.seeds = (0,)
    with pytest.raises(AttributeError):
        config.model.dept = 8


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.dept", 8, "model.dept: no such field; did you mean model.depth?"),
        ("depth", 8, "depth: no such field; did you mean model.depth?"),
        ("train.learning_rate", 1, "did you mean optimizer.learning_rate?"),
        ("optimiser.momentum", 0, "did you mean optimizer.momentum?"),
        ("model.steps", 10, "model.steps: no such field; did you mean train.steps?"),
        ("sed", 1, "did you mean seed?"),
        (
            "qqq",
            1,
            "the sections are model, data, task, train, optimizer, transfer, diagnostics, parallel",
        ),
        ("model", 8, "model is a section"),
        ("model.depth.x", 8, "model.depth holds an integer or None"),
        ("model.depth", "deep", "model.depth='deep': expected an integer or None"),
        ("model.depth", 20.0, "model.depth=20.0: expected an integer or None"),
        ("model.depth", True, "expected an integer or None"),
        ("model.block_options", 3, "expected a section"),
        ("model.block_options.act", print, "expected numbers, strings"),
        ("model.block_options.scale", float("nan"), "expected numbers, strings"),
        ("data.flip", "1", "data.flip=1: expected true or false"),
        ("data.flip", 1, "data.flip=1: expected true or false"),
        ("data.batch_size", 0, "data.batch_size=0: must be at least 1"),
        ("seed", 2**31, "must be at least 0 and below 2147483648"),
        ("seed", None, "seed=None: expected an integer"),
        ("optimizer.learning_rate", 0, "must be above 0"),
        ("optimizer.learning_rate", "nan", "optimizer.learning_rate='nan': expected a number"),
        ("optimizer.learning_rate", float("nan"), "must be above 0"),
        ("optimizer.learning_rate", float("inf"), "must be above 0"),
        ("data.random_erasing", 1.5, "must be at least 0 and at most 1"),
        ("data.color_jitter", (0.4, -0.1, 0), "must be at least 0"),
        ("data.color_jitter", (0.4,), "data.color_jitter=0.4: needs three strengths"),
        ("data.mixup", float("inf"), "must be at least 0"),
        ("data.classes", 5, "data.classes=5: expected names or numbers, as in cat,dog or 5,6"),
        ("data.classes", (5, 6.0), "data.classes=6.0: expected an integer"),
        ("data.classes", (-1, 0), "must be at least 0"),
        ("data.classes", (5,), "data.classes=5: a single class cannot be classified"),
        ("data.classes", (5, 6, 5), "data.classes=5,6,5: names a class twice"),
        ("data.per_class", 0, "must be at least 1"),
        ("data.subset_seed", 1, "data.subset_seed=1: needs data.per_class"),
        ("train.label_smoothing", 1, "did you mean task.options.label_smoothing?"),
        ("transfer.stage_factor", 1, "did you mean transfer.layer_decay?"),
        ("optimizer.boundaries", (0.5, 1.0), "must be above 0 and below 1"),
        ("optimizer.boundaries", (0.75, 0.5), "must increase"),
        ("optimizer.schedule", "step", "optimizer.schedule=step: unknown; did you mean 'steps'?"),
        ("optimizer.warmup_steps", 64_000, "must be below train.steps=64000"),
        ("data.name", "cifar", "data.name: no dataset 'cifar'; did you mean 'cifar10'?"),
        ("model.depth", 57, "model: depth 57 is not 6n + 2"),
        ("transfer.weights", "", "transfer.weights=: has no value; None leaves it open"),
        ("data.name", "folder:", "data.name: folder: lacks a path"),
        ("data.name", "tfds:", "data.name: tfds: lacks a name"),
        ("model.shortcut", "pads", "model: unknown shortcut 'pads'; did you mean 'pad'?"),
        ("model.name", "resnet5", "did you mean 'resnet50'?"),
    ],
)
def test_a_wrong_value_is_refused_with_its_field_and_how_to_fix_it(field, value, message):
    assert message in refusal(lambda: resolve(override(default_config(), {field: value})))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer__schedule": "he2015", "optimizer__warmup_steps": 5}, "its own warm-up"),
        ({"optimizer__nesterov": True, "optimizer__momentum": 0.0}, "optimizer.momentum above 0"),
        ({"model__zero_init_residual": True, "model__block": "preact_basic"}, "ends in a norm"),
        ({"model__stochastic_depth": 0.5, "model__shortcut": "none"}, "needs a shortcut"),
        ({"transfer__thaw": {"head": -1}}, "transfer.thaw.head=-1: must be at least 0"),
        ({"transfer__thaw": {"head": "soon"}}, "transfer.thaw.head='soon': expected a number"),
        ({"transfer__layer_decay": 0.5, "transfer__first_rate": 0.1}, "set only one"),
        ({"transfer__head": "new"}, "transfer.head=new: needs transfer.weights"),
        ({"data__normalization": "weights"}, "needs transfer.weights"),
        ({"optimizer__schedule": "onecycle", "optimizer__warmup_steps": 5}, "its own warm-up"),
        (
            {"train__log_every": 100, "train__eval_every": 150},
            "the steps of one dispatch; nearest: 100 or 200",
        ),
        ({"diagnostics__every": 50}, "diagnostics.every=50: must be a multiple"),
    ],
)
def test_values_that_exclude_each_other_are_refused(fields, message):
    assert message in refusal(lambda: resolved(**fields))


def test_a_config_file_may_not_set_a_wrong_type_even_if_the_field_was_none(tmp_path):
    body = "from resjax.config import default_config\ndef get_config():\n  c = default_config()\n"
    path = config_file(tmp_path, body + "  c.model.depth = '20'\n  return c\n")
    assert "model.depth='20': expected an integer" in refusal(lambda: resolve(load(path)))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def get_config(:\n", r"c\.py:1: "),
        ("\nimport nowhere\n", r"c\.py:2: ModuleNotFoundError: No module named 'nowhere'"),
        ("x = 1\n", r"c\.py: has no function get_config"),
        ("def get_config():\n  return {}\n", r"c\.py: get_config\(\) returned dict"),
        ("def get_config():\n  x = 1\n  return x / 0\n", r"c\.py:3: ZeroDivisionError"),
        (
            "from resjax.config import default_config\n"
            "def get_config():\n  default_config().model.dept = 3\n",
            r"c\.py:3: dept: no such field; did you mean model.depth\?",
        ),
        (
            "from resjax.config import default_config\n"
            "def get_config():\n  default_config().train.steps = 'many'\n",
            r"c\.py:3: TypeError",
        ),
        (
            "from ml_collections import ConfigDict\n"
            "def get_config():\n  return ConfigDict({'model': {'dept': 3}})\n",
            r"c\.py: dept: no such field; did you mean model.depth\?",
        ),
    ],
)
def test_a_broken_config_file_is_refused_with_file_and_line(tmp_path, body, message):
    path = config_file(tmp_path, body)
    assert re.search(message, refusal(lambda: load(path)))


def test_a_missing_config_file_is_refused_with_the_nearest_name(tmp_path):
    config_file(tmp_path, "")
    assert "did you mean" in refusal(lambda: load(tmp_path / "d.py"))
    assert "no such file" in refusal(lambda: load(tmp_path / "nowhere" / "d.py"))
    assert "is a folder; name a Python file: c.py" in refusal(lambda: load(tmp_path))


def test_a_config_of_ours_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    for name in ("quickstart", "imagenet:v1.5"):
        file = CONFIGS / (name.replace(":", ".py:") if ":" in name else f"{name}.py")
        assert load(name).to_dict() == load(file).to_dict()
    assert load("imagenet:paper").to_dict() != load("imagenet:v1.5").to_dict()


@pytest.mark.parametrize("name", ["quikstart", "quikstart:small"])
def test_a_misspelt_name_of_a_config_is_refused_with_the_nearest(name):
    assert "quikstart: no such file; did you mean 'quickstart'?" in refusal(lambda: load(name))


def test_text_after_the_colon_is_the_argument_of_get_config(tmp_path):
    body = "from resjax.config import default_config\ndef get_config(seed):\n"
    path = config_file(tmp_path, body + "  c = default_config(); c.seed = int(seed); return c\n")
    assert load(f"{path}:7").seed == 7


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_an_unknown_variant_of_a_config_of_ours_is_refused_by_its_name(path):
    assert re.match(r"unknown (variant|recipe|task) 'v9'; ", refusal(lambda: load(f"{path}:v9")))


def test_a_config_that_needs_a_variant_says_how_to_write_it(tmp_path):
    path = config_file(tmp_path, "def get_config(seed):\n  return None\n")
    assert f"write a variant after a colon, {path}:VARIANT" in refusal(lambda: load(path))


def test_a_type_error_within_a_config_file_keeps_its_line(tmp_path):
    path = config_file(tmp_path, "def get_config():\n  return len(3)\n")
    assert "c.py:2: TypeError" in refusal(lambda: load(path))


def test_a_config_file_may_define_a_dataclass(tmp_path):
    body = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from resjax.config import default_config\n@dataclass\nclass A:\n  x: int = 3\n"
        "def get_config():\n  c = default_config(); c.seed = A().x; return c\n"
    )
    assert load(config_file(tmp_path, body)).seed == 3


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_file_in_configs_resolves_and_shows_its_command(path, weights_folder):
    config = load(path)
    if config.transfer.head != "keep":  # needs the user's weights
        config.transfer.weights = str(weights_folder)
    resolve(config)
    assert f"--config=configs/{path.name}" in path.read_text()


def test_the_two_imagenet_recipes_differ_in_where_bottlenecks_stride():
    paper, today = (
        resolve(load(f"{CONFIGS / 'imagenet.py'}:{recipe}")) for recipe in ("paper", "v1.5")
    )
    assert paper.model.block_options == {"stride_in_1x1": True}
    assert today.model.block_options == {}


@pytest.mark.parametrize("what", ["finetune", "frozen", "gradual", "bit,3680,224"])
def test_every_finetuning_recipe_resolves_and_requires_weights(what, weights_folder):
    config = load(f"{CONFIGS / 'finetune.py'}:{what}")
    assert "needs transfer.weights" in refusal(lambda: resolve(config))
    config.transfer.weights = str(weights_folder)
    assert resolve(config).model.depth == 29


@pytest.mark.parametrize(
    ("what", "steps", "decays", "side", "mixup"),
    [
        ("bit,10,32", 500, (200, 300, 400), 128, 0),
        ("bit,19999,95", 500, (200, 300, 400), 128, 0),
        ("bit,20000,96", 10_000, (3_000, 6_000, 9_000), 480, 0.1),
        ("bit,1281167,400", 20_000, (6_000, 12_000, 18_000), 480, 0.1),
    ],
)
def test_the_bit_hyperrule_depends_on_examples_and_image_size(what, steps, decays, side, mixup):
    config = load(f"{CONFIGS / 'finetune.py'}:{what}")
    assert (config.train.steps, config.data.image_size, config.data.mixup) == (steps, side, mixup)
    found = [round(share * steps) for share in config.optimizer.boundaries]
    assert tuple(found) == decays


@pytest.mark.parametrize("what", ["fintune", "bit", "bit,many,32", "bit,10"])
def test_an_unknown_finetuning_recipe_is_refused_with_the_known_ones(what):
    assert "bit,EXAMPLES,SIDE" in refusal(lambda: load(f"{CONFIGS / 'finetune.py'}:{what}"))


@pytest.fixture
def weights_folder(tmp_path):
    """A weights folder with its description only; resolving a config reads no arrays."""
    model = {
        **{"family": "cifar", "depth": 29, "block": "bottleneck", "width": 8},
        **{"block_options": {"se_reduction": 4}, "bn_epsilon": 1e-3, "classes": 7, "loop": "scan"},
    }
    (tmp_path / "weights.json").write_text(json.dumps({"model": model}))
    return tmp_path


def test_open_model_fields_take_the_values_of_the_weights(weights_folder):
    model = resolved(transfer__weights=str(weights_folder)).model
    assert (model.family, model.depth, model.block, model.width) == ("cifar", 29, "bottleneck", 8)
    assert (model.block_options, model.bn_epsilon) == ({"se_reduction": 4}, 1e-3)
    assert model.loop == "auto"  # how it computes is not part of what it is


def test_model_fields_take_precedence_over_the_weights(weights_folder):
    given = {"transfer__weights": str(weights_folder)}
    assert resolved(**given, model__depth=20, model__bn_epsilon=1e-4).model.depth == 20
    other = resolved(**given, model__block="preact_basic", model__depth=14).model
    assert (other.block, other.block_options) == ("preact_basic", {})
    named = resolved(**given, model__name="cifar_resnet20").model
    assert (named.depth, named.width, named.block_options) == (20, 16, {})


def test_a_run_folder_is_a_source_of_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(resolved(model__depth=44))))
    assert resolved(transfer__weights=str(tmp_path)).model.depth == 44


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such folder; make a weights folder: `resjax import FILE --out=DIR`"),
        ({"other.txt": ""}, "it has no weights.json and no config.json"),
        ({"weights.json": "{"}, "weights.json: damaged, not a JSON object"),
        ({"weights.json": "{}"}, "weights.json: damaged, describes no model"),
        (
            {"weights.json": '{"model": {"depth": "x"}}'},
            "model.depth='x': expected an integer",
        ),
        ({"weights.json": '{"model": {"depth": 21}}'}, "depth 21 is not 6n + 2"),
    ],
)
def test_missing_or_damaged_weights_are_refused(tmp_path, content, message):
    folder = tmp_path / "weights"
    for name, text in (content or {}).items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    assert message in refusal(lambda: resolved(transfer__weights=str(folder)))


def test_a_foreign_file_is_refused_with_the_import_command(tmp_path):
    (tmp_path / "r50.pth").write_bytes(b"")
    message = refusal(lambda: resolved(transfer__weights=str(tmp_path / "r50.pth")))
    assert f"`resjax import {tmp_path / 'r50.pth'} --out=DIR`" in message


def test_thaw_epochs_on_the_command_line_are_numbers():
    typed = {"transfer.thaw.head": "0", "transfer.thaw.stage3/block1": "1.5"}
    read = resolve(override(default_config(), typed))
    assert read.transfer.thaw == {"head": 0.0, "stage3/block1": 1.5}
    assert digest(read) == digest(resolved(transfer__thaw={"stage3/block1": 1.5, "head": 0}))
    assert digest(read) != digest(resolved())


CONFIG = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31 - 1),
        "model.depth": st.integers(1, 40).map(lambda n: 6 * n + 2),
        "model.shortcut": st.sampled_from(["none", "pad", "project"]),
        "optimizer.learning_rate": st.floats(1e-8, 1e3),
        "optimizer.boundaries": st.lists(
            st.floats(0.01, 0.99), max_size=3, unique=True
        ).map(lambda fractions: tuple(sorted(fractions))),
        "data.flip": st.booleans(),
        "data.classes": st.lists(
            st.integers(0, 99), min_size=2, max_size=4, unique=True
        ).map(tuple),
    }
)  # fmt: skip


@given(CONFIG)
def test_a_config_survives_its_json(overrides):
    config = resolve(override(default_config(), overrides))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@given(CONFIG)
def test_an_override_and_its_string_are_equivalent(overrides):
    typed = {field: str(value) for field, value in overrides.items()}
    assert override(default_config(), typed) == override(default_config(), overrides)


@given(CONFIG, CONFIG)
def test_two_configs_share_a_digest_if_and_only_if_they_are_equal(one, other):
    first, second = (resolve(override(default_config(), fields)) for fields in (one, other))
    assert (digest(first) == digest(second)) == (first == second)


def test_a_preset_and_its_fields_are_the_same_run():
    assert digest(resolved(model__name="cifar_resnet56")) == digest(resolved(model__depth=56))


# Computed before there were fields beside those of schema version 1.
EARLIER_DIGESTS = {
    "9beae3e7": {},
    "6c7724f1": {"model__depth": 56, "model__shortcut": "none", "seed": 2},
    "f1297e3b": {"model__name": "resnet50"},
}


@pytest.mark.parametrize("earlier", EARLIER_DIGESTS)
def test_a_new_field_with_its_default_renames_no_run_and_strands_none(earlier):
    config = resolved(**EARLIER_DIGESTS[earlier])
    assert digest(config) == earlier
    content = to_dict(config)
    then = {
        section: {name: fields[name] for name in FIRST_FIELDS[section].split()}
        for section, fields in content.items()
        if section in FIRST_FIELDS
    }
    assert from_dict({"seed": config.seed, **then}) == config


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_that_is_not_at_its_default_changes_the_digest(field):
    section, _, name = field.partition(".")
    content = to_dict(resolved())
    if section in ("sweep", "track") or field == "model.name":
        return
    other = object()
    values = (2, 0.5, True, False, {"a": 1.0}, [0.3, 0.4], [1, 2], ["a:b"], "cat:Dog")
    for value in (*FIELDS[field].choices, *values):
        changed = json.loads(json.dumps(content))
        if name:
            changed[section][name] = value
        else:
            changed[section] = value
        with suppress(UserError, ValueError):
            other = from_dict(changed)
            if other != resolved():
                break
    assert digest(other) != digest(resolved())


def test_an_invented_field_is_part_of_the_digest_only_with_another_value(monkeypatch):
    before = {value: digest(resolved(model__remat=value)) for value in (False, True)}
    names = FIRST_FIELDS["model"].replace(" remat", "")  # as if it had come later
    monkeypatch.setitem(FIRST_FIELDS, "model", names)
    invented = {value: digest(resolved(model__remat=value)) for value in (False, True)}
    assert invented[False] != before[False]
    assert invented[True] == before[True]
    content = to_dict(resolved())
    del content["model"]["remat"]
    canonical = {"seed": content["seed"]} | {
        section: {
            name: content[section][name] for name in fields.split() if name in content[section]
        }
        for section, fields in FIRST_FIELDS.items()
    }
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"))
    assert invented[False] == hashlib.sha256(text.encode()).hexdigest()[:8]


@pytest.mark.parametrize("version", [3, "2", 0])
def test_a_config_of_a_later_version_is_refused(version):
    with pytest.raises(UserError, match=f"schema_version={version!r}, and this resjax knows"):
        from_dict({"schema_version": version, **to_dict(resolved())})


def test_running_variances_of_earlier_runs_from_weights_stay_biased():
    content = to_dict(resolved())
    del content["model"]["bn_unbiased"]
    content["transfer"]["weights"] = "weights"
    assert from_dict(content).model.bn_unbiased is False


def test_the_sweep_section_is_not_part_of_a_runs_identity():
    swept = resolved(sweep__depths=(8, 20))
    assert swept == resolved()
    assert digest(swept) == digest(resolved())
    assert "sweep" not in to_dict(swept)


def test_lists_in_block_options_become_tuples_for_flax():
    content = to_dict(resolved())
    content["model"]["block_options"] = {"sizes": [1, [2]]}
    assert from_dict(content).model.block_options == {"sizes": (1, (2,))}


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved().seed = 3


@pytest.mark.parametrize(
    ("field", "named", "lacking"),
    [
        ("model.block", "json:JSONDecoder", "features, strides, conv, norm, act, shortcut"),
        ("model.shortcut", "resjax.models.blocks:SqueezeExcite", "features, strides, norm"),
    ],
)
def test_a_class_that_is_not_a_block_or_shortcut_is_refused_with_the_missing_fields(
    field, named, lacking
):
    with pytest.raises(UserError, match=f"lacks the fields {lacking};"):
        resolve(override(default_config(), {field: named}))


WORDS = ["", "abc", "None", "true", "nan", "a:b", ":", "(", "(" * 250, "1or2", "%s", "{0}", "a\nb"]
NUMBERS = ["-1", "1.5", "1,2", "1e400", "1" + "0" * 30, "{'a': 1}", "\x1b[31m", "\0"]


@pytest.mark.parametrize("path", FIELDS)
def test_a_field_takes_a_value_or_refuses_it_in_one_line_that_names_its_section(path):
    field, taken = FIELDS[path], []
    bounds = field.bounds
    outside = [bounds.ge - 1, bounds.gt, bounds.le + 1, bounds.lt]
    wrong = [f"{number:.12g}" for number in outside if math.isfinite(number)]
    for text in (*WORDS, *NUMBERS, *wrong):
        try:
            resolve(override(default_config(), {path: text}))
            taken.append(text)
        except UserError as error:
            message = str(error).replace(text, "").replace(repr(text), "")
            assert message.isprintable(), text
            assert path.partition(".")[0] in message, text
    names = field.type in (str, tuple) and field.item is not float
    assert names or not {*taken} & {"abc", "a:b", *wrong}, taken


def test_the_largest_numbers_are_those_of_jax():
    assert "must be below 2147483648" in refusal(lambda: resolved(train__steps=2**31))
    assert "must be below 1e+38" in refusal(lambda: resolved(optimizer__learning_rate=10**400))
    assert "must be at least 1 and at most 10000" in refusal(lambda: resolved(model__depth=2**40))
