"""Segmentation and detection compute what torchvision computes: operators, outputs, losses."""

import importlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resjax.models.segmentation import enlarge
from resjax.tasks import boxes
from resjax.tasks.detection import focal_loss, giou_loss
from resjax.transfer.naming import to_torchvision, translate
from resjax.transfer.weights import network_of, network_shapes, task_of, unflatten
from resjax.xla.compile_options import quick_compile

TORCHVISION = dict(np.load(Path(__file__).with_name("dense_torchvision.npz")))
CASES = "fcn", "deeplabv3", "retinanet", "retinanet_v2"

jit = partial(jax.jit, compiler_options=quick_compile())


@pytest.fixture(scope="module")
def cases():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        yield importlib.import_module("dense_cases")


def close(found, expected, tolerance=1e-4):
    """Asserts that the greatest difference is small relative to the greatest value."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found) / scale, expected / scale, atol=tolerance)


def network(cases, name):
    """Returns the model and the task of a case, and variables drawn by torchvision's names."""
    task, dilated = cases.CASES[name]
    fields = {**cases.MODEL, "dilated_stages": dilated}
    arrays = {}
    for path, shape in network_shapes(fields, 3, task).items():
        named = to_torchvision(path, np.zeros(shape), deep=False, averages=False, task=task)
        arrays |= {name: cases.parameter(name, array.shape) for name, array in named}
    translated = translate(arrays)
    assert not translated.left_over
    model = network_of({**fields, "loop": "unroll"}, task)
    return model, task_of(task, cases.CLASSES), unflatten(translated.arrays)


def batch(cases, task):
    if task.targets == ("mask",):
        mask = cases.masks()
        return {"image": cases.images(cases.SEGMENTATION_SIZE, len(mask)), "mask": mask}
    named = dict(zip(("boxes", "classes"), cases.objects(), strict=True))
    return {"image": cases.images(cases.DETECTION_SIZE, 2), **named}


@pytest.mark.parametrize("name", CASES)
def test_a_network_has_the_outputs_and_the_first_losses_of_torchvisions(cases, name):
    model, task, variables = network(cases, name)
    examples = batch(cases, task)
    tx = optax.sgd(cases.RATES[cases.CASES[name][0]["name"]], cases.MOMENTUM)

    @jit
    def evaluate(variables):
        outputs = model.apply(variables, examples["image"])
        if "out" in outputs:
            return jnp.moveaxis(enlarge(outputs["out"], examples["mask"].shape[1:]), -1, 1)
        return jnp.concatenate([x.reshape(2, -1, x.shape[-1]) for x in outputs["class"]], 1)

    def loss_of(params, statistics):
        outputs, updated = model.apply(
            {"params": params, "batch_stats": statistics},
            examples["image"],
            train=True,
            mutable=["batch_stats"],
        )
        return task.loss(outputs, examples), updated["batch_stats"]

    @jit
    def step(params, statistics, state):
        (loss, statistics), slope = jax.value_and_grad(loss_of, has_aux=True)(params, statistics)
        updates, state = tx.update(slope, state)
        return optax.apply_updates(params, updates), statistics, state, loss

    close(evaluate(variables)[:, :, ::7], TORCHVISION[f"{name}_outputs"])
    params, statistics = variables["params"], variables["batch_stats"]
    state, losses = tx.init(params), []
    for _ in range(cases.STEPS):
        params, statistics, state, loss = step(params, statistics, state)
        losses.append(float(loss))
    np.testing.assert_allclose(losses, TORCHVISION[f"{name}_losses"], rtol=1e-4)


def test_anchors_overlaps_matches_and_codes_are_torchvisions():
    found = TORCHVISION
    sizes = [(size, int(size * 2 ** (1 / 3))) for size in (32, 64)]
    anchors = boxes.anchors((101, 53), ((13, 7), (7, 4)), sizes, (0.5, 1.0, 2.0))
    np.testing.assert_array_equal(np.concatenate(anchors), found["anchors"])
    overlaps = boxes.overlap(found["some"], found["others"])
    np.testing.assert_allclose(overlaps, found["overlaps"], atol=1e-6)
    filled = np.concatenate([found["overlaps"], np.zeros((3, 300), np.float32)])
    matched = boxes.match(jnp.asarray(filled), jnp.arange(10) < 7)
    np.testing.assert_array_equal(matched, found["matched"])
    close(boxes.encode(found["some"], found["others"][:7]), found["encoded"], 1e-6)
    close(boxes.decode(found["deltas"], found["others"]), found["decoded"], 1e-6)


def test_an_image_without_objects_is_all_background():
    matched = boxes.match(jnp.ones((4, 10)), jnp.zeros(4, bool))
    assert (matched == boxes.BACKGROUND).all()


def test_box_losses_are_torchvisions():
    found = TORCHVISION
    focal = focal_loss(found["logits"], jnp.asarray(found["labels"]), jnp.asarray(found["matched"]))
    np.testing.assert_allclose(focal, found["focal"], rtol=1e-5)
    np.testing.assert_allclose(giou_loss(*found["giou_pair"]), found["giou"], atol=1e-6)


def test_suppression_is_torchvisions():
    crowded, scores, classes = (
        TORCHVISION[f"crowded{name}"] for name in ("", "_scores", "_classes")
    )
    suppress = jit(boxes.suppress, static_argnames="most")
    kept = np.asarray(suppress(crowded, scores + 1, classes, 0.5, most=200))
    count = len(TORCHVISION["kept"])
    np.testing.assert_array_equal(kept[:count], TORCHVISION["kept"])
    assert (kept[count:] == -1).all()
    few = suppress(crowded, scores + 1, classes, 0.5, most=9)
    np.testing.assert_array_equal(few, TORCHVISION["kept"][:9])


def test_of_equal_boxes_the_first_remains():
    same = jnp.broadcast_to(jnp.asarray([2.0, 3.0, 9.0, 9.0]), (6, 4))
    kept = boxes.suppress(same, jnp.ones(6), jnp.asarray([1, 1, 2, 1, 2, 3]), 0.5, 5)
    assert kept.tolist() == [0, 2, 5, -1, -1]


def test_detections_are_torchvisions(cases):
    found, task = TORCHVISION, task_of(cases.CASES["retinanet"][0], cases.CLASSES)
    outputs = {"class": [], "box": []}
    first = 0
    for rows, columns in found["grids"]:
        last = first + rows * columns * 9
        for name, values in (("class", found["head_logits"]), ("box", found["head_deltas"])):
            outputs[name].append(jnp.asarray(values[first:last].reshape(1, rows, columns, 9, -1)))
        first = last
    detections = jit(partial(task.detections, image_size=cases.DETECTION_SIZE))(outputs)
    count = int((detections.scores[0] > 0).sum())
    assert count == len(found["detected_scores"])
    np.testing.assert_allclose(detections.scores[0, :count], found["detected_scores"], rtol=1e-5)
    np.testing.assert_array_equal(detections.classes[0, :count], found["detected_labels"])
    np.testing.assert_allclose(detections.boxes[0, :count], found["detected_boxes"], atol=1e-3)
