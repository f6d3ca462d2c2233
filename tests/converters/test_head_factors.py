"""FlashSVD's own encoders, factors of single heads: what its classes compute, what is written, and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from converted_encoders import TOKENS, converted, folder_outputs
from hf_encoders import build_encoder
from published_checkpoints import save_safetensors, write_config
from torch import nn

from flashsvd_jax.checkpoint import load_params
from flashsvd_jax.errors import ConversionError
from flashsvd_jax.inspection import inspect
from flashsvd_jax.schema import flatten

RANK_ATTN, RANK_WO, RANK_FF = 3, 11, 13
SVD_CONFIG = {"rank_attn": RANK_ATTN, "rank_wo": RANK_WO, "rank_ff": RANK_FF, "model_type": "bert_svd"}


class SVDBlock(nn.Module):
    """A layer of BERT with random factors under FlashSVD's names and in its layouts; one more axis in front or not."""

    def __init__(self, layer: nn.Module, front: bool):
        super().__init__()
        attention = layer.attention.self
        heads, width = attention.num_attention_heads, attention.all_head_size
        mlp, head = layer.intermediate.dense.out_features, width // heads
        lead = (1,) if front else ()

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape) * shape[-2] ** -0.5)

        for name, dense in (("q", attention.query), ("k", attention.key), ("v", attention.value)):
            setattr(self, f"P{name}", draw(*lead, heads, width, RANK_ATTN))
            setattr(self, f"V{name}", draw(*lead, heads, RANK_ATTN, head))
            setattr(self, f"b{name}", nn.Parameter(dense.bias.data.view(1, heads, 1, head).clone()))
        self.Uo, self.Vo, self.bo_attn = draw(width, RANK_WO), draw(RANK_WO, width), layer.attention.output.dense.bias
        self.U1, self.V1, self.b1 = draw(width, RANK_FF), draw(RANK_FF, mlp), layer.intermediate.dense.bias
        self.U2, self.V2, self.b2 = draw(mlp, RANK_FF), draw(RANK_FF, width), layer.output.dense.bias
        self.ln1, self.ln2 = layer.attention.output.LayerNorm, layer.output.LayerNorm
        self.heads = heads

    def project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """[batch, heads, tokens, head_dim]."""
        first, second = (
            getattr(self, f"{kind}{name}").reshape(self.heads, *getattr(self, f"{kind}{name}").shape[-2:])
            for kind in "PV"
        )
        latent = torch.einsum("bmd,hdr->bhmr", x, first)
        return torch.einsum("bhmr,hrd->bhmd", latent, second) + getattr(self, f"b{name}")

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        q, k, v = (self.project(name, x) for name in "qkv")
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
        attended = (weights @ v).transpose(1, 2).reshape(x.shape)
        x = self.ln1(x + attended @ self.Uo @ self.Vo + self.bo_attn)
        inner = nn.functional.gelu(x @ self.U1 @ self.V1 + self.b1)
        return self.ln2(x + inner @ self.U2 @ self.V2 + self.b2)

    def put_products(self, layer: nn.Module) -> None:
        """Writes what the factors stand for into a layer of transformers."""
        with torch.no_grad():
            for name, dense in zip("qkv", (f"attention.self.{n}" for n in ("query", "key", "value")), strict=True):
                first, second = getattr(self, f"P{name}"), getattr(self, f"V{name}")
                product = (first @ second).reshape(self.heads, -1, second.shape[-1])
                layer.get_submodule(dense).weight.copy_(torch.cat(list(product), -1).T)
            for n, dense in (("o", "attention.output.dense"), ("1", "intermediate.dense"), ("2", "output.dense")):
                layer.get_submodule(dense).weight.copy_((getattr(self, f"U{n}") @ getattr(self, f"V{n}")).T)


class Shim(nn.Module):
    """What stands in a model of transformers in place of a layer."""

    def __init__(self, block: SVDBlock):
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return self.block(x)


class SaveableSVDModel(nn.Module):
    """The class of FlashSVD that saves itself: it scales the embedding, and norms the last layer's output a second time."""

    def __init__(self, base: Any):
        super().__init__()
        self.config, self.embeddings, self.pooler, self.classifier = (
            base.config, base.bert.embeddings, base.bert.pooler, base.classifier,
        )  # fmt: skip
        self.svd_layers = nn.ModuleList([SVDBlock(layer, front=True) for layer in base.bert.encoder.layer])
        self.norm = base.bert.encoder.layer[-1].output.LayerNorm

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(tokens) * self.config.hidden_size**0.5
        for layer in self.svd_layers:
            x = layer(x)
        return self.classifier(self.pooler(self.norm(x)))


