"""Hostile pickles: no name they mention is called, and programs made to exhaust or crash the reader are refused."""

import builtins
import copyreg
import json
import os
import pickle
import subprocess

import pytest
import torch
from torch_archives import pickle_of, pickled_text, repack

from converters.sources import open_source, pickle_check, pickled_config, state_dict
from converters.sources.pickled_tensors import tensor_globals
from converters.sources.unpickle import load_inert
from flashsvd_jax.errors import CheckpointError


class Reduced:
    """Pickles as a call of `function`, which may be Reduced itself."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __call__(self): ...

    def __reduce__(self):
        return self.call


@pytest.fixture
def plain_file(tmp_path) -> bytes:
    """A file with one tensor `a` of 40 elements."""
    torch.save({"a": torch.arange(40.0)}, tmp_path / "plain.pt")
    return (tmp_path / "plain.pt").read_bytes()


def hostile_calls(witness: str) -> dict[str, Reduced]:
    command = f"__import__('os').mkdir({witness!r})"
    return {
        "os.system": Reduced(os.system, f"mkdir {witness}"),
        "subprocess": Reduced(subprocess.call, ["mkdir", witness]),
        "eval": Reduced(eval, command),
        "exec": Reduced(exec, command),
        "getattr": Reduced(Reduced(getattr, Reduced(builtins.__import__, "os"), "mkdir"), witness),
        "map": Reduced(list, Reduced(map, os.mkdir, [witness])),
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", hostile_calls(""))
def test_hostile_calls_stay_inert(tmp_path, kind, protocol):
    witness = tmp_path / "executed"
    path = tmp_path / "model.pt"
    saved = {"weight": torch.ones(2), "extra": hostile_calls(str(witness))[kind]}
    torch.save(saved, path, pickle_protocol=protocol)
    torch.load(path, weights_only=False)
    witness.rmdir()  # so the file does harm where it is unpickled in earnest
    with open_source(path) as source:
        assert list(source.infos()) == ["weight"] and source.get("weight").tolist() == [1, 1]
    assert not witness.exists()


def test_extension_registry_is_out_of_reach(tmp_path):
    witness = tmp_path / "executed"
    copyreg.add_extension(os.mkdir.__module__, "mkdir", 0x1234)
    try:
        program = pickle.dumps(Reduced(os.mkdir, str(witness)), 2)
        pickle.loads(program)
        witness.rmdir()
        with pytest.raises(CheckpointError, match="opcode EXT2"):
            load_inert(program)
    finally:
        copyreg.remove_extension(os.mkdir.__module__, "mkdir", 0x1234)
    assert not witness.exists()


LIST_OF_5000 = b"](" + b"N" * 5000 + b"eq\x000"
PROGRAMS = {
    "memo bomb": (b"Nr\xff\xff\xff\x7f.", "memo jumps to index 2147483647"),
    "deep tuple as key": (b"})" + b"\x85" * 200_000 + b"Ns.", "nests tuples"),
    "deep tuple through the memo": (b"}q\x00)" + b"\x85q\x010h\x01" * 100_000 + b"Ns.", "nests tuples"),
    "deep tuple through BUILD": (b"})" + b"\x85Nb" * 100_000 + b"Ns.", "nests tuples"),
    "deep tuple through APPENDS": (b"})" + b"\x85(e" * 100_000 + b"Ns.", "nests tuples"),
    "long integer": (b"\x8b\x00\x01\x00\x00" + b"\x01" * 256 + b".", "opcode LONG4"),
    "out of band buffer": (b"\x97.", "opcode NEXT_BUFFER"),
    "text persistent id": (b"Pstorage\n.", "opcode PERSID"),
    "old class": (b"(ios\ngetcwd\n.", "opcode INST"),
    "copies of a list": (LIST_OF_5000 + b"cbuiltins\nset\nq\x010" + b"h\x01h\x00\x85R0" * 2100 + b"N.", "copies its"),
    "many classes": (b"".join(b"cmodule\nname%d\n0" % i for i in range(5000)) + b"N.", "more than 4096 classes"),
    "stack underflow": (b"0.", "more values from its stack"),
    "pop across a mark": (b"N(0.", "more values from its stack"),
    "reduce below a mark": (b"N(NR.", "more values from its stack"),
    "unknown memo": (b"h\x07.", "IndexError"),
    "no end": (b"N", "exhausted"),
    "string longer than the file": (b"X\xff\xff\xff\x7fabc.", "only"),
    "huge byte array": (b"\x96" + b"\xff" * 7 + b"\x0f.", "only"),
    "unhashable key": (b"}]Ns.", "unhashable"),
    "call of a number": (b"K\x01)R.", "not callable"),
    "instance of a function": (b"ctorch._utils\n_rebuild_parameter\n)\x81.", "damaged"),
    "persistent id that is no tuple": (pickled_text("storage") + b"Q.", "not a storage"),
    "short persistent id": (b"(" + pickled_text("storage") + b"tQ.", "not a storage"),
    "tensor of no storage": (b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR.", "no storage"),
    "size of a string": (b"ctorch\nSize\n" + pickled_text("ab") + b"\x85R.", "not a tuple"),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_hostile_programs(kind):
    program, message = PROGRAMS[kind]
    with pytest.raises(CheckpointError, match=message):
        load_inert(b"\x80\x02" + program)


def test_length_of_programs_is_limited(monkeypatch):
    monkeypatch.setattr(pickle_check, "MAX_OPCODES", 100)
    load_inert(b"\x80\x02" + b"N0" * 45 + b"N.")
    with pytest.raises(CheckpointError, match="more than 100 opcodes"):
        load_inert(b"\x80\x02" + b"N0" * 50 + b"N.")


@pytest.mark.parametrize(
    "state", [b"}" + pickled_text("__call__") + b"Ns", b"N}" + pickled_text("function") + b"Ns\x86"]
)
@pytest.mark.parametrize(
    "name", [*tensor_globals(), ("builtins", "set"), ("collections", "OrderedDict"), ("any", "Thing")], ids=str
)
def test_what_a_pickle_is_given_cannot_be_changed(name, state):
    with pytest.raises(CheckpointError, match="damaged"):
        load_inert(b"\x80\x02c" + "\n".join(name).encode() + b"\n" + state + b"b.")


def test_stub_survives_everything():
    """One object of an unknown class goes through every opcode that unpickling can apply to an object."""
    calls = b")\x81" + b"Na" + b"(NNe" + b"NNs" + b"(NNu" + b"(NN\x90" + b")R"
    states = (
        b"}b" + b"N}\x86b" + b"Nb" + b"}" + pickled_text("kept") + b"K\x05s}" + pickled_text("slot") + b"K\x06s\x86b"
    )
    stub, unknown = load_inert(b"\x80\x04cany\nThing\n" + calls + states + b".")
    assert stub.attributes() == {"kept": 5, "slot": 6} and unknown == ("any.Thing",)
    made, _ = load_inert(b"\x80\x04cany\nThing\n(NNt}" + pickled_text("cls") + b"Ns\x92.")
    assert made.attributes() == {}


SHAPE, STRIDE, OFFSET, NUMEL = b"K\x28\x85", b"K\x01\x85", b"K\x00K\x28\x85", b"K\x28tq"
TENSORS = {
    "shape too large": (SHAPE, b"K\x29\x85", "tensor a reaches beyond"),
    "stride too large": (STRIDE, b"K\x02\x85", "tensor a reaches beyond"),
    "offset too large": (OFFSET, b"K\x01K\x28\x85", "tensor a reaches beyond"),
    "offset of nothing too large": (OFFSET, b"K\x29K\x00\x85", "tensor a reaches beyond"),
    "negative offset": (OFFSET, b"J\xff\xff\xff\xffK\x28\x85", "non-negative"),
    "negative stride": (STRIDE, b"J\xff\xff\xff\xff\x85", "non-negative"),
    "negative dimension": (SHAPE, b"J\xff\xff\xff\xff\x85", "non-negative"),
    "dimension that is a float": (SHAPE, b"G" + bytes(8) + b"\x85", "non-negative"),
    "dimension that is a bool": (SHAPE, b"\x88\x85", "non-negative"),
    "shape that is no tuple": (SHAPE, b"}", "not a tuple"),
    "ranks that differ": (STRIDE, b")", r"has shape \(40,\) but stride \(\)"),
    "storage longer than the file": (NUMEL, b"K\x29tq", "'0' of tensor a is cut short"),
    "negative storage": (NUMEL, b"J\xff\xff\xff\xfftq", "non-negative"),
    "no storage": (pickled_text("storage"), pickled_text("module"), "something that is not a storage"),
    "key out of the folder": (pickled_text("0"), pickled_text("../0"), "by the key '../0'"),
    "key in a folder": (pickled_text("0"), pickled_text("a/0"), "by the key 'a/0'"),
    "key that is not there": (pickled_text("0"), pickled_text("7"), "no storage '7'"),
    "unknown storage": (b"FloatStorage", b"QInt8Storage", "tensor a has dtype torch.QInt8Storage"),
    "storage type that is a function": (b"torch\nFloatStorage", b"builtins\nset", "damaged"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_out_of_bounds(tmp_path, plain_file, kind):
    old, new, message = TENSORS[kind]
    program = pickle_of(plain_file)
    assert program.count(old) == 1
    path = tmp_path / "bounds.pt"
    path.write_bytes(repack(plain_file, {"data.pkl": program.replace(old, new)}))
    with pytest.raises(CheckpointError, match=message):
        open_source(path)


@pytest.mark.parametrize("shape", [(1,) * 33, (2**40, 2**40), (2**62, 0, 2**62)], ids=str)
def test_shapes_that_no_array_has(tmp_path, plain_file, shape):
    """In a torch file with a stride of 0, and in safetensors with a size of 0, they fit into any file."""
    sizes = b"(" + b"".join(pickle.dumps(size, 2)[2:-1] for size in shape) + b"t"
    program = pickle_of(plain_file).replace(SHAPE, sizes).replace(STRIDE, b"(" + b"K\x00" * len(shape) + b"t")
    (tmp_path / "shape.pt").write_bytes(repack(plain_file, {"data.pkl": program}))
    size = 4 if set(shape) == {1} else 0
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    (tmp_path / "shape.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    for suffix in ("pt", "safetensors"):
        with pytest.raises(CheckpointError, match=rf"shape\.{suffix}.*(impossible shape|damaged)"):
            open_source(tmp_path / f"shape.{suffix}")


def test_stride_that_does_not_matter(tmp_path, plain_file):
    """PyTorch writes any stride for a dimension of one element; this one does not even fit into an address."""
    program = (
        pickle_of(plain_file)
        .replace(SHAPE, b"K\x01K\x28\x86")
        .replace(STRIDE, b"\x8a\x09" + b"\xff" * 8 + b"\0K\x01\x86")
    )
    path = tmp_path / "stride.pt"
    path.write_bytes(repack(plain_file, {"data.pkl": program}))
    assert open_source(path).get("a").tolist() == [list(range(40))]


def attributes(**values: bytes) -> bytes:
    """An object of an unknown class whose attributes are pickled as given."""
    return b"cany\nThing\n)\x81}(" + b"".join(pickled_text(name) + value for name, value in values.items()) + b"ub"


def module(parameters: bytes = b"}", modules: bytes = b"}", **others: bytes) -> bytes:
    return attributes(_parameters=parameters, _buffers=b"}", _modules=modules, **others)


DOUBLING = b"]" + b"".join(b"q%c0]h%ca" % (i, i) + b"h%ca" % i for i in range(40))
SELF = b"cany\nThing\n)\x81q\x000" + module(modules=b"}" + pickled_text("m") + b"h\x00s").replace(
    b"cany\nThing\n)\x81", b"h\x00"
)
STRUCTURES = {
    "list in itself": (b"]q\x00h\x00a", "contain themselves"),
    "dict in itself": (b"}q\x00" + pickled_text("model") + b"h\x00s", "contain themselves"),
    "module in itself": (SELF, "contain themselves"),
    "deep list": (b"]" * 5000 + b"a" * 4999, "nest too deep"),
    "lists that unfold": (DOUBLING, "more than 10000 values"),
    "config in itself": (module(config=attributes(x=b"]q\x00h\x00a")), "contain themselves"),
    "config that unfolds": (module(config=attributes(x=DOUBLING)), "configuration has more than 10000 entries"),
    "no attributes": (b"cany\nThing\n)\x81", "no tensors"),
    "attributes of other types": (attributes(_parameters=b"N", _buffers=b"N", _modules=b"]"), "no tensors"),
    "odd set of buffers": (module(_non_persistent_buffers_set=attributes()), "which of its buffers"),
    "object for a parameter": (
        module(parameters=b"}" + pickled_text("w") + attributes() + b"s"),
        r"holds a any\.Thing",
    ),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_structures_that_are_no_model(tmp_path, plain_file, kind, monkeypatch):
    monkeypatch.setattr(state_dict, "_MAX_VALUES", 10_000)
    monkeypatch.setattr(pickled_config, "_MAX_VALUES", 10_000)
    path = tmp_path / "structure.pt"
    program, message = STRUCTURES[kind]
    path.write_bytes(repack(plain_file, {"data.pkl": b"\x80\x02" + program + b"."}))
    with pytest.raises(CheckpointError, match=rf"structure\.pt.*{message}"):
        open_source(path)
