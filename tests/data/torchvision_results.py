"""Writes torchvision_results.npz: what torchvision makes of small images, and draws of its crops.

It needs torch and torchvision, the tests that read the file do not. Run it in its folder.
"""

import itertools
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

FILE = Path(__file__).with_suffix(".npz")
DRAWS = 800
BINS = (0, 7, 15, 16, 30)  # of 31 strengths of TrivialAugment
FACTORS = ((0.6, 1.4, 0.2), (1.3, 0.5, 1.7), (1.0, 1.0, 1.0))  # brightness, contrast, saturation
BOX_SIZES = ((500, 375), (375, 500), (600, 200))
ERASED_IMAGE = (32, 48)
SIZES = (
    *((500, 375), (375, 500), (256, 256), (333, 257)),
    *((100, 60), (257, 300), (511, 256), (90, 41)),
)


def images():
    """Returns a color photograph, a grayscale digit, and an image of one color."""
    photo = load_sample_images().images[1][200:216, 300:316]
    digit = load_digits().images[1][..., None] * 15.9
    even = np.full((5, 6, 3), (10, 100, 200))
    return {"photo": photo, "digit": digit.astype(np.uint8), "even": even.astype(np.uint8)}


def as_tensor(image):
    import torch

    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def as_array(tensor):
    return tensor.numpy().transpose(1, 2, 0)


def trivial_augment():
    from torchvision.transforms import InterpolationMode, autoaugment

    nearest = InterpolationMode.NEAREST
    space = autoaugment.TrivialAugmentWide()._augmentation_space(31)
    found = {
        "strengths": np.array([np.broadcast_to(each.numpy(), 31) for each, _ in space.values()]),
        "signed": np.array([signed for _, signed in space.values()]),
    }
    for (name, image), (operation, (strengths, signed)) in itertools.product(
        images().items(), space.items()
    ):
        chosen = [float(strengths[each]) for each in BINS] if strengths.ndim else [0.0]
        chosen += [-each for each in chosen if signed]
        views = [
            autoaugment._apply_op(as_tensor(image), operation, each, nearest, None)
            for each in chosen
        ]
        found[f"{operation.lower()}, {name}"] = np.stack([as_array(view) for view in views])
    return found


def colors():
    from torchvision.transforms import functional

    changes = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
    )
    for name in ("photo", "digit"):
        results = []
        for order, factors in itertools.product(itertools.permutations(range(3)), FACTORS):
            changed = as_tensor(np.float32(images()[name] / 255))
            for which in order:
                changed = changes[which](changed, factors[which])
            results.append(as_array(changed))
        yield f"colors, {name}", np.stack(results).astype(np.float16)


def draws():
    import torch
    from torchvision import transforms

    torch.manual_seed(0)
    erasing = (0.02, 0.33), (0.3, 3.3), [0.0]
    image = torch.ones(1, *ERASED_IMAGE)
    yield "erased", [transforms.RandomErasing.get_params(image, *erasing)[:4] for _ in range(DRAWS)]
    for size in BOX_SIZES:
        image, bounds = Image.new("L", size), ((0.08, 1.0), (3 / 4, 4 / 3))
        crop = transforms.RandomResizedCrop.get_params
        yield f"boxes, {size}", [crop(image, *bounds) for _ in range(DRAWS)]


def places(width, height):
    """Returns an image whose pixels say where they are."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(
        np.stack([x % 256, y % 256, x // 256 + 16 * (y // 256)], -1).astype("u1")
    )


def corners(crop):
    """Returns (left, top, right) of a crop of `places`; left is beyond right in a mirror image."""
    pixels = np.asarray(crop).astype(int)
    x, y = (
        pixels[..., 0] + 256 * (pixels[..., 2] % 16),
        pixels[..., 1] + 256 * (pixels[..., 2] // 16),
    )
    return x[0, 0], y[0, 0], x[0, -1]


def geometry():
    from torchvision import transforms

    for size in SIZES:
        resized = transforms.Resize(256)(Image.new("L", size)).size
        crops = [transforms.CenterCrop(224)(places(*resized))]
        crops += transforms.TenCrop(224)(places(*resized))
        yield f"crops, {size}", [(*resized, 0), *map(corners, crops)]


def main():
    integers = {name: np.array(values, np.int16) for name, values in (*draws(), *geometry())}
    inputs = {f"image, {name}": image for name, image in images().items()}
    inputs |= {"bins": BINS, "factors": FACTORS, "sizes": SIZES, "box_sizes": BOX_SIZES}
    np.savez_compressed(FILE, **inputs, **trivial_augment(), **dict(colors()), **integers)


if __name__ == "__main__":
    main()