def saveable() -> SaveableSVDModel:
    torch.manual_seed(0)
    return SaveableSVDModel(build_encoder("bert", "ForSequenceClassification")).eval()


def hf_config(model: Any) -> dict[str, Any]:
    return json.loads(model.config.to_json_string(use_diff=False))


def save(folder: Path, model: nn.Module, **changed: Any) -> Path:
    """As FlashSVD's class saves itself; a value of None leaves a tensor out."""
    write_config(folder, hf_config(model))
    (folder / "svd_config.json").write_text(json.dumps(SVD_CONFIG))
    tensors = {**model.state_dict(), **changed}
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "pytorch_model.bin")
    return folder


def refusal(source: Path, folder: Path) -> str:
    with pytest.raises(ConversionError) as caught:
        converted(source, folder)
    assert not (folder / "out").exists()
    return str(caught.value)


def test_the_class_that_saves_itself(tmp_path: Path) -> None:
    model = saveable()
    report = converted(save(tmp_path / "in", model), tmp_path, verify=True, logits_fn=folder_outputs)
    assert report.family == "flashsvd_encoder"
    with torch.no_grad():
        want = model(torch.from_numpy(TOKENS).long()).numpy()
    np.testing.assert_allclose(folder_outputs(tmp_path / "out"), want, rtol=0, atol=1e-5)
    assert report.verification is not None and report.verification.worst_error <= 1e-12
    assert report.verification.logits.startswith("logits not compared: transformers has no encoder")
    assert any("the embedding is multiplied with the square root of the width" in note for note in report.notes)
    heads = model.config.num_attention_heads
    assert report.config.factorization.groups_by_site["layers_0.self_attn.v_proj"] == heads
    (row,) = (line.split() for line in str(report).splitlines() if line.strip().startswith("0-"))
    assert row[1:] == [f"{heads}x{RANK_ATTN}"] * 3 + [str(RANK_WO), str(RANK_FF), str(RANK_FF)]


@pytest.mark.parametrize("dropped", ["norm", "svd_layers.1.ln2"])
def test_savers_that_keep_one_name_of_the_norm_that_is_used_twice(dropped: str, tmp_path: Path) -> None:
    model = saveable()
    converted(save(tmp_path / "in", model, **{f"{dropped}.{leaf}": None for leaf in ("weight", "bias")}), tmp_path)
    with torch.no_grad():
        want = model(torch.from_numpy(TOKENS).long()).numpy()
    np.testing.assert_allclose(folder_outputs(tmp_path / "out"), want, rtol=0, atol=1e-5)


