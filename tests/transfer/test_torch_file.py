"""What torch.save wrote is read exactly, and nothing of it is ever executed."""

import os
import pickle
import struct
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resjax.errors import UserError
from resjax.transfer.files import read_arrays

MAGIC = 0x1950A86A20F9469CFC6C


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_tensors_of_every_type_and_stride_are_those_that_torch_saved(name, foreign, same):
    found = read_arrays(foreign / name)
    same(found.arrays, foreign / "torch.npz")
    assert found.format == "torch"
    assert all(
        array.flags.writeable and array.flags.c_contiguous for array in found.arrays.values()
    )
    assert "its weights are bfloat16; they are held as float32, exactly" in found.notes
    assert "its weights are float64; they are held as float32, rounded" in found.notes


def test_a_module_gives_its_parameters_and_its_counters(foreign):
    arrays = read_arrays(foreign / "state_dict.pth").arrays
    assert arrays["conv.weight"].shape == (2, 1, 3, 3)
    assert arrays["bn.num_batches_tracked"].dtype == np.int64


def test_a_type_without_a_storage_of_its_own_is_read(foreign):
    arrays = read_arrays(foreign / "v3.pth").arrays
    np.testing.assert_array_equal(arrays["uint16"], np.arange(3, dtype=np.uint16))


def test_a_whole_model_is_refused_with_the_mend(foreign):
    with pytest.raises(UserError, match=r"calls __main__.Network; refused.*state_dict") as refused:
        read_arrays(foreign / "whole_model.pth")
    assert "\n" not in str(refused.value)


# Pickles of ours: as torch writes them, but that any value may stand anywhere.
class Global:
    """Pickled as a name that is called with arguments; without any, as the name alone."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments

    def written(self, write):
        module, _, name = self.name.rpartition(".")
        code = f"c{module}\n{name}\n".encode()
        return code + write(self.arguments) + b"R" if self.arguments else code


class Persistent:
    def __init__(self, *identity):
        self.identity = identity


def write(value):
    """A value as opcodes of protocol 2, without the end."""
    match value:
        case Global():
            return value.written(write)
        case Persistent():
            return write(value.identity) + b"Q"
        case dict():
            return b"}(" + b"".join(write(k) + write(v) for k, v in value.items()) + b"u"
        case list():
            return b"](" + b"".join(map(write, value)) + b"e"
        case tuple():
            return b"(" + b"".join(map(write, value)) + b"t"
    return pickle.dumps(value, 2)[2:-1]


def storage(length=6, key="0", kind="torch.FloatStorage"):
    return Persistent("storage", Global(kind), key, "cpu", length)


def tensor(offset=0, size=(2, 3), strides=(3, 1), stored=None):
    place = (stored or storage(), offset, size, strides, False, None)
    return Global("torch._utils._rebuild_tensor_v2", *place)


@pytest.fixture
def save(tmp_path):
    """Writes opcodes as torch's archive, with a storage of six floats."""

    def archive(opcodes, compression=zipfile.ZIP_STORED, **members):
        path = tmp_path / "network.pth"
        members = {"data/0": np.arange(6, dtype="<f4").tobytes(), "byteorder": b"little"} | members
        with zipfile.ZipFile(path, "w", compression) as file:
            file.writestr("network/data.pkl", b"\x80\x02" + opcodes + b".")
            for name, content in members.items():
                file.writestr(f"network/{name}", content)
        return path

    return archive


def test_the_archive_that_these_tests_write_is_read(save):
    arrays = read_arrays(save(write({"weight": tensor()}))).arrays
    np.testing.assert_array_equal(arrays["weight"], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    "called",
    ["os.system", "posix.system", "builtins.eval", "builtins.getattr", "builtins.__import__",
     "subprocess.Popen", "torch.load", "torch.hub.load", "torch.FloatTensor", "numpy.load",
     "collections.OrderedDict.fromkeys", "argparse.Namespace"],
)  # fmt: skip
@pytest.mark.parametrize("legacy", [False, True])
def test_what_a_pickle_calls_is_named_and_not_executed(called, legacy, save, tmp_path, refusal):
    witness = tmp_path / "executed"
    opcodes = write({"weight": tensor(), "run": Global(called, f"touch {witness}")})
    if legacy:
        path = tmp_path / "legacy.pth"
        path.write_bytes(pickle.dumps(MAGIC, 2) + b"\x80\x02" + opcodes + b".")
    else:
        path = save(opcodes)
    assert f"its pickle calls {called}; refused, nothing was executed" in refusal(path)
    assert not witness.exists()


def test_what_reduces_to_a_command_does_not_run(save, tmp_path, refusal):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = pickle.dumps({"weight": Hostile()}, protocol)
        start = 2 if protocol >= 2 else 0
        assert "system; refused" in refusal(save(content[start:-1]))
    assert not (tmp_path / "executed").exists()


def test_a_name_that_is_made_of_texts_is_looked_up_too(save, refusal):
    assert "calls os.system; refused" in refusal(save(write("os") + write("system") + b"\x93"))


