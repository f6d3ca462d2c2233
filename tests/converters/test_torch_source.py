"""Reading torch.save files without PyTorch: every tensor must have the bits that PyTorch's own state_dict() has."""

import os
import pickle
import subprocess
import sys
import types
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from torch._utils import _rebuild_tensor_v3

from converters.sources import open_source
from flashsvd_jax.errors import CheckpointError

REPOSITORY = Path(__file__).parents[2]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    """The file holds exactly the `expected` tensors, equal in bits, shape and dtype."""
    with open_source(path) as source:
        assert set(source.infos()) == set(expected)
        for name, tensor in expected.items():
            array, info = source.get(name), source.infos()[name]
            assert info.name == name and info.file == path
            assert array.shape == info.shape == tuple(tensor.shape), name
            assert array.dtype == info.dtype and info.dtype.name == str(tensor.dtype).removeprefix("torch."), name
            assert array.tobytes() == bits(tensor), name
            assert not array.flags.writeable


def make_importable(monkeypatch: pytest.MonkeyPatch, module_name: str, **objects) -> None:
    """Let `objects` be pickled as members of a module that exists until `monkeypatch.undo()`."""
    module = types.ModuleType(module_name)
    for name, value in objects.items():
        value.__module__, value.__qualname__ = module_name, name
        setattr(module, name, value)
    for name in (module_name.partition(".")[0], module_name):
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def svd_model(monkeypatch):
    """A model as SVD-LLM pickles it: classes that are not importable when the file is read, buffers, hooks, ties."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_u_proj, self.q_v_proj = nn.Linear(3, 6, bias=False), nn.Linear(6, 3, bias=False)
            self.register_buffer("q_bias", torch.randn(6))
            self.register_buffer("inv_freq", torch.randn(2), persistent=False)
            self.register_buffer("nothing", None)
            self.buffer_class = nn.Buffer(torch.randn(2))
            self.hidden_buffer = nn.Buffer(torch.randn(2), persistent=False)
            self.register_forward_hook(hook)
            self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
            self.absent = nn.Parameter(torch.zeros(1))
            self.register_parameter("absent", None)
            self.tagged = nn.Parameter(torch.randn(2))
            vars(self.tagged)["tag"] = "an attribute of a parameter"

    class Config:
        def __init__(self):
            self.hidden_size, self.rms_norm_eps, self.tie_word_embeddings = 6, 1e-5, True
            self.torch_dtype, self.layer_types = torch.bfloat16, ["full", "sliding"]
            self.rope_scaling = {"factor": 8.0, "rope_type": "llama3"}
            self.sizes, self.id2label, self.bos_token_id = (1, 2), {0: "LABEL_0"}, None
            self._private, self.not_plain, self.mixed, self.infinite = "x", object(), [1, object()], float("inf")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = Config()
            self.embed_tokens = nn.Embedding(5, 6)
            self.layers = nn.ModuleList([Attention(), Attention()])
            self.same_layer = self.layers[0]
            self.none = None
            self.lm_head = nn.Linear(6, 5, bias=False)
            self.lm_head.weight = self.embed_tokens.weight
            self.register_buffer("counter", torch.tensor(7))

    def hook(module, inputs, output): ...

    make_importable(monkeypatch, "component.svd_llama", SVD_LlamaAttention=Attention, a_hook=hook, SVD_Llama=Model)
    make_importable(monkeypatch, "transformers.models.llama.configuration_llama", LlamaConfig=Config)
    torch.manual_seed(0)
    return Model()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("protocol", [2, 5])
def test_pickled_module(tmp_path, monkeypatch, svd_model, dtype, protocol):
    svd_model.to(dtype)
    expected = svd_model.state_dict()
    assert "layers.0.inv_freq" not in expected and "layers.1.q_bias" in expected and "same_layer.frozen" in expected
    path = tmp_path / "model.pt"
    torch.save(svd_model, path, pickle_protocol=protocol)
    monkeypatch.undo()
    assert_same(path, expected)
    with open_source(path) as source:
        assert "component.svd_llama.SVD_LlamaAttention" in source.unknown_globals
        assert "component.svd_llama.a_hook" in source.unknown_globals
        assert not any("_rebuild" in name or name.endswith("Storage") for name in source.unknown_globals)
        infos = source.infos()
        assert infos["lm_head.weight"].identity == infos["embed_tokens.weight"].identity
        assert infos["layers.0.q_bias"].identity == infos["same_layer.q_bias"].identity
        assert len({info.identity for info in infos.values()}) == len(infos) - 1 - len(svd_model.layers[0].state_dict())


def test_embedded_config(tmp_path, monkeypatch, svd_model):
    torch.save({"model": svd_model}, tmp_path / "model.pt")
    monkeypatch.undo()
    assert open_source(tmp_path / "model.pt").embedded_config == {
        "model_type": "llama",
        "hidden_size": 6,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "layer_types": ["full", "sliding"],
        "rope_scaling": {"factor": 8.0, "rope_type": "llama3"},
        "sizes": [1, 2],
        "id2label": {"0": "LABEL_0"},
        "bos_token_id": None,
    }


def test_explicit_model_type_wins_and_unknown_class_gives_none(tmp_path, monkeypatch):
    class Config:
        def __init__(self, **entries):
            self.__dict__.update(entries)

    class Model(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config, self.head = config, nn.Linear(1, 1)

    make_importable(monkeypatch, "elsewhere", OddConfig=Config, Model=Model)
    torch.save(Model(Config(model_type="odd")), tmp_path / "explicit.pt")
    torch.save(Model(Config(vocab_size=3)), tmp_path / "unknown.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "none.pt")
    monkeypatch.undo()
    assert open_source(tmp_path / "explicit.pt").embedded_config == {"model_type": "odd"}
    assert open_source(tmp_path / "unknown.pt").embedded_config == {"vocab_size": 3}
    assert open_source(tmp_path / "none.pt").embedded_config is None


def test_model_beside_hostile_tokenizer(tmp_path, monkeypatch, svd_model):
    witness = tmp_path / "executed"

    class Tokenizer:
        def __reduce__(self):
            return (os.mkdir, (str(witness),))

    make_importable(monkeypatch, "transformers.tokenizer", Tokenizer=Tokenizer)
    pickle.loads(pickle.dumps(Tokenizer()))
    witness.rmdir()  # so a tokenizer that gets unpickled would be noticed
    expected = svd_model.state_dict()
    torch.save({"model": svd_model, "tokenizer": {"tok": Tokenizer(), "merges": torch.ones(2)}}, tmp_path / "model.pt")
    monkeypatch.undo()
    assert_same(tmp_path / "model.pt", expected)
    assert not witness.exists()


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_wrapped_state_dict(tmp_path, key):
    layer = nn.Linear(2, 3)
    optimizer = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3, 2)}}}
    saved = {key: layer.state_dict(), "optimizer": optimizer, "epoch": 3, "val_loss": torch.tensor(1.0)}
    torch.save(saved, tmp_path / "model.pth")
    assert_same(tmp_path / "model.pth", layer.state_dict())


def test_attributes_of_a_state_dict_do_not_hide_its_methods(tmp_path):
    saved = OrderedDict(a=torch.ones(2))
    vars(saved).update(_metadata={"": {"version": 1}}, values="x", keys="x", get="x")
    torch.save(saved, tmp_path / "model.pt")
    assert_same(tmp_path / "model.pt", {"a": torch.ones(2)})


def test_nested_dict_keeps_all_levels(tmp_path):
    payload = {"us": torch.ones(2, dtype=torch.uint8), "tail": ("us", torch.zeros(3)), "none": None}
    saved = {"layers.0.q_proj": payload, "other": {1: torch.ones(1)}, "model": {"model": torch.ones(4)}}
    torch.save(saved, tmp_path / "model.bin")
    expected = {
        "layers.0.q_proj.us": payload["us"],
        "layers.0.q_proj.tail.1": payload["tail"][1],
        "other.1": torch.ones(1),
        "model": torch.ones(4),
    }
    assert_same(tmp_path / "model.bin", expected)


def test_views_and_shapes(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    expected = {
        "base": base,
        "transposed": base.t(),
        "row_1": base[1],
        "row_2": base[2],
        "square": base[:, :4],
        "square_transposed": base[:, :4].t(),
        "every_other": base[::2, 1::3],
        "expanded": base[0, :1].expand(5),
        "expanded_rows": base[:1].expand(3, 6),
        "scalar": torch.tensor(3.5),
        "scalar_view": base[2, 3],
        "empty": torch.zeros(0),
        "empty_matrix": torch.zeros(0, 3),
        "empty_view": base[4:, :2],
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    }
    torch.save(expected, tmp_path / "model.pt")
    assert_same(tmp_path / "model.pt", expected)
    with open_source(tmp_path / "model.pt") as source:
        identities = [info.identity for info in source.infos().values()]
        assert len(set(identities)) == len(identities)  # parts of one storage are not tied


DTYPES = [torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def test_all_dtypes(tmp_path):
    expected = {str(dtype): torch.tensor([0, 1, 1, 0, 1]).to(dtype) for dtype in DTYPES}
    torch.save(expected, tmp_path / "model.pt")
    assert_same(tmp_path / "model.pt", expected)


def rebuild_v3(tensor: torch.Tensor) -> object:
    """An object that pickles as newer dtypes do: through `_rebuild_tensor_v3` over an untyped storage."""

    class V3:
        def __reduce__(self):
            storage = tensor.untyped_storage()
            offset, size, stride = tensor.storage_offset(), tuple(tensor.size()), tensor.stride()
            return (
                _rebuild_tensor_v3,
                (storage, offset, size, stride, False, OrderedDict(), tensor.dtype),
            )

    return V3()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_untyped_storage(tmp_path, dtype):
    base = torch.arange(12).reshape(3, 4).to(dtype)
    torch.save({"a": rebuild_v3(base), "b": rebuild_v3(base[1:].t())}, tmp_path / "model.pt")
    assert_same(tmp_path / "model.pt", {"a": base, "b": base[1:].t()})


def test_arrays_are_views_that_outlive_the_source(tmp_path):
    weight = torch.randn(3, 4)
    torch.save({"a": weight, "b": weight[1:]}, tmp_path / "model.pt")
    source = open_source(tmp_path / "model.pt")
    whole, part = source.get("a"), source.get("b")
    assert not whole.flags.owndata and np.shares_memory(whole, part)
    source.close()
    source.close()
    assert whole.tobytes() == bits(weight)
    with pytest.raises(CheckpointError, match="closed"):
        source.get("a")


UNREADABLE = {
    "uint16": torch.zeros(2, dtype=torch.uint16),
    "float8": torch.zeros(2).to(torch.float8_e4m3fn),
    "complex": torch.zeros(2, dtype=torch.complex64),
    "negated": torch.ones(2, dtype=torch.complex64).conj().imag,
    "sparse": torch.eye(2).to_sparse(),
    "meta": torch.empty(2, device="meta"),
    "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore:.*(quantiz|TypedStorage)")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_tensor_is_named(tmp_path, kind):
    torch.save({"good": torch.ones(1), "bad.weight": UNREADABLE[kind]}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt: tensor bad\.weight"):
        open_source(tmp_path / "model.pt")


def test_tensor_subclass_is_named(tmp_path, monkeypatch):
    class Packed(torch.Tensor): ...

    make_importable(monkeypatch, "torchao.dtypes", Packed=Packed)
    layer = nn.Linear(2, 2)
    layer.register_buffer("scale", torch.ones(2).as_subclass(Packed))
    torch.save(layer, tmp_path / "model.pt")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"tensor scale.*torchao\.dtypes\.Packed"):
        open_source(tmp_path / "model.pt")


def test_two_tensors_of_one_name(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "state_dict": {"w": torch.zeros(1)}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="two different tensors are called w"):
        open_source(tmp_path / "model.pt")


def test_reading_imports_neither_torch_nor_transformers(tmp_path, monkeypatch, svd_model):
    torch.save({"model": svd_model}, tmp_path / "model.pt")
    monkeypatch.undo()
    program = """
import sys
from converters.sources import open_source
with open_source(sys.argv[1]) as source:
    assert len([source.get(name) for name in source.infos()]) > 5 and source.embedded_config
loaded = {name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "component"}
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "model.pt")], cwd=REPOSITORY, check=True)


def test_bfloat16_is_ml_dtypes(tmp_path):
    torch.save({"a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}, tmp_path / "model.pt")
    array = open_source(tmp_path / "model.pt").get("a")
    assert array.dtype == np.dtype(ml_dtypes.bfloat16) and array.tolist() == [1.5, -2.0]