def test_what_is_stored_is_what_was_saved(tmp_path: Path) -> None:
    """Counted and compared with the source's own numbers; the tied norm is stored once."""
    model = saveable()
    converted(save(tmp_path / "in", model), tmp_path)
    given = {id(tensor): tensor.numel() for tensor in model.parameters()}
    assert inspect(tmp_path / "out").params == sum(given.values())
    stored, block = flatten(load_params(tmp_path / "out")), model.svd_layers[1]
    x = np.random.default_rng(0).standard_normal((5, model.config.hidden_size)).astype(np.float32)
    for name in "qkv":
        site, rank = f"layers_1.self_attn.{name}_proj", RANK_ATTN
        down, up = (np.asarray(stored[f"{site}.{part}"], np.float64) for part in ("down", "up"))
        y = np.concatenate([x @ down[h * rank : (h + 1) * rank].T @ up[h].T for h in range(len(up))], 1)
        with torch.no_grad():
            want = block.project(name, torch.from_numpy(x)[None])[0].transpose(0, 1).reshape(len(x), -1).numpy()
        got = y + np.asarray(stored[f"{site}.bias"])
        assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_blocks_inside_transformers(architecture: str, front: bool, tmp_path: Path) -> None:
    model, dense = (build_encoder(architecture, "ForMaskedLM", hidden_act="gelu") for _ in range(2))
    torch.manual_seed(0)
    body, plain = (getattr(of, of.base_model_prefix).encoder.layer for of in (model, dense))
    for index, layer in enumerate(plain):
        block = SVDBlock(body[index], front)
        block.put_products(layer)
        body[index] = Shim(block)
    kept: dict[int, str] = {}
    state = model.state_dict()
    tensors = {n: t.contiguous() for n, t in state.items() if kept.setdefault(t.data_ptr(), n) == n}
    source = save_safetensors(tmp_path / "in", tensors, hf_config(dense))
    report = converted(source, tmp_path, verify=True, logits_fn=folder_outputs)
    assert report.verification is not None
    assert report.verification.logits.startswith("logits of 24 tokens, largest difference from PyTorch ")
    with torch.no_grad():
        own, want = (of(torch.from_numpy(TOKENS).long())[0].numpy() for of in (model, dense))
    np.testing.assert_allclose(own, want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(folder_outputs(tmp_path / "out"), want, rtol=0, atol=1e-5)


def exchanged(model: SaveableSVDModel) -> dict[str, Any]:
    layer = model.svd_layers[0]
    return {"svd_layers.0.Pq": layer.Vq, "svd_layers.0.Vq": layer.Pq}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (exchanged, r"mis-shaped: svd_layers.0.Pq is \[1, 5, 3, 8\], the base model makes it \[5, 40, 8\]"),
        (lambda m: {"svd_layers.1.Vk": None}, "1 problem:\n  missing: svd_layers.1.Vk, beside svd_layers.1.Pk"),
        (lambda m: {"svd_layers.1.U2": None}, "missing: svd_layers.1.U2, beside svd_layers.1.V2"),
        (lambda m: {"svd_layers.1.bv": None}, "missing: svd_layers.1.bv, beside svd_layers.1.Pv"),
        (lambda m: {"svd_layers.1.bv": torch.ones(1, 4, 1, 10)}, r"bv is \[1, 4, 1, 10\], .* makes it \[1, 5, 1, 8\]"),
        (lambda m: {"svd_layers.0.Pq": torch.ones(4, 40, 3)}, r"Pq is \[4, 40, 3\], .* makes it \[5, 40, 3\]"),
        (lambda m: {"svd_layers.0.Pq": torch.ones(2, 5, 40, 3)}, r"Pq is \[2, 5, 40, 3\]"),
        (lambda m: {"svd_layers.0.Uo": torch.tensor(1.0)}, r"mis-shaped: svd_layers.0.Uo is \[\]"),
        (lambda m: {"svd_layers.0.b1": torch.tensor(1.0)}, r"mis-shaped: svd_layers.0.b1 is \[\]"),
        (
            lambda m: {"svd_layers.0.U1": torch.ones(40, 5), "svd_layers.0.V1": torch.ones(5, 46)},
            "svd_config.json says rank_ff 13, svd_layers.0.U1 has 5",
        ),
        (lambda m: {"norm.bias": None, "svd_layers.1.ln2.bias": None}, r"missing: norm.bias \[40\]"),
        (lambda m: {"svd_layers.0.Wx": torch.ones(3)}, r"unexpected: svd_layers.0.Wx \[3\]"),
        (lambda m: {f"svd_layers.2.{n}": getattr(m.svd_layers[0], n) for n in ("Uo", "Vo", "bo_attn")}, "unexpected: svd_l"),
        (lambda m: {"encoder.layer.0.block.Pq": m.svd_layers[0].Pq}, "the checkpoint holds svd_layers.0.Pq as well"),
        (lambda m: {"encoder.layer.0.output.LayerNorm.bias": torch.ones(40)}, "holds svd_layers.0.ln2.bias as well"),
    ],
)  # fmt: skip
def test_damaged_checkpoints(change: Callable[[Any], dict[str, Any]], words: str, tmp_path: Path) -> None:
    model = saveable()
    source = save(tmp_path / "in", model, **change(model))
    message = refusal(source, tmp_path)
    assert str(source) in message
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(message)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_act": "relu"}, "FlashSVD's blocks compute gelu, but hidden_act in the configuration means relu"),
        ({"num_attention_heads": 4}, r"Pq is \[1, 5, 40, 3\], the base model makes it \[4, 40, 3\]"),
        ({"model_type": "distilbert", "dim": 40, "n_layers": 2, "n_heads": 4, "hidden_dim": 46}, "model is distilbert"),
    ],
)
def test_configurations_of_other_models(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = save(tmp_path / "in", saveable())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ConversionError, match=words):
        converted(source, tmp_path)


def test_verification_finds_a_head_in_another_ones_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from converters.head_factors import HeadFactorSource

    right = HeadFactorSource.get
    turned = lambda self, name: right(self, name)[::-1] if name.endswith("0.Vq") else right(self, name)  # noqa: E731
    monkeypatch.setattr(HeadFactorSource, "get", turned)
    with pytest.raises(ConversionError, match=r"differ from the source: layers_0.self_attn.q_proj \(relative error"):
        converted(save(tmp_path / "in", saveable()), tmp_path, verify=True)
    assert not (tmp_path / "out").exists()
