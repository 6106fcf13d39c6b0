"""What torch.save wrote is read exactly, and nothing of it is ever executed."""

import argparse
import copyreg
import os
import pickle
import pickletools
import re
import struct
import time
import zipfile
from collections import Counter, OrderedDict, defaultdict
from datetime import UTC, datetime
from pathlib import Path

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
    assert "bfloat16 weights were converted to float32, exactly" in found.notes
    assert "float64 weights were converted to float32, with rounding" in found.notes


def test_a_module_state_dict_holds_parameters_and_counters(foreign):
    arrays = read_arrays(foreign / "state_dict.pth").arrays
    assert arrays["conv.weight"].shape == (2, 1, 3, 3)
    assert arrays["bn.num_batches_tracked"].dtype == np.int64


def test_a_dtype_without_a_storage_class_is_read(foreign):
    arrays = read_arrays(foreign / "v3.pth").arrays
    np.testing.assert_array_equal(arrays["uint16"], np.arange(3, dtype=np.uint16))


def test_a_whole_model_is_refused_with_the_remedy(foreign, refusal):
    line = refusal(foreign / "whole_model.pth")
    assert re.search(r"no tensors by name but objects of __main__.Network.*model.state_dict", line)


# Pickles of ours: as torch writes them, but that any value may stand anywhere.
class Global:
    """Pickled as a name that is called with arguments; without any, as the name alone."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments

    def written(self, write):
        module, _, name = self.name.rpartition(".")
        code = f"c{module}\n{name}\n".encode()
        return code + write(self.arguments) + b"R" if self.arguments else code

    def called_with(self, *arguments):
        """What it returns, called."""
        return Raw(write(self) + write(arguments) + b"R")


class Raw:
    """Opcodes as they are."""

    def __init__(self, opcodes):
        self.opcodes = opcodes


class Persistent:
    def __init__(self, *identity):
        self.identity = identity


def write(value):
    """A value as opcodes of protocol 2, without the end."""
    match value:
        case Global():
            return value.written(write)
        case Raw():
            return value.opcodes
        case Persistent():
            return write(value.identity) + b"Q"
        case dict():
            return b"}(" + b"".join(write(k) + write(v) for k, v in value.items()) + b"u"
        case list():
            return b"](" + b"".join(map(write, value)) + b"e"
        case tuple():
            return b"(" + b"".join(map(write, value)) + b"t"
    return pickletools.optimize(pickle.dumps(value, 2))[2:-1]  # without unused memos


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


def test_archives_written_by_these_tests_are_read(save):
    arrays = read_arrays(save(write({"weight": tensor()}))).arrays
    np.testing.assert_array_equal(arrays["weight"], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    "called",
    ["os.system", "posix.system", "builtins.eval", "builtins.exec", "builtins.getattr",
     "builtins.__import__", "subprocess.Popen", "torch.load", "torch.hub.load",
     "torch.FloatTensor", "numpy.load", "collections.OrderedDict.fromkeys", "operator.attrgetter"],
)  # fmt: skip
@pytest.mark.parametrize("legacy_format", [False, True])
def test_what_a_pickle_calls_is_named_and_not_executed(called, legacy_format, save, tmp_path):
    witness = tmp_path / "executed"
    called_twice = Global(called, f"touch {witness}").called_with("__subclasses__")
    checkpoint = {"weight": tensor(), "run": called_twice}
    path = save(write(checkpoint))
    if legacy_format:
        path.write_bytes(legacy(checkpoint, {"0": np.arange(6, dtype="<f4").tobytes()}))
    found = read_arrays(path)
    np.testing.assert_array_equal(found.arrays["weight"], [[0, 1, 2], [3, 4, 5]])
    assert found.notes == (f"what its pickle calls was not executed: {called}",)
    assert not witness.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_object_that_reduces_to_a_command_does_not_run_it(protocol, save, tmp_path, refusal):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    content = pickle.dumps({"weight": Hostile()}, protocol)
    start = 2 if protocol >= 2 else 0
    assert "objects of posix.system" in refusal(save(content[start:-1]))
    assert not (tmp_path / "executed").exists()


def test_a_name_composed_of_texts_is_a_stand_in_too(save, tmp_path, refusal):
    command = write("os") + write("system") + b"\x93" + write((f"touch {tmp_path / 'e'}",)) + b"R"
    assert "objects of os.system" in refusal(save(command))
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_pass_beside_what_training_scripts_store(protocol, save):
    beside = {
        "args": argparse.Namespace(lr=0.1, layers=[2, 2], inner=argparse.Namespace(a=1)),
        "best": np.float64(0.93),
        "accuracy": np.arange(3.0),
        "dtype": np.dtype("float32"),
        "milestones": Counter({30: 1, 60: 1}),
        "history": defaultdict(list, {"loss": [0.3, 0.2], 3: [1]}),
        "folder": Path("/data/imagenet"),
        "when": datetime(2026, 1, 2, tzinfo=UTC),
        "seen": {1, 2},
        "fixed": frozenset("ab"),
        "raw": b"bytes",
        "range": range(3),
        "slice": slice(1, 2),
    }
    for name, value in beside.items():
        content = pickle.dumps(value, protocol)
        stored = Raw(content[2 if protocol >= 2 else 0 : -1])
        found = read_arrays(save(write({"state_dict": {"weight": tensor()}, name: stored})))
        assert list(found.arrays) == ["weight"], name


def test_a_defaultdict_of_tensors_is_a_state_dict(save):
    state = Raw(write(Global("collections.defaultdict", Global("builtins.list"))))
    opcodes = state.opcodes + write("weight") + write(tensor()) + b"s"
    assert list(read_arrays(save(opcodes)).arrays) == ["weight"]


@pytest.mark.parametrize(
    "changed",
    [
        {"offset": 1 << 40, "size": (1 << 40,), "strides": (1,)},
        (None, {"offset": 1 << 40, "__class__": Global("builtins.dict")}),
        (1 << 40, (2, 3), (3, 1)),
    ],
)
def test_attributes_change_no_tensor_that_was_checked(changed, save):
    built = Raw(write(tensor()) + write(changed) + b"b")
    arrays = read_arrays(save(write({"weight": built}))).arrays
    np.testing.assert_array_equal(arrays["weight"], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    "name", ["os.system", "torch.FloatStorage", "torch._utils._rebuild_tensor_v2", "torch.Size"]
)
@pytest.mark.parametrize("attribute", ["__new__", "__call__", "dtype", "append", "__defaults__"])
def test_a_file_changes_no_stand_in_for_the_next_one(name, attribute, save, outcome):
    state = (None, {attribute: Global("builtins.exec")})
    for stand_in in (Global(name), Raw(write(Global(name)) + b")\x81")):
        changed = Raw(write(stand_in) + write(state) + b"b")
        outcome(save(write({"weight": tensor(), "changed": changed})))
        arrays = read_arrays(save(write({"weight": tensor(), "size": Global("torch.Size", (2,))})))
        np.testing.assert_array_equal(arrays.arrays["weight"], [[0, 1, 2], [3, 4, 5]])


def test_an_extension_that_this_process_registered_is_not_looked_up(save, refusal, tmp_path):
    copyreg.add_extension("os", "system", 200)
    try:
        pickle.loads(b"\x80\x02\x82\xc8.")  # the registry keeps what it found
        call = b"\x82\xc8" + write((f"touch {tmp_path / 'executed'}",)) + b"R"
        assert "damaged pickle" in refusal(save(write({"weight": tensor(), "run": Raw(call)})))
    finally:
        copyreg.remove_extension("os", "system", 200)
    assert not (tmp_path / "executed").exists()


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
        b"(S'a'\nS'b'\n",  # marks without an end
        b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f]",  # FRAME of 2**63 bytes
        b"\x97\x98",  # buffers out of band
        b"ctorch\nSize\n" + b"]" + b"\x85" + b"}" + b"\x92",  # NEWOBJ_EX
    ],
)  # fmt: skip
def test_unneeded_opcodes_end_in_one_line(opcodes, save, refusal):
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
        pytest.param(
            b"]("
            + b"]" * 500_000
            + b"eq\x00ccollections\nOrderedDict\nq\x01"
            + b"h\x01h\x00\x85R0" * 300_000,
            id="copies through the memo",
        ),
        pytest.param(
            b"(" + b"]" * 500_000 + b"tq\x00cos\nsystem\nq\x01" + b"h\x01h\x00R0" * 300_000,
            id="long calls through the memo",
        ),
        pytest.param(b"\x8f(" + b"K\x00" * 200_000 + b"\x90", id="numbers in a set"),
        pytest.param(b"\x8f" + b")" + b"2\x86" * 60 + b"(h\x00\x90", id="a set of deep tuples"),
        pytest.param(b"(" + b")" + b"2\x86" * 60 + b"\x91", id="a frozen set of deep tuples"),
        pytest.param(b"(" + b")" + b"2\x86" * 60 + b"K\x01d", id="a dict of deep tuples"),
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
        ({"model_ema": {"other": tensor()}, "model": {"weight": tensor()}}, "model"),
        ({"odd": {"weight": tensor()}, "odder": {"a": 1}}, "odd"),
        ({"run": {"model": {"weight": tensor()}}}, "run.model"),
        ({"small": {"b": tensor()}, "large": {"weight": tensor(), "bias": tensor()}}, "large"),
    ],
)
def test_the_state_dict_of_a_checkpoint_is_found_and_noted(checkpoint, taken, save):
    found = read_arrays(save(write(checkpoint)))
    assert "weight" in found.arrays
    assert found.notes == ((f"its weights are those under {taken!r}",) if taken else ())


def test_other_weights_beside_are_named_and_can_be_selected(save):
    names = {"module.weight": tensor(), "n_averaged": tensor(size=(), strides=())}
    checkpoint = {"model": {"weight": tensor()}, "model_ema": names, "optimizer": {"0": tensor()}}
    path = save(write(checkpoint))
    assert read_arrays(path).notes == (
        "its weights are those under 'model'",
        "it also holds weights under 'model_ema' (--key=model_ema)",
    )
    found = read_arrays(path, "model_ema")
    assert list(found.arrays) == ["module.weight", "n_averaged"]
    with pytest.raises(UserError, match="under 'ema'; it has: model, model_ema, optimizer"):
        read_arrays(path, "ema")


@pytest.mark.parametrize(
    "beside",
    [
        {"arch": "resnetaa50"},
        {"args": Raw(pickle.dumps(argparse.Namespace(model="resnetaa50", lr=0.1), 2)[2:-1])},
        {"args": {"model": "resnetaa50"}},
    ],
)
def test_the_name_of_the_architecture_is_read(beside, save):
    found = read_arrays(save(write({"state_dict": {"weight": tensor()}, **beside})))
    assert found.metadata == {"architecture": "resnetaa50"}


def test_a_prefix_of_some_names_stays(save):
    found = read_arrays(save(write({"module.weight": tensor(), "bias": tensor()})))
    assert list(found.arrays) == ["module.weight", "bias"]


@pytest.mark.parametrize("value", [3, "text", [tensor()], {}, {"a": 1}, {1: tensor()}, tensor()])
def test_a_checkpoint_without_tensors_by_name_is_refused(value, save, refusal):
    assert "holds no tensors by name" in refusal(save(write(value)))


def test_compressed_archives_and_other_byte_orders_are_refused(save, refusal):
    good = write({"weight": tensor()})
    assert "is a compressed archive" in refusal(save(good, zipfile.ZIP_DEFLATED))
    assert "big-endian" in refusal(save(good, byteorder=b"big"))
    assert "TorchScript" in refusal(save(good, **{"code/network.py": b""}))


def test_a_truncated_storage_is_refused(save, refusal):
    good = write({"weight": tensor()})
    assert "storage '0' is not whole" in refusal(save(good, **{"data/0": b"\0" * 20}))


def test_an_ordered_dict_pickled_by_python_2_is_read(save):
    pairs = Global("collections.OrderedDict", [["weight", tensor()]])
    assert list(read_arrays(save(write(pairs))).arrays) == ["weight"]


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_a_truncated_file_is_refused(name, foreign, tmp_path, refusal):
    content = (foreign / name).read_bytes()
    path = tmp_path / name
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refusal(path)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "v3.pth"])
@given(data=st.data())
def test_flipped_bytes_end_in_arrays_or_one_line(name, data, foreign, tmp_path_factory, outcome):
    content = bytearray((foreign / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / f"flipped-{name}"
    path.write_bytes(content)
    assert len(outcome(path)) == 1


@given(opcodes=st.binary(max_size=60))
def test_arbitrary_bytes_as_a_pickle_end_in_one_line(opcodes, tmp_path_factory, refusal):
    path = tmp_path_factory.getbasetemp() / "any.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("any/data.pkl", opcodes)
    refusal(path)


shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)


@given(shape=shapes, steps=st.data(), offset=st.integers(0, 3))
def test_views_equal_those_of_numpy(shape, steps, offset, tmp_path_factory):
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
