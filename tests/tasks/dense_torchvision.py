"""Writes dense_torchvision.npz: what torchvision gives for the cases of dense_cases.py.

It needs torchvision, the test that reads the file does not: `python dense_torchvision.py`.
"""

from pathlib import Path

import numpy as np
import torch
from dense_cases import (
    CASES,
    CLASSES,
    DETECTION_SIZE,
    MOMENTUM,
    RATES,
    SEGMENTATION_IMAGES,
    SEGMENTATION_SIZE,
    STEPS,
    images,
    masks,
    objects,
    parameter,
)
from torch.nn import functional
from torchvision import ops
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead, _default_anchorgen
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

FILE = Path(__file__).with_suffix(".npz")


def segmentation_network(decoder, auxiliary):
    """Builds torchvision's network of a decoder on a ResNet-14."""
    body = ResNet(
        Bottleneck, [1, 1, 1, 1], replace_stride_with_dilation=[False, True, True], num_classes=1
    )
    layers = {"layer4": "out"} | ({"layer3": "aux"} if auxiliary else {})
    backbone = IntermediateLayerGetter(body, layers)
    head, kind = {"fcn": (FCNHead, FCN), "deeplabv3": (DeepLabHead, DeepLabV3)}[decoder]
    return kind(backbone, head(2048, CLASSES), FCNHead(1024, CLASSES) if auxiliary else None)


def retinanet(second):
    """Builds torchvision's RetinaNet, of either version, on a ResNet-14."""
    body = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=1)
    extra = LastLevelP6P7(2048 if second else 256, 256)
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    backbone = BackboneWithFPN(body, layers, [512, 1024, 2048], 256, extra_blocks=extra)
    if not second:
        return RetinaNet(backbone, CLASSES)
    anchors = _default_anchorgen()
    head = RetinaNetHead(
        256,
        anchors.num_anchors_per_location()[0],
        CLASSES,
        norm_layer=lambda channels: torch.nn.GroupNorm(32, channels),
    )
    head.regression_head._loss_type = "giou"
    return RetinaNet(backbone, CLASSES, anchor_generator=anchors, head=head)


def fill(model):
    """Sets the parameters, and turns dropout off."""
    state = model.state_dict()
    model.load_state_dict(
        {name: torch.tensor(parameter(name, tuple(old.shape))) for name, old in state.items()}
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def segmentation_loss(model, auxiliary_weight):
    batch = torch.tensor(images(SEGMENTATION_SIZE, SEGMENTATION_IMAGES)).permute(0, 3, 1, 2)
    target = torch.tensor(masks().astype(np.int64))

    def loss():
        outputs = model(batch)
        losses = {
            name: functional.cross_entropy(logits, target, ignore_index=255)
            for name, logits in outputs.items()
        }
        return losses["out"] + auxiliary_weight * losses.get("aux", 0), outputs["out"]

    return loss


def detection_loss(model):
    batch = torch.tensor(images(DETECTION_SIZE, 2)).permute(0, 3, 1, 2)
    boxes, classes = objects()
    targets = [
        {"boxes": torch.tensor(b[c > 0]), "labels": torch.tensor(c[c > 0].astype(np.int64))}
        for b, c in zip(boxes, classes, strict=True)
    ]

    def loss():
        features = list(model.backbone(batch).values())
        outputs = model.head(features)
        anchors = model.anchor_generator(ImageList(batch, [DETECTION_SIZE] * 2), features)
        losses = model.compute_loss(targets, outputs, anchors)
        return sum(losses.values()), outputs["cls_logits"]

    return loss


def training(case):
    """Returns the losses of the first steps, and the outputs before them in evaluation mode."""
    task, _ = CASES[case]
    if task["name"] == "segmentation":
        weight = task["options"].get("auxiliary_weight", 0)
        model = fill(segmentation_network(task["options"]["decoder"], weight > 0))
        loss = segmentation_loss(model, weight)
    else:
        model = fill(retinanet(case == "retinanet_v2"))
        loss = detection_loss(model)
    model.eval()
    with torch.no_grad():
        outputs = loss()[1].numpy()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), RATES[task["name"]], MOMENTUM)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss()[0]
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return {f"{case}_losses": np.array(losses), f"{case}_outputs": outputs[:, :, ::7]}


