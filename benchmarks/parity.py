"""Parity: are imported networks the originals, to the last bits of float32?

    python benchmarks/parity.py measure
    python benchmarks/parity.py report

`measure` takes torchvision, timm, Hugging Face's transformers and Keras (on JAX), as many as are
installed. It builds their networks, fills them with random weights and BN statistics, saves them as
each library saves, and imports the files. Compared are the logits and the features of every stage,
of an even and an odd image size and of batches of two and one, and the gradients of a loss with
respect to every weight, in float64 (Keras: float32), for in float32 the sign of what goes into a
ReLU may be chance, and a gradient is then off by parts in a hundred. Differences are the largest,
relative to the largest of the original. What the original itself differs by between float32 and
float64 stands beside.

Every original's names, shapes and a sample of what it puts out go to benchmarks/results/parity/,
and the tests hold the importer to them where no original is installed. `report` makes
docs/parity.md.
"""

import importlib
import json
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from reporting import DOCS, RESULTS, command_line, machine, provenance, regular_expression, table

from resjax.disk import write_atomically
from resjax.transfer.importing import import_weights
from resjax.transfer.naming import translate
from resjax.transfer.weights import Weights, flatten

os.environ["KERAS_BACKEND"] = "jax"  # without it Keras asks for TensorFlow

PARITY = RESULTS / "parity"
SHAPES = ((2, 64, 64, 3), (1, 65, 97, 3))  # of images: n, h, w, c
SAMPLED = 64  # values of an output that a result keeps

Arrays = dict[str, np.ndarray]


def images(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape, np.float32)


def filled(name: str, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
    """An array of random weights: the same for a name and shape, wherever it is drawn.

    Scales are so small that a deep network's values do not grow out of all proportion, and gates
    do not saturate: float32 itself would differ from float64 then.
    """
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) > 1:
        gate = 0.1 if re.search(r"\.se\.|\.fc\d", name) else 1.0
        return generator.normal(0, gate * (2 / fan_in) ** 0.5, shape).astype(np.float32)
    if re.search(r"var(iance)?$", name):
        return generator.uniform(0.5, 1.5, shape).astype(np.float32)
    if re.search(r"(weight|gamma)$", name):
        return generator.uniform(0.5, 1.0, shape).astype(np.float32)
    return generator.normal(0, 0.1, shape).astype(np.float32)


