"""All kinds of images decode to upright 8-bit RGB or grayscale."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from resjax.data.decoding import as_array, as_image, decode, resize
from resjax.data.examples import BadImageError

GRADIENT = np.linspace(0, 255, 24 * 16 * 3).reshape(24, 16, 3).astype(np.uint8)  # upright: 24 high


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rgb(data):
    return decode(data, 3, "a.png").astype(int)


GRAY = Image.fromarray(GRADIENT[..., 0])
COLOR = Image.fromarray(GRADIENT)


def test_rgb_is_unchanged():
    np.testing.assert_array_equal(rgb(encoded(COLOR)), GRADIENT)


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grayscale_becomes_rgb_with_three_equal_channels(mode):
    pixels = rgb(encoded(GRAY.convert(mode)))
    np.testing.assert_array_equal(pixels, np.repeat(GRADIENT[..., :1], 3, -1))


def test_grayscale_stays_one_channel_in_a_grayscale_dataset():
    pixels = decode(encoded(GRAY), 1, "a.png")
    assert (pixels.shape, pixels.dtype) == ((24, 16, 1), np.uint8)
    np.testing.assert_array_equal(pixels[..., 0], GRADIENT[..., 0])


def test_rgb_becomes_grayscale_in_a_grayscale_dataset():
    np.testing.assert_array_equal(decode(encoded(COLOR), 1, "")[..., 0], COLOR.convert("L"))


def test_sixteen_bits_are_scaled_and_not_clipped():
    deep = GRADIENT[..., 0].astype(np.uint16) * 257
    data = encoded(Image.fromarray(deep))
    np.testing.assert_array_equal(decode(data, 1, "")[..., 0], GRADIENT[..., 0])
    np.testing.assert_array_equal(rgb(data), np.repeat(GRADIENT[..., :1], 3, -1))


def test_a_bitmap_is_black_and_white():
    assert set(np.unique(rgb(encoded(GRAY.convert("1"))))) == {0, 255}


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(8))])
def test_a_palette_is_looked_up(transparency):
    palette = COLOR.quantize(8)
    options = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(rgb(encoded(palette, **options)), palette.convert("RGB"))


def test_alpha_is_dropped():
    image = COLOR.copy()
    image.putalpha(GRAY)
    np.testing.assert_array_equal(rgb(encoded(image)), GRADIENT)


def test_cmyk_becomes_rgb():
    data = encoded(COLOR.convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(rgb(data) - GRADIENT).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    stored = {  # how a camera stores the upright image
        1: lambda upright: upright,
        2: lambda upright: upright[:, ::-1],
        3: lambda upright: upright[::-1, ::-1],
        4: lambda upright: upright[::-1],
        5: lambda upright: upright.swapaxes(0, 1),
        6: lambda upright: np.rot90(upright),
        7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
        8: lambda upright: np.rot90(upright, -1),
    }[orientation](GRADIENT)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(rgb(data), GRADIENT)


PHOTO = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<!DOCTYPE html><title>404 Not Found</title>",
        PHOTO[: len(PHOTO) // 2],
        encoded(COLOR)[:-40],
        encoded(Image.fromarray(GRADIENT[..., 0].astype(np.float32)), "TIFF"),
    ],
    ids=["empty", "web page", "half a JPEG", "cut PNG", "floats"],
)
def test_an_image_that_cannot_be_decoded_is_an_error_with_its_origin(data):
    with pytest.raises(BadImageError, match=r"^cats/17\.jpg: ") as refused:
        decode(data, 3, "cats/17.jpg")
    assert "\n" not in str(refused.value)
    assert " object at " not in str(refused.value)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # unknown tags
def test_flipped_bits_raise_no_other_error():
    generator = np.random.default_rng(0)
    for data in (PHOTO, encoded(COLOR), encoded(GRAY, "TIFF"), encoded(COLOR, "GIF")):
        for position in generator.integers(0, min(len(data), 600), 150):
            damaged = bytearray(data)
            damaged[position] ^= 1 << int(generator.integers(8))
            with contextlib.suppress(BadImageError):
                assert decode(bytes(damaged), 3, "").dtype == np.uint8


def test_resizing_crops_the_center_of_the_longer_side():
    image = as_image(np.repeat(np.arange(60, dtype=np.uint8)[:, None, None], 20, 1))
    pixels = as_array(resize(image, 20))
    assert pixels.shape == (20, 20, 1)
    np.testing.assert_array_equal(pixels[:, 0, 0], np.arange(20, 40))