def operators():
    """Returns inputs and outputs of torchvision's operators on boxes, edge cases among them."""
    generator = np.random.default_rng(0)

    def boxes(count, side):
        corners = np.sort(generator.uniform(0, side, (count, 2, 2)), 1).reshape(count, 4)
        return np.add(corners, (0, 0, 1, 1)).astype(np.float32)

    found = {}
    sizes = tuple((size, int(size * 2 ** (1 / 3))) for size in (32, 64))
    features = [torch.zeros(1, 1, *grid) for grid in ((13, 7), (7, 4))]
    generated = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 2)(
        ImageList(torch.zeros(1, 3, 101, 53), [(101, 53)]), features
    )
    found |= {"anchors": generated[0].numpy()}
    some, others = boxes(7, 300), boxes(300, 300)
    others[:3] = some[:3]  # equal boxes
    some[6] = some[5]  # two objects in one place
    overlaps = ops.box_iou(torch.tensor(some), torch.tensor(others))
    found |= {"some": some, "others": others, "overlaps": overlaps.numpy()}
    matched = Matcher(0.5, 0.4, allow_low_quality_matches=True)(overlaps)
    found |= {"matched": matched.numpy()}
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    deltas = generator.normal(0, 3, (300, 4)).astype(np.float32)
    found |= {
        "encoded": coder.encode_single(torch.tensor(some), torch.tensor(others[:7])).numpy(),
        "deltas": deltas,
        "decoded": coder.decode_single(torch.tensor(deltas), torch.tensor(others)).numpy(),
    }
    logits = generator.normal(size=(300, CLASSES)).astype(np.float32)
    labels = generator.integers(1, CLASSES, 7)
    target = torch.zeros(300, CLASSES)
    target[matched >= 0, torch.tensor(labels)[matched[matched >= 0]]] = 1
    counted = matched != Matcher.BETWEEN_THRESHOLDS
    focal = ops.sigmoid_focal_loss(torch.tensor(logits)[counted], target[counted], reduction="sum")
    found |= {"logits": logits, "labels": labels, "focal": focal.numpy()}
    pair = torch.tensor(boxes(50, 60)), torch.tensor(boxes(50, 60))
    found |= {
        "giou_pair": torch.stack(pair).numpy(),
        "giou": ops.generalized_box_iou_loss(*pair).numpy(),
    }
    crowded = boxes(200, 60)
    crowded[100:110] = crowded[0]  # all overlapping
    classes = generator.integers(0, 4, 200)
    scores = generator.permutation(200).astype(np.float32)
    kept = ops.batched_nms(torch.tensor(crowded), torch.tensor(scores), torch.tensor(classes), 0.5)
    found |= {"crowded": crowded, "crowded_classes": classes, "crowded_scores": scores}
    return found | {"kept": kept.numpy()}


def postprocessing():
    """Returns outputs of a head, and the detections that torchvision makes of them."""
    model = fill(retinanet(second=False)).eval()
    generator = torch.Generator().manual_seed(3)
    batch = torch.zeros(1, 3, *DETECTION_SIZE)
    features = list(model.backbone(batch).values())
    anchors = model.anchor_generator(ImageList(batch, [DETECTION_SIZE]), features)
    counts = [level.shape[2] * level.shape[3] * 9 for level in features]
    logits = torch.randn(1, sum(counts), CLASSES, generator=generator) * 2 - 3
    deltas = torch.randn(1, sum(counts), 4, generator=generator) * 0.5
    outputs = {
        "cls_logits": list(logits.split(counts, 1)),
        "bbox_regression": list(deltas.split(counts, 1)),
    }
    levels = [list(anchors[0].split(counts))]
    detections = model.postprocess_detections(outputs, levels, [DETECTION_SIZE])[0]
    return {
        "grids": np.array([level.shape[2:] for level in features]),
        "head_logits": logits[0].numpy(),
        "head_deltas": deltas[0].numpy(),
        **{f"detected_{name}": value.numpy() for name, value in detections.items()},
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    results = operators() | postprocessing()
    for case in CASES:
        results |= training(case)
    np.savez_compressed(FILE, **results)
