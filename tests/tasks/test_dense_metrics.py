"""Metrics of segmentation and detection, against independent computations; scenes; bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, jaccard_score

from resjax.config import Task as TaskConfig
from resjax.config import default_config, override, resolve
from resjax.data.datasets import digit_splits
from resjax.data.examples import VOID
from resjax.data.scenes import scenes
from resjax.errors import UserError
from resjax.tasks import DatasetInfo, make_task
from resjax.tasks.average_precision import THRESHOLDS, average_precision, count
from resjax.tasks.boxes import Detections
from resjax.tasks.conformance import check_task
from resjax.train.trainer import trainer_for

CLASSES = tuple("abcd")


def segmentation(**options):
    return make_task(TaskConfig("segmentation", options), DatasetInfo(CLASSES, (8, 8, 3)))


def added(parts):
    return jax.tree.map(lambda *each: np.sum(each, 0), *map(jax.device_get, parts))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_mean_iou_and_accuracy_are_those_of_all_counted_pixels(seed, occurring):
    generator = np.random.default_rng(seed)
    task = segmentation()
    logits = generator.normal(size=(6, 8, 8, 4)).astype(np.float32)
    logits[..., occurring:] = -9  # classes that neither masks nor predictions have
    mask = generator.integers(0, occurring, (6, 8, 8)).astype(np.uint8)
    mask[generator.random(mask.shape) < 0.2] = VOID
    batches = [
        {"mask": jnp.asarray(mask[part]), "weight": jnp.ones(len(mask[part]))}
        for part in (slice(0, 4), slice(4, 6))
    ]
    parts = [
        task.sums({"out": jnp.asarray(logits[part])}, batch)
        for part, batch in zip((slice(0, 4), slice(4, 6)), batches, strict=True)
    ]
    found = task.metrics(added(parts))
    truth, predicted = mask[mask != VOID], logits.argmax(-1)[mask != VOID]
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    scores = jaccard_score(truth, predicted, average="macro", zero_division=0)
    assert found["miou"] == pytest.approx(scores, rel=1e-6)


def test_counts_beyond_float32_are_exact():
    task = segmentation()
    pixels = jnp.zeros((1, 4, 4, 4)).at[..., 0].set(1)
    part = jax.device_get(task.sums({"out": pixels}, {"mask": jnp.zeros((1, 4, 4), jnp.uint8)}))
    many = jax.tree.map(lambda each: np.asarray(each) * (2**24 // 16), part)
    total, _ = jax.tree.map(lambda a, b: a + b, many, part)["confusion"]
    assert total.dtype == np.int32
    assert total[0, 0] == 2**24 + 16


def test_a_mask_of_void_pixels_has_no_loss():
    task = segmentation()
    batch = {"mask": jnp.full((2, 8, 8), VOID, jnp.uint8)}
    assert task.loss({"out": jnp.ones((2, 4, 4, 4))}, batch) == 0


def detections(seed, images=30, found=8, objects=3):
    """Returns random detections near random objects of three classes."""
    generator = np.random.default_rng(seed)
    corners = generator.uniform(0, 40, (images, objects, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(5, 20, corners.shape)], -1)
    classes = generator.integers(0, 4, (images, objects))  # 0: none
    chosen = generator.integers(0, objects, (images, found))
    near = np.take_along_axis(boxes, chosen[..., None], 1)
    near = near + generator.normal(0, 2, near.shape)
    near[..., 2:] = np.maximum(near[..., 2:], near[..., :2] + 1)
    label = np.take_along_axis(classes, chosen, 1)
    label = np.where(
        generator.random(label.shape) < 0.2, generator.integers(1, 4, label.shape), label
    )
    label = np.maximum(label, 1)
    bins = generator.permutation(999)[: images * found].reshape(images, found)
    scores = -np.sort(-bins, 1) / 1000 + 0.0005  # each in a bin of its own
    return boxes, classes, Detections(near, scores, label)


def reference(boxes, classes, found):
    """Average precision by class and threshold, one detection after the other, as COCO does it."""
    result = np.full((4, len(THRESHOLDS)), np.nan)
    for label in range(1, 4):
        objects = (classes == label).sum()
        for column, threshold in enumerate(THRESHOLDS):
            flags = []
            for image in range(len(boxes)):
                free = [b for b, c in zip(boxes[image], classes[image], strict=True) if c == label]
                for box, score, name in zip(
                    found.boxes[image], found.scores[image], found.classes[image], strict=True
                ):
                    if name != label:
                        continue
                    overlaps = [iou(box, other) for other in free]
                    best = int(np.argmax(overlaps)) if overlaps else -1
                    right = best >= 0 and overlaps[best] >= threshold
                    if right:
                        free.pop(best)
                    flags.append((score, right))
            flags.sort(key=lambda pair: -pair[0])
            right = np.cumsum([flag for _, flag in flags])
            precision = right / np.arange(1, len(right) + 1)
            recall = right / objects
            result[label, column] = np.mean(
                [precision[recall >= r - 1e-12].max(initial=0) for r in np.linspace(0, 1, 101)]
            )
    return result


def iou(one, other):
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = np.prod(np.maximum(sides, 0))
    return shared / (np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - shared)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_from_sums_over_batches_is_that_of_all_detections(seed):
    boxes, classes, found = detections(seed)
    parts = [
        jax.jit(count, static_argnums=3)(
            jax.tree.map(lambda a, p=part: jnp.asarray(a[p]), found),
            jnp.asarray(boxes[part], jnp.float32),
            jnp.asarray(classes[part]),
            4,
        )
        for part in (slice(0, 7), slice(7, 30))
    ]
    np.testing.assert_allclose(
        average_precision(added(parts))[1:], reference(boxes, classes, found)[1:], atol=1e-6
    )


def test_perfect_detections_have_the_precision_one_and_none_have_zero():
    boxes, classes, _ = detections(0)
    scores = np.where(classes > 0, 0.9, 0)
    perfect = Detections(*map(jnp.asarray, (boxes, scores, classes)))
    counts = count(perfect, jnp.asarray(boxes), jnp.asarray(classes), 4)
    assert np.allclose(average_precision(counts)[1:], 1)
    nothing = perfect._replace(scores=jnp.zeros_like(perfect.scores))
    counts = count(nothing, jnp.asarray(boxes), jnp.asarray(classes), 4)
    assert np.allclose(average_precision(counts)[1:], 0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("segmentation", {}),
        ("segmentation", {"decoder": "fcn", "auxiliary_weight": 0.5}),
        ("detection", {"channels": 8, "stages": 1}),
    ],
)
def test_dense_tasks_keep_the_contract_of_a_task(name, options):
    assert len(check_task(name, **options)) == 5


def test_scenes_are_always_the_same_and_their_boxes_are_those_of_their_masks():
    digits = digit_splits()["test"]
    made, again = scenes(digits, 20, seed=1), scenes(digits, 12, seed=1)
    assert (made.images[:12] == again.images).all()
    for mask, boxes, classes in zip(
        made.targets["mask"], made.targets["boxes"], made.targets["classes"], strict=True
    ):
        covered = np.zeros_like(mask, bool)
        for box, label in zip(boxes[classes > 0].astype(int), classes[classes > 0], strict=True):
            left, top, right, bottom = box
            inside = mask[top:bottom, left:right] == label
            assert inside.any(0).all() or inside.any(1).all()
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            covered[top:bottom, left:right] |= inside
        assert ((mask > 0) == covered).all()
        assert 1 <= (classes > 0).sum() <= 4


def config(**fields):
    return resolve(override(default_config(), {"model.depth": 8, **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task.name": "segmentation"}, "needs mask for each image, and digits has only label"),
        ({"data.name": "scenes"}, "needs label for each image, and scenes has only mask, boxes"),
        (
            {"task.name": "segmentation", "data.name": "scenes", "data.mixup": 0.2},
            "data.mixup moves or mixes images without their mask",
        ),
        (
            {"task.name": "detection", "data.name": "scenes", "data.trivial_augment": True},
            "data.trivial_augment moves or mixes images without their boxes and classes",
        ),
        (
            {
                "task.name": "segmentation",
                "data.name": "scenes",
                "task.options": {"decoder": "unett"},
            },
            "decoder='unett': there is no such decoder; known: fcn, deeplabv3, unet",
        ),
        (
            {"task.name": "detection", "data.name": "scenes", "task.options": {"stages": 0}},
            "stages=0: must be a whole number from 1 up",
        ),
    ],
)
def test_what_a_dense_task_cannot_use_is_one_line(fields, message):
    with pytest.raises(UserError) as refused:
        trainer_for(config(**fields))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
