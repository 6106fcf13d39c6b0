"""No file that a stranger wrote fills memory or time; each is one line, in a process of limits."""

import gzip
import io
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from resjax.data.archives import RELEASES

MEGABYTES = 500  # beyond the imports
SECONDS = 20
ZEROS = bytes(1 << 20)


def require_one_line_each(found):
    for name, each in found.items():
        assert name in each["outcome"].partition(": ")[0], each["outcome"]
        assert "\n" not in each["outcome"], each["outcome"]
        assert each["seconds"] < SECONDS


def npy(shape, dtype="u1", content=b""):
    """An .npy file whose header claims a shape."""
    file = io.BytesIO()
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


def write_zip(path, members, megabytes=0):
    """Writes a zip archive, with zeros at the end of its first member."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members.items():
            with archive.open(name, "w") as member:
                member.write(content)
                for _ in range(megabytes):
                    member.write(ZEROS)
            megabytes = 0


def claim_size(path, size):
    """Lets the entry of a zip archive claim another size."""
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\1\2") + 24
    content[place : place + 4] = struct.pack("<I", size)
    path.write_bytes(content)


def test_no_npz_file_fills_the_memory(tmp_path, read_within):
    images, labels = npy((4, 2, 2), "u1", bytes(16)), npy((4,), "<i8", bytes(32))
    whole = {"images.npy": images, "labels.npy": labels}
    huge = npy((4,), "<i4", np.int32([0, 1, 2, 2**31 - 1]).tobytes())
    write_zip(tmp_path / "zeros.npz", {"images.npy": npy((700, 1024, 1024))}, 700)
    write_zip(tmp_path / "size.npz", {"images.npy": npy((700, 1024, 1024))}, 700)
    claim_size(tmp_path / "size.npz", 1000)
    for name, members in {
        "header": {"images.npy": npy((2**42,)), "labels.npy": labels},
        "negative": {"images.npy": npy((-4, 2, 2)), "labels.npy": labels},
        "overflow": {"images.npy": npy((2**62, 4, 1)), "labels.npy": labels},
        "label": {"images.npy": images, "labels.npy": huge},
        "names": {**whole, "class_names.npy": npy((10**12,), "<U1")},
        "scalar": {**whole, "class_names.npy": npy((), "<i8", ZEROS[:8])},
    }.items():
        write_zip(tmp_path / f"{name}.npz", members)
    paths = sorted(tmp_path.iterdir())
    found = read_within("resjax.data.user_data:open_npz", paths, MEGABYTES)
    assert len(found) == 8
    require_one_line_each(found)


def test_no_file_of_features_fills_the_memory(tmp_path, read_within):
    write_zip(tmp_path / "f.npz", {"features.npy": npy((700, 1 << 18), "<f4")}, 700)
    once = pa.array([1.5], pa.float32())
    table = pa.table({"x": pa.DictionaryArray.from_arrays(np.zeros(10**8, np.int8), once)})
    parquet.write_table(table, tmp_path / "f.parquet", row_group_size=10**8)
    paths = sorted(tmp_path.iterdir())
    found = read_within("resjax.inference.features:load_features", paths, MEGABYTES)
    require_one_line_each(found)
    assert all(
        "would fill more than 16 times its size" in each["outcome"] for each in found.values()
    )


def deflated(content):
    """A part of a deflate stream that may be repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH)


def gzip_bomb(first=b""):
    """A gzip file of 3 GB of zeros, after `first`."""
    header = b"\x1f\x8b\x08" + bytes(6) + b"\xff"
    return header + deflated(first) + 3000 * deflated(ZEROS) + bytes(8)


def tar_header(name, size, **fields):
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def test_no_archive_fills_the_memory(tmp_path, read_within):
    tar = "cifar-10-binary.tar.gz"
    member = next(iter(RELEASES["cifar10"][0].archives.values()))
    name = next(iter(member))
    link = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
    contents = {
        "cifar10-zeros": {tar: gzip_bomb(tar_header(name, 3 << 30))},
        "cifar10-other": {tar: gzip_bomb(tar_header("other", 3 << 30))},
        "cifar10-pax": {tar: gzip_bomb(tar_header("pax", 3 << 30, type=tarfile.XHDTYPE))},
        "cifar10-claim": {tar: gzip.compress(tar_header(name, 1 << 40))},
        "cifar10-link": {tar: gzip.compress(tar_header(name, 0, **link))},
        "mnist-zeros": {
            url.rpartition("/")[2]: gzip_bomb() for url in RELEASES["mnist"][0].archives
        },
    }
    for folder, archives in contents.items():
        (tmp_path / folder).mkdir()
        for archive, content in archives.items():
            (tmp_path / folder / archive).write_bytes(content)
    folders = sorted(tmp_path.iterdir())
    found = read_within("data_readers:read_folder_of_archives", folders, MEGABYTES)
    assert len(found) == 6
    require_one_line_each(found)
