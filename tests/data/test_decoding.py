"""All kinds of images decode to upright 8-bit RGB or grayscale."""

import contextlib
import io
import struct

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from resjax.data.decoding import as_array, as_image, decode, decoding, open_image, resize
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


def tiff(pixels, bits, photometric=1, kind=1):
    """A grayscale TIFF of one strip: `pixels` as bytes, 16 x 16."""
    tags = {256: 16, 257: 16, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 16}
    tags |= {279: len(pixels), 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(pixels))
    return head + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # sample formats


def twelve_bits():
    first, second = (RAMP.reshape(-1, 2).astype(int) * 4095 // 255).T
    packed = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
    return np.stack(packed, -1).astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    "data",
    [
        tiff(RAMP.astype("<i4").tobytes(), 32, kind=SIGNED),
        tiff(RAMP.astype("<u4").tobytes(), 32),
        tiff((RAMP.astype("<u2") * 257).tobytes(), 16),
        tiff((65535 - RAMP.astype("<u2") * 257).tobytes(), 16, photometric=0),
        tiff((255 - RAMP).tobytes(), 8, photometric=0),
        tiff(twelve_bits(), 12),
        b"P5 16 16 65535\n" + (RAMP.astype(">u2") * 257).tobytes(),
        b"P5 16 16 1023\n" + np.round(RAMP * (1023 / 255)).astype(">u2").tobytes(),
        encoded(Image.fromarray(RAMP), "JPEG2000"),
        encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "JPEG2000"),
    ],
    ids=[
        "int32",
        "uint32",
        "16",
        "16 inverted",
        "8 inverted",
        "12",
        "PGM 16",
        "PGM 10",
        "JP2",
        "JP2 16",
    ],
)
def test_values_are_kept_whatever_the_number_of_bits(data):
    np.testing.assert_array_equal(decode(data, 1, "a.tif")[..., 0], RAMP)


@pytest.mark.parametrize(
    ("pixels", "bits", "kind"),
    [
        ((RAMP.astype("<i4") * 257), 32, SIGNED),
        ((RAMP.astype("<i4") - 1), 32, SIGNED),
        ((RAMP.astype("<i2") * 100), 16, SIGNED),
        (RAMP.astype("<f4") / 255, 32, FLOAT),
    ],
)
def test_values_whose_white_is_unknown_are_refused(pixels, bits, kind):
    with pytest.raises(BadImageError, match=r"^a\.tif: has \w+ pixels from .*convert it to 8 or"):
        decode(tiff(pixels.tobytes(), bits, kind=kind), 1, "a.tif")


def test_lab_colors_are_converted():
    lab = np.zeros((16, 16, 3), np.uint8) + np.uint8([255, 0, 0])  # white; a and b are signed
    data = encoded(Image.frombytes("LAB", (16, 16), lab.tobytes()), "TIFF")
    assert rgb(data).min() >= 250


def test_formats_that_start_other_programs_are_not_images():
    with pytest.raises(BadImageError, match="it is not an image"):
        decode(encoded(COLOR, "EPS"), 3, "a.png")


@pytest.mark.parametrize("error", [RuntimeError, KeyError, ZeroDivisionError, MemoryError])
@pytest.mark.parametrize("lazily", [False, True])
def test_every_exception_of_a_decoder_is_a_bad_image(error, lazily, monkeypatch):
    def load(self):
        raise error("broken\nfile")

    monkeypatch.setattr(JpegImageFile, "load", load)
    with pytest.raises(BadImageError, match=r"^a\.jpg: cannot be decoded: "), decoding("a.jpg"):
        open_image(PHOTO, 3, "a.jpg", lazily=lazily).resize((8, 8))


@pytest.mark.parametrize("kind", ["AVIF", "WEBP", "TIFF", "JPEG2000", "PPM", "BMP"])
def test_damaged_images_of_every_format_are_bad_images(kind):
    generator, data = np.random.default_rng(0), encoded(COLOR, kind)
    for _ in range(60):
        damaged = bytearray(data)
        for position in generator.integers(0, len(data), 4):
            damaged[position] ^= 1 << int(generator.integers(8))
        with contextlib.suppress(BadImageError):
            assert decode(bytes(damaged[: generator.integers(len(data) // 2, len(data))]), 3, "")