@pytest.mark.parametrize(
    "opcodes",
    [
        b"I1\nios\nsystem\n",  # INST
        b"(cos\nsystem\nX\x04\x00\x00\x00trueo",  # OBJ
        b"\x82\x01",  # EXT1
        b"P0\n",  # a persistent id as text
        b"]\x94)R",  # a call of what is no function
        b"ctorch\nfloat32\n)R",
        b"ccollections\nOrderedDict\n)\x81",  # NEWOBJ
        b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f",  # BYTEARRAY8 of 2**63 bytes
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",  # BINBYTES8
        b"\x8b\xff\xff\xff\x7f",  # LONG4
        b"]r\xff\xff\xff\xff",  # LONG_BINPUT, for which CPython makes room up to there
        b"]p99999999999999999999999\n",
        b"h\x09", b"0", b"t", b"R", b"b", b"Q", b"a", b"s", b"u", b"2", b"\x93", b"",
        b"](K\x01e)b",  # attributes of a list
    ],
)  # fmt: skip
def test_opcodes_that_weights_do_not_need_end_in_one_line(opcodes, save, refusal):
    assert "network.pth: " in refusal(save(opcodes))


HUGE = 1 << 62


@pytest.mark.parametrize(
    "hostile",
    [
        tensor(offset=1),
        tensor(offset=-1),
        tensor(offset=HUGE),
        tensor(size=(HUGE, HUGE), strides=(1, 1)),
        tensor(size=(HUGE,), strides=(0,)),
        tensor(size=(1 << 40,), strides=(0,)),
        tensor(size=(-2, -3)),
        tensor(size=(0, 1 << 60)),
        tensor(strides=(-1, 1)),
        tensor(strides=(4, 1)),
        tensor(strides=(1,)),
        tensor(size=(1,) * 65, strides=(1,) * 65),
        tensor(size=("2", "3")),
        tensor(size=[2, 3]),
        tensor(stored="0"),
        tensor(stored=storage(7)),
        tensor(stored=storage(-1)),
        tensor(stored=storage(HUGE)),
        tensor(stored=storage(key="../0")),
        tensor(stored=storage(key="1")),
        tensor(stored=Persistent("module", Global("torch.FloatStorage"), "0", "cpu", 6)),
        tensor(stored=Persistent(Global("torch.float32"), 1)),
        tensor(stored=Persistent("storage", "FloatStorage", "0", "cpu", 6)),
        Global("torch._utils._rebuild_tensor_v2", 1),
        Global("torch._utils._rebuild_tensor_v3", storage(), 0, (2,), (1,), False, None, "x"),
        Global("torch._utils._rebuild_parameter", {}),
        Global("torch.Size", 3),
        Global("collections.OrderedDict", [1, 2]),
        Global("collections.OrderedDict", "ab"),
    ],
)
def test_arguments_out_of_bounds_are_refused(hostile, save, refusal):
    refusal(save(write({"good": tensor(), "weight": hostile})))


def test_a_negative_view_in_the_metadata_alone_is_refused(save, refusal):
    place = (storage(), 0, (2,), (1,), False, None, {"neg": True})
    refusal(save(write({"weight": Global("torch._utils._rebuild_tensor_v2", *place)})))


def test_tensors_that_share_one_storage_cannot_fill_the_memory(save, refusal):
    shared = tensor(size=(1 << 22,), strides=(0,))
    assert "far more memory" in refusal(save(write({str(n): shared for n in range(9)})))


@pytest.mark.parametrize(
    "opcodes",
    [
        pytest.param(b"]" * 3_000_000, id="many"),
        pytest.param(b"]" + b"]a" * 900_000, id="long"),
        pytest.param(b")" + b"\x85" * 1_500_000, id="deep"),
        pytest.param(b"(" * 1_500_000, id="marks"),
        pytest.param(b"}" + b")" + b"2\x86" * 60 + b"K\x01s", id="a key that takes 2**60 steps"),
        pytest.param(b"}(" + b"K\x00" * 200_000 + b"u", id="numbers as keys"),
        pytest.param(b"}q\x00" + b"X\x01\x00\x00\x00xh\x00s" * 99, id="it holds itself"),
        pytest.param(b"N" + b"\x8a\xff" + b"\x7f" * 255, id="a long number"),
    ],
)
def test_endless_and_nested_pickles_end_within_seconds(opcodes, save, refusal):
    path, start = save(opcodes), time.monotonic()
    refusal(path)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("checkpoint", "taken"),
    [
        ({"weight": tensor(), "epoch": 3}, None),
        ({"state_dict": {"weight": tensor()}, "loss": tensor(), "best": tensor()}, "state_dict"),
        ({"model_ema": {"weight": tensor()}, "model": {"weight": tensor()}}, "model"),
        ({"odd": {"weight": tensor()}, "odder": {"a": 1}}, "odd"),
        ({"run": {"model": {"weight": tensor()}}}, "run.model"),
        ({"small": {"b": tensor()}, "large": {"weight": tensor(), "bias": tensor()}}, "large"),
    ],
)
def test_the_state_dict_of_a_checkpoint_is_found_and_told(checkpoint, taken, save):
    found = read_arrays(save(write(checkpoint)))
    assert "weight" in found.arrays
    assert found.notes == ((f"its weights are those under {taken!r}",) if taken else ())