def fill(shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Random weights under the names that PyTorch has for them, kernels (out, in, h, w)."""
    return {
        name: np.zeros(shape, np.int64)
        if name.endswith("num_batches_tracked")
        else filled(name, tuple(shape), int(np.prod(shape[1:])))
        for name, shape in shapes.items()
    }


class Original(NamedTuple):
    """A network of another library, with random weights.

    Attributes:
      arrays: its weights by their names.
      save: writes them to a folder as the library does, and gives the path.
      outputs: logits and features of images (n, h, w, c), channels last, in float32 or float64.
      gradients: of a loss with respect to the weights, by their names.
      precision: of the gradients.
    """

    arrays: Arrays
    save: Callable[[Path], Path]
    outputs: Callable[[np.ndarray, str], Arrays]
    gradients: Callable[[np.ndarray], Arrays]
    precision: str = "float64"


def weighting(classes: int) -> np.ndarray:
    """The loss is the sum of logits times these."""
    return np.random.default_rng(classes).standard_normal(classes, np.float32)


def of_torch(
    model: Any, stages: Mapping[str, str], save: Callable[[Any, Path], Path], logits: Any = None
) -> Original:
    """An original in PyTorch.

    Args:
      model: a module.
      stages: its modules that put out what our stages do.
      save: writes the module to a folder.
      logits: takes them from what the module returns.
    """
    import torch

    arrays = fill({name: value.shape for name, value in model.state_dict().items()})
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    model.eval()
    logits = logits or (lambda returned: returned)

    def outputs(given: np.ndarray, dtype: str = "float32") -> Arrays:
        found: Arrays = {}

        def keep(ours: str) -> Callable[..., None]:
            def hook(_: Any, __: Any, output: Any) -> None:
                found[ours] = output.permute(0, 2, 3, 1).numpy()

            return hook

        hooks = [
            model.get_submodule(theirs).register_forward_hook(keep(ours))
            for ours, theirs in stages.items()
        ]
        model.to(getattr(torch, dtype))
        with torch.no_grad():
            x = torch.from_numpy(given.transpose(0, 3, 1, 2).astype(dtype))
            found["logits"] = logits(model(x)).numpy()
        model.to(torch.float32)
        for hook in hooks:
            hook.remove()
        return found

    def gradients(given: np.ndarray) -> Arrays:
        model.to(torch.float64).zero_grad()
        returned = logits(model(torch.from_numpy(given.transpose(0, 3, 1, 2).astype("float64"))))
        (returned * torch.from_numpy(weighting(returned.shape[-1]))).sum().backward()
        found = {name: value.grad.numpy() for name, value in model.named_parameters()}
        model.to(torch.float32)
        return found

    return Original(arrays, lambda folder: save(model, folder), outputs, gradients)


LAYERS = {"stem": "maxpool", **{f"stage{n}": f"layer{n}" for n in range(1, 5)}}


def torchvision(name: str) -> Original:
    import torch
    from torchvision import models

    def save(model: Any, folder: Path) -> Path:
        torch.save(model.state_dict(), folder / f"{name}.pth")
        return folder / f"{name}.pth"

    return of_torch(getattr(models, name)(), LAYERS, save)


def timm(name: str) -> Original:
    import timm as library
    from safetensors.torch import save_file

    def save(model: Any, folder: Path) -> Path:
        save_file(model.state_dict(), folder / "model.safetensors")
        return folder / "model.safetensors"

    stages = LAYERS
    if name.startswith("resnetv2"):  # the last stage counts as activated, as in our networks
        stages = {"stem": "stem", **{f"stage{n + 1}": f"stages.{n}" for n in range(3)}}
        stages["stage4"] = "norm"
    return of_torch(library.create_model(name), stages, save)


def bit(name: str) -> Original:
    """timm's BiT, saved under the names of BiT's own files, which timm reads too."""
    original = timm(name)

    def save(folder: Path) -> Path:
        named: dict[str, Any] = dict(_bit_names(original.arrays))
        np.savez(folder / "BiT.npz", **named)
        return folder / "BiT.npz"

    return original._replace(save=save)


def _bit_names(arrays: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    """As `timm.models.resnetv2._load_weights` has them, from the inside out."""
    ends = {"weight": "gamma", "bias": "beta"}
    for name, array in arrays.items():
        if match := re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(conv|norm)(\d)\.(\w+)", name):
            place = f"resnet/block{int(match[1]) + 1}/unit{int(match[2]) + 1:02d}"
            letter = "abc"[int(match[4]) - 1]
            if match[3] == "norm":
                yield f"{place}/{letter}/group_norm/{ends[match[5]]}", array
            else:
                kernel = array.transpose(2, 3, 1, 0)
                yield f"{place}/{letter}/standardized_conv2d/kernel", kernel
        elif match := re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.downsample\.conv\.weight", name):
            place = f"resnet/block{int(match[1]) + 1}/unit{int(match[2]) + 1:02d}"
            yield f"{place}/a/proj/standardized_conv2d/kernel", array.transpose(2, 3, 1, 0)
        elif name == "stem.conv.weight":
            yield "resnet/root_block/standardized_conv2d/kernel", array.transpose(2, 3, 1, 0)
        elif match := re.fullmatch(r"norm\.(\w+)", name):
            yield f"resnet/group_norm/{ends[match[1]]}", array
        elif name == "head.fc.weight":
            yield "resnet/head/conv2d/kernel", array.transpose(2, 3, 1, 0)
        elif name == "head.fc.bias":
            yield "resnet/head/conv2d/bias", array


def hugging_face(layer_type: str, **fields: Any) -> Original:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(layer_type=layer_type, num_labels=1000, **fields)
    stages = {"stem": "resnet.embedder"}
    stages |= {f"stage{n + 1}": f"resnet.encoder.stages.{n}" for n in range(4)}

    def save(model: Any, folder: Path) -> Path:
        model.save_pretrained(folder)
        return folder

    model = ResNetForImageClassification(config)
    return of_torch(model, stages, save, lambda returned: returned.logits)


def keras(name: str) -> Original:
    import keras as library

    @lru_cache
    def made(shape: tuple[int, ...]) -> Any:
        """A model is of one size of images."""
        model = getattr(library.applications, name)(
            weights=None, input_shape=shape, classifier_activation=None
        )
        for weight in model.weights:
            weight.assign(filled(weight.path, weight.shape, int(np.prod(weight.shape[:-1]))))
        return model

    model = made((64, 64, 3))
    arrays = {weight.path: np.asarray(weight) for weight in model.weights}
    ends = ("pool1_pool", "conv2_block3_out", "conv3_block4_out", "conv4_block6_out")
    layers = [*ends, "conv5_block3_out", "predictions"]
    names = ["stem", *(f"stage{n}" for n in range(1, 5)), "logits"]

    def save(folder: Path) -> Path:
        model.save(folder / "model.keras")
        return folder / "model.keras"

    def outputs(given: np.ndarray, dtype: str = "float32") -> Arrays:
        sized = made(given.shape[1:])
        inner = library.Model(sized.input, [sized.get_layer(layer).output for layer in layers])
        found = inner(given[..., ::-1], training=False)  # its images are BGR
        return dict(zip(names, map(np.asarray, found), strict=True))

    def gradients(given: np.ndarray) -> Arrays:
        fixed = [variable.value for variable in model.non_trainable_variables]

        def loss(weights: Any) -> Any:
            logits, _ = model.stateless_call(weights, fixed, given[..., ::-1], training=False)
            return (logits * weighting(logits.shape[-1])).sum()

        found = jax.grad(loss)([variable.value for variable in model.trainable_variables])
        paths = [variable.path for variable in model.trainable_variables]
        return dict(zip(paths, map(np.asarray, found), strict=True))

    return Original(arrays, save, outputs, gradients, "float32")


BASIC = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
ORIGINALS: dict[str, tuple[str, Callable[[], Original]]] = {
    **{
        name: ("torchvision", partial(torchvision, name))
        for name in (
            *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
            *("resnext50_32x4d", "wide_resnet50_2"),
        )
    },
    "resnet50d": ("timm", lambda: timm("resnet50d")),
    "seresnet50": ("timm", lambda: timm("seresnet50")),
    "resnetv2_50": ("timm", lambda: timm("resnetv2_50")),
    "resnetv2_50x1_bit": ("timm", lambda: timm("resnetv2_50x1_bit")),
    "BiT-R50x1.npz": ("timm", lambda: bit("resnetv2_50x1_bit")),
    "ResNet-18, Hugging Face": ("transformers", lambda: hugging_face("basic", **BASIC)),
    "ResNet-50, Hugging Face": ("transformers", lambda: hugging_face("bottleneck")),
    "ResNet-50 v1, Hugging Face": (
        "transformers",
        lambda: hugging_face("bottleneck", downsample_in_bottleneck=True),
    ),
    "ResNet50, Keras": ("keras", lambda: keras("ResNet50")),
}


def measure(names: list[str]) -> None:
    """Compares one original after the other, and writes a result for each."""
    PARITY.mkdir(parents=True, exist_ok=True)
    for name in names:
        package, make = ORIGINALS[name]
        try:
            importlib.import_module(package)
        except ModuleNotFoundError:
            print(f"{name}: left out, {package} is not installed")
            continue
        result = {"name": name, "package": f"{package} {metadata.version(package)}"}
        result |= compare(make()) | {"provenance": provenance()}
        print(name, json.dumps(result["differences"], indent=1), flush=True)
        file = re.sub(r"\W+", "_", name).strip("_").lower()
        write_atomically(PARITY / f"{file}.json", json.dumps(result) + "\n")


def compare(original: Original) -> dict[str, Any]:
    """One original's record."""
    with tempfile.TemporaryDirectory() as folder:
        path = original.save(Path(folder))
        weights = import_weights(str(path))
        config = path / "config.json"
        beside = json.loads(config.read_text()) if config.is_file() else None
    differences: dict[str, Any] = {}
    samples = {}
    for shape in SHAPES:
        given = images(shape)
        theirs, ours = original.outputs(given, "float32"), outputs(weights, given)
        precise = original.outputs(given, "float64")
        size = "x".join(map(str, shape[:3]))
        differences[size] = {
            name: [largest(ours[name], theirs[name]), largest(theirs[name], precise[name])]
            for name in theirs
        }
        samples[size] = {name: sample(array) for name, array in theirs.items()}
    found = gradients(weights, images(SHAPES[0]), original.precision)
    expected = original.gradients(images(SHAPES[0]))
    renamed = translate({**original.arrays, **expected})
    assert renamed
    differences["gradients"] = max(
        largest(array, renamed.arrays[f"params/{path}"]) for path, array in found.items()
    )
    return {
        "differences": differences,
        "names": {name: array.shape for name, array in original.arrays.items()},
        "config": beside,
        "outputs": samples,
    }


def outputs(weights: Weights, given: np.ndarray) -> Arrays:
    """Logits and features of our network."""
    network = weights.network(loop="unroll")

    @jax.jit
    def forward(variables: Any, x: jax.Array) -> dict[str, jax.Array]:
        features = network.apply(variables, x, method="features")
        return {**features, "logits": network.apply(variables, x)}

    found = forward(weights.variables, given)
    return {name: np.asarray(value) for name, value in found.items()}


def gradients(weights: Weights, given: np.ndarray, precision: str) -> Arrays:
    """Of the same loss with respect to our weights."""
    network = weights.network(loop="unroll", dtype=precision)

    def loss(params: Any) -> jax.Array:
        logits = network.apply({**variables, "params": params}, given)
        return (logits * jnp.asarray(weighting(logits.shape[-1]))).sum()

    with jax.enable_x64(precision == "float64"):
        variables = jax.tree.map(lambda leaf: leaf.astype(precision), weights.variables)
        return flatten(jax.jit(jax.grad(loss))(variables["params"]))


def largest(these: np.ndarray, those: np.ndarray) -> float:
    """The largest difference, relative to the largest of `those`."""
    return float(np.abs(these - those).max() / np.abs(those).max())


def sample(array: np.ndarray) -> list[float]:
    """Values of an array, evenly spread, and at last the largest magnitude."""
    spread = np.linspace(0, array.size - 1, SAMPLED).astype(int)
    return [*map(float, array.reshape(-1)[spread]), float(np.abs(array).max())]


PREAMBLE = """\
# Parity with the originals

Made by `python benchmarks/parity.py report` from benchmarks/results/parity/; the script says what
is compared and how. A difference is the largest over all values, relative to the largest value of
the original, on two images of 64 x 64 pixels and one of 65 x 97. Features are those of the stage
that differs most, gradients those of the array that differs most. The columns "original" show how
much the original in float32 differs from itself in float64, which no copy can be expected to
undercut. Gradients are compared in float64, those of Keras in float32.
"""
HEADS = ("original", "version", "logits", "original", "features", "original", "gradients")


def report() -> None:
    """Writes docs/parity.md."""
    records = [json.loads(path.read_text()) for path in PARITY.glob("*.json")]
    records.sort(key=lambda record: list(ORIGINALS).index(record["name"]))
    from_where = records[0]["provenance"]
    page = [PREAMBLE, table(HEADS, map(cells, records)), ""]
    commits = ", ".join(sorted({record["provenance"]["commit"][:7] for record in records}))
    page.append(f"{machine(from_where)}; commit {commits}, {from_where['start'][:10]}.\n")
    write_atomically(DOCS / "parity.md", "\n".join(page))


def cells(record: dict[str, Any]) -> list[str]:
    """A record's row below `HEADS`."""
    sizes = [value for key, value in record["differences"].items() if key != "gradients"]

    def worst(of: Callable[[str], bool]) -> list[str]:
        pairs = [pair for size in sizes for name, pair in size.items() if of(name)]
        # Keras computes in float32 alone.
        return [f"{max(column):.1e}" if any(column) else "" for column in zip(*pairs, strict=True)]

    return [
        *(record["name"], record["package"], *worst(lambda name: name == "logits")),
        *(*worst(lambda name: name != "logits"), f"{record['differences']['gradients']:.1e}"),
    ]


def main() -> None:
    parser, measuring = command_line(__doc__)
    measuring.add_argument(
        "--only", type=regular_expression, default="", help="regular expression of the originals"
    )
    asked = parser.parse_args()
    if asked.command == "report":
        report()
        return
    if not (chosen := [name for name in ORIGINALS if asked.only.search(name)]):
        parser.error(f"--only={asked.only.pattern} matches none of: {'; '.join(ORIGINALS)}")
    measure(chosen)


if __name__ == "__main__":
    main()
