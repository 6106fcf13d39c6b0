"""Heads that label every pixel: FCN, DeepLabV3 and a U-Net's decoder.

They return logits at the resolution of the features, which the task enlarges to that of the mask.
FCN and DeepLabV3 are those of torchvision's segmentation models, with its names for options.

[L15] Long et al. 2015, arXiv 1411.4038; [R15] Ronneberger et al. 2015, arXiv 1505.04597; [C17] Chen
et al. 2017, arXiv 1706.05587.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from resjax.models.heads import Features

Images = Float[Array, "n h w c"]
Logits = Float[Array, "n h w classes"]


def enlarge(images: Images, size: Sequence[int]) -> Images:
    """Returns images interpolated bilinearly to (height, width), as PyTorch does by default.

    Pixels are areas and not points (`align_corners=False`).
    """
    shape = (images.shape[0], *size, images.shape[-1])
    return jax.image.resize(images, shape, "bilinear", antialias=False)


class SegmentationHead(nn.Module):
    """Applies a decoder to the features and, with `auxiliary`, an FCN to those of the stage before.

    Attributes:
      classes: number of classes, background included.
      decoder: "fcn", "deeplabv3" or "unet".
      auxiliary: whether to add the logits of an FCN on the last stage but one, for a second loss
        (Zhao et al. 2017, arXiv 1612.01105).
      conv, norm, act: the network's own.
    """

    classes: int
    decoder: str = "unet"
    auxiliary: bool = False
    conv: Any = None
    norm: Any = None
    act: Any = None

    @nn.compact
    def __call__(self, features: Features) -> dict[str, Logits]:
        """Returns {"out": logits} and, with `auxiliary`, {"aux": logits}, in float32."""
        bound = {"conv": self.conv, "norm": self.norm, "act": self.act}
        decoder = DECODERS[self.decoder](self.classes, **bound, name="classifier")
        outputs = {"out": decoder(features)}
        if self.auxiliary:
            *before, _ = features.items()
            outputs["aux"] = FCN(self.classes, **bound, name="aux_classifier")(dict(before))
        return {
            name: logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
            for name, logits in outputs.items()
        }


class Decoder(nn.Module):
    """Declares the fields of every decoder."""

    classes: int
    conv: Any
    norm: Any
    act: Any

    def unit(self, x: Images, features: int, kernel: int, **options: Any) -> Images:
        """Returns the images after a convolution, its norm and the activation."""
        return self.act(self.norm()(self.conv(features, kernel, **options)(x)))

    def drop(self, x: Images, rate: float) -> Images:
        """Returns the images with values dropped in training, where there is a key for it."""
        return nn.Dropout(rate, deterministic=not self.has_rng("dropout"))(x)

    def logits(self, x: Images) -> Logits:
        return self.conv(self.classes, 1, use_bias=True, name="logits")(x)


class FCN(Decoder):
    """A 3x3 convolution to a quarter of the channels, dropout, and the classifier [L15]."""

    @nn.compact
    def __call__(self, features: Features) -> Logits:
        *_, last = features.values()
        return self.logits(self.drop(self.unit(last, last.shape[-1] // 4, 3), 0.1))


class DeepLabV3(Decoder):
    """Atrous spatial pyramid pooling [C17] and a 3x3 convolution.

    Attributes:
      rates: dilations of the pyramid's 3x3 convolutions, for features of stride 8.
      channels: of every branch of the pyramid.
    """

    rates: tuple[int, ...] = (12, 24, 36)
    channels: int = 256

    @nn.compact
    def __call__(self, features: Features) -> Logits:
        *_, last = features.values()
        branches = [self.unit(last, self.channels, 1)]
        for rate in self.rates:
            branches.append(self.unit(last, self.channels, 3, kernel_dilation=rate))
        pooled = self.unit(last.mean((1, 2), keepdims=True), self.channels, 1)
        branches.append(jnp.broadcast_to(pooled, branches[0].shape))
        x = self.unit(jnp.concatenate(branches, -1), self.channels, 1)
        return self.logits(self.unit(self.drop(x, 0.5), self.channels, 3))


class UNet(Decoder):
    """Enlarges the features stage by stage, beside those of the earlier stage [R15].

    Attributes:
      least_channels: the least number of channels of a decoder stage, which otherwise has as many
        as the network's stage. A small network's first stage is too narrow to separate many
        classes.
    """

    least_channels: int = 16

    @nn.compact
    def __call__(self, features: Features) -> Logits:
        *earlier, x = [value for name, value in features.items() if name != "stem"]
        for skip in reversed(earlier):
            x = jnp.concatenate([skip, enlarge(x, skip.shape[1:3])], -1)
            x = self.unit(x, max(skip.shape[-1], self.least_channels), 3)
        return self.logits(x)


DECODERS = {"fcn": FCN, "deeplabv3": DeepLabV3, "unet": UNet}