def test_what_wrappers_put_before_the_names_is_taken_off(save):
    names = ("_orig_mod.module.weight", "_orig_mod.module.bias")
    found = read_arrays(save(write(dict.fromkeys(names, tensor()))))
    assert list(found.arrays) == ["weight", "bias"]
    assert len(found.notes) == 2


def test_a_prefix_that_not_all_names_have_stays(save):
    found = read_arrays(save(write({"module.weight": tensor(), "bias": tensor()})))
    assert list(found.arrays) == ["module.weight", "bias"]


@pytest.mark.parametrize("value", [3, "text", [tensor()], {}, {"a": 1}, {1: tensor()}, tensor()])
def test_what_holds_no_tensors_by_name_is_told(value, save, refusal):
    assert "no tensors by name" in (line := refusal(save(write(value)))) or "without a name" in line


def test_compressed_archives_and_other_byte_orders_are_refused(save, refusal):
    good = write({"weight": tensor()})
    assert "is a compressed archive" in refusal(save(good, zipfile.ZIP_DEFLATED))
    assert "big-endian" in refusal(save(good, byteorder=b"big"))
    assert "TorchScript" in refusal(save(good, **{"code/network.py": b""}))


def test_a_storage_that_is_not_whole_is_told(save, refusal):
    good = write({"weight": tensor()})
    assert "storage '0' is not whole" in refusal(save(good, **{"data/0": b"\0" * 20}))


def test_an_ordered_dict_that_python_2_pickled_is_read(save):
    pairs = Global("collections.OrderedDict", [["weight", tensor()]])
    assert list(read_arrays(save(write(pairs))).arrays) == ["weight"]


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_a_file_that_was_cut_anywhere_is_refused(name, foreign, tmp_path, refusal):
    content = (foreign / name).read_bytes()
    path = tmp_path / name
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refusal(path)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "v3.pth"])
@given(data=st.data())
def test_flipped_bytes_give_arrays_or_one_line(name, data, foreign, tmp_path_factory, outcome):
    content = bytearray((foreign / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / f"flipped-{name}"
    path.write_bytes(content)
    assert len(outcome(path)) == 1


@given(opcodes=st.binary(max_size=60))
def test_any_bytes_as_a_pickle_give_one_line_or_arrays(opcodes, tmp_path_factory, refusal):
    path = tmp_path_factory.getbasetemp() / "any.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("any/data.pkl", opcodes)
    refusal(path)


shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)


@given(shape=shapes, steps=st.data(), offset=st.integers(0, 3))
def test_a_view_is_what_numpy_says_it_is(shape, steps, offset, tmp_path_factory):
    strides = tuple(steps.draw(st.integers(0, 4)) for _ in shape)
    content = np.arange(64, dtype="<f4")
    path = tmp_path_factory.getbasetemp() / "view.pth"
    with zipfile.ZipFile(path, "w") as file:
        view = tensor(offset, shape, strides, storage(64))
        file.writestr("v/data.pkl", b"\x80\x02" + write({"w": view}) + b".")
        file.writestr("v/data/0", content.tobytes())
    expected = np.empty(shape, np.float32)
    for index in np.ndindex(shape):
        expected[index] = content[offset + sum(np.multiply(index, strides))]
    np.testing.assert_array_equal(read_arrays(path).arrays["w"], expected)


def legacy(checkpoint, storages, system=None):
    system = system or {"protocol_version": 1001, "little_endian": True}
    head = b"".join(pickle.dumps(value, 2) for value in (MAGIC, 1001, system))
    body = b"\x80\x02" + write(checkpoint) + b"."
    tail = b"".join(struct.pack("<q", len(data) // 4) + data for data in storages.values())
    return head + body + pickle.dumps(list(storages), 2) + tail


def test_the_old_format_of_another_machine_or_without_its_storages_is_refused(tmp_path, refusal):
    stored = Persistent("storage", Global("torch.FloatStorage"), "0", "cpu", 6, None)
    checkpoint, data = {"weight": tensor(stored=stored)}, {"0": b"\0" * 24}
    path = tmp_path / "old.pth"
    path.write_bytes(legacy(checkpoint, data))
    assert list(read_arrays(path).arrays) == ["weight"]
    for broken in (
        legacy(checkpoint, data, {"little_endian": False}),
        legacy(checkpoint, {}),
        legacy(checkpoint, {"1": b"\0" * 24}),
        legacy(checkpoint, {"0": b"\0" * 20}),
        legacy(checkpoint, data)[:-1],
    ):
        path.write_bytes(broken)
        refusal(path)


def test_a_pickle_of_something_else_is_refused(tmp_path, refusal):
    path = tmp_path / "list.pth"
    path.write_bytes(pickle.dumps(OrderedDict(a=np.ones(3))))
    assert "a pickle that torch.save did not write; refused" in refusal(path)
