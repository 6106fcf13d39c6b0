"""Writes the files beside it, with torch and Keras themselves, which the tests go without.

    KERAS_BACKEND=torch python tests/transfer/files/make.py

They were made with torch 2.15.0, Keras 3.15.1 and h5py 3.16.0. `torch.npz` and `keras.npz` hold
what must be read from the others.
"""

from pathlib import Path

import h5py
import keras
import numpy as np
import torch
from keras import layers
from keras.src.legacy.saving import legacy_h5_format

HERE = Path(__file__).parent


def tensors():
    numbers = torch.linspace(-2, 2, 24).reshape(2, 3, 4)
    return {
        "float32": numbers,
        "float16": numbers.half(),
        "bfloat16": numbers.bfloat16(),
        "float64": numbers.double()[0],
        "int64": torch.tensor(7),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "complex64": torch.tensor([1 + 2j]),
        "transposed": numbers.permute(2, 0, 1),
        "every_other": numbers[1, :, ::2],
        "expanded": torch.ones(3, 1).expand(3, 2),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(numbers[0].clone()),
    }


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 3)
        self.bn = torch.nn.BatchNorm2d(2)


def write_torch():
    all_of_them = tensors()
    torch.save(all_of_them, HERE / "zip.pth")
    torch.save(all_of_them, HERE / "legacy.pth", _use_new_zipfile_serialization=False)
    # The one dtype that storages of their own type do not have.
    torch.save({"w": torch.ones(2), "uint16": torch.arange(3).to(torch.uint16)}, HERE / "v3.pth")
    network = Network()
    torch.save(network, HERE / "whole_model.pth")
    torch.save(network.state_dict(), HERE / "state_dict.pth")  # carries _metadata
    np.savez(
        HERE / "torch.npz",
        **{
            name: (tensor.float() if tensor.is_floating_point() else tensor)
            .detach()
            .contiguous()
            .numpy()
            for name, tensor in all_of_them.items()
        },
    )


def write_keras():
    images = keras.Input((4, 4, 1))
    x = layers.Conv2D(2, 3, name="conv1_conv")(images)
    x = layers.BatchNormalization(name="conv1_bn")(x)
    x = layers.Conv2D(2, 1, name="conv2_conv", use_bias=False)(x)
    model = keras.Model(images, x, name="tiny")
    model.set_weights(
        [
            np.arange(weight.size, dtype=np.float32).reshape(weight.shape) + number
            for number, weight in enumerate(model.get_weights())
        ]
    )
    model.save(HERE / "model.keras")
    model.save_weights(HERE / "keras3.weights.h5")
    with h5py.File(HERE / "keras2.h5", "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
    np.savez(
        HERE / "keras.npz",
        **{
            f"{layer.name}/{weight.name}": weight.numpy()
            for layer in model.layers
            for weight in layer.weights
        },
    )


if __name__ == "__main__":
    write_torch()
    write_keras()
