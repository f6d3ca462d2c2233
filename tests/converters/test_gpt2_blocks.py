"""FlashSVD's GPT-2: its block as a PyTorch module with the published names, in a model and in files of its own."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folder_logits import folder_logits
from hf_models import build_model
from published_checkpoints import hf_config, save_safetensors, state_dict, write_config
from torch import nn

from converters import convert
from flashsvd_jax.errors import ConversionError

TOKENS = np.random.default_rng(0).integers(0, 59, (2, 19)).astype(np.int32)
RANKS = {"q": 7, "out": 19, "fc1": 23, "fc2": 29}


class LowRankSVDBlock(nn.Module):
    """FlashSVD's: factors [inputs, rank] and [rank, outputs], of q, k and v a pair for each head; gelu is exact."""

    def __init__(self, layer: nn.Module, heads: int):
        super().__init__()
        self.ln1, self.ln2 = layer.ln_1, layer.ln_2
        d, mlp = layer.mlp.c_fc.weight.shape
        for name in "qkv":
            self._draw(name, (d, heads, RANKS["q"]), (heads, RANKS["q"], d // heads), (heads, d // heads))
        for name, (inputs, outputs) in {"out": (d, d), "fc1": (d, mlp), "fc2": (mlp, d)}.items():
            self._draw(name, (inputs, RANKS[name]), (RANKS[name], outputs), (outputs,))

    def _draw(self, name: str, first: tuple[int, ...], second: tuple[int, ...], bias: tuple[int, ...]) -> None:
        setattr(self, f"{name}_U", nn.Parameter(torch.randn(first) * first[0] ** -0.5))
        setattr(self, f"{name}_V", nn.Parameter(torch.randn(second) * second[-2] ** -0.5))
        setattr(self, f"{name}_b", nn.Parameter(0.3 * torch.randn(bias)))

    def _heads(self, name: str, x: torch.Tensor) -> torch.Tensor:
        first, second, bias = (getattr(self, f"{name}_{part}") for part in "UVb")
        return torch.einsum("bsd,dhr,hre->bhse", x, first, second) + bias[None, :, None, :]

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ getattr(self, f"{name}_U") @ getattr(self, f"{name}_V") + getattr(self, f"{name}_b")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self._heads(name, self.ln1(x)) for name in "qkv")
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        weights = torch.softmax(scores.masked_fill(~causal, -1e4), -1)
        x = x + self._linear("out", (weights @ v).transpose(1, 2).reshape(x.shape))
        return x + self._linear("fc2", nn.functional.gelu(self._linear("fc1", self.ln2(x))))


class LayerShim(nn.Module):
    """What stands in a model of transformers in place of a layer."""

    def __init__(self, block: LowRankSVDBlock):
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return self.block(x)


def low_rank(blocks: int = 2) -> Any:
    """A GPT-2 whose first layers are FlashSVD's; the others stay as they are, but with the exact gelu too."""
    model = build_model("gpt2", activation_function="gelu")
    torch.manual_seed(0)
    for index in range(blocks):
        model.transformer.h[index] = LayerShim(LowRankSVDBlock(model.transformer.h[index], model.config.n_head))
    return model


def torch_logits(model: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def save_blocks(folder: Path, model: Any, **changed: torch.Tensor | None) -> Path:
    """As FlashSVD's `save_lowrank_factors`; of the first block, None leaves a tensor out."""
    folder.mkdir()
    for index, shim in enumerate(model.transformer.h):
        bundle = {name: tensor for name, tensor in shim.block.state_dict().items() if not name.startswith("ln")}
        bundle |= changed if index == 0 else {}
        torch.save({n: t for n, t in bundle.items() if t is not None}, folder / f"gpt2_block_{index}.pt")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The dense GPT-2, with the tanh form of gelu that its configuration names."""
    model = build_model("gpt2")
    return save_safetensors(tmp_path / "base", state_dict(model), hf_config(model))


def test_files_of_blocks_with_the_rest_of_the_base_model(base: Path, tmp_path: Path) -> None:
    model = low_rank()
    source = save_blocks(tmp_path / "blocks", model)
    options: Any = {"base": base, "dtype": "float32", "verify": True, "progress": False, "logits_fn": folder_logits}
    report = convert(source, tmp_path / "out", **options)
    assert report.family == "flashsvd_gpt2" and report.verification.sites == 8
    np.testing.assert_allclose(folder_logits(tmp_path / "out", TOKENS), torch_logits(model), rtol=0, atol=1e-4)
    found = report.config.factorization
    assert found.groups_by_site["layers_1.self_attn.qkv_proj"] == 3 * model.config.n_head
    names = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    assert [found.rank(f"layers_0.{name}") for name in names] == list(RANKS.values())
    assert report.config.activation == "gelu" and any("gelu is computed exactly" in note for note in report.notes)
    named_by_one = convert(source / "gpt2_block_1.pt", tmp_path / "same", base=base, progress=False)
    assert named_by_one.config == report.config


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_whole_model_with_some_or_all_layers_replaced(blocks: int, tmp_path: Path) -> None:
    model = low_rank(blocks)
    write_config(tmp_path / "in", hf_config(model))
    torch.save(model.state_dict(), tmp_path / "in" / "pytorch_model.bin")
    options: Any = {"dtype": "float32", "verify": True, "progress": False, "logits_fn": folder_logits}
    report = convert(tmp_path / "in", tmp_path / "out", **options)
    assert len(report.config.factorization.ranks) == 4 * blocks
    np.testing.assert_allclose(folder_logits(tmp_path / "out", TOKENS), torch_logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"fc1_b": None}, r"missing: h.0.block.fc1_b"),
        ({"k_V": None}, r"missing: h.0.block.k_V"),
        ({"v_V": torch.zeros(4, 6, 11)}, r"h.0.block.v_V is \[4, 6, 11\], the base model makes it \[4, 7, 11\]"),
        ({"q_U": torch.zeros(44, 4, 0)}, r"h.0.block.q_U is \[44, 4, 0\]"),
        ({"out_V": torch.zeros(44, 19)}, r"h.0.block.out_V is \[44, 19\], the base model makes it \[19, 44\]"),
        ({"fc2_b": torch.zeros(())}, r"h.0.block.fc2_b is \[\], the base model makes it \[44\]"),
        ({"extra_U": torch.zeros(3)}, r"unexpected: h.0.block.extra_U \[3\]"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_tensor(
    changed: dict[str, Any], words: str, base: Path, tmp_path: Path
) -> None:
    source = save_blocks(tmp_path / "blocks", low_rank(), **changed)
    with pytest.raises(ConversionError, match=words):
        convert(source, tmp_path / "out", base=base, progress=False)
    assert not (tmp_path / "out").exists()


def test_files_of_blocks_need_all_numbers_and_the_weights_of_a_base(base: Path, tmp_path: Path) -> None:
    source, model = save_blocks(tmp_path / "blocks", low_rank()), build_model("gpt2")
    config = write_config(tmp_path / "config", hf_config(model))
    for given in (None, config, config.parent):
        with pytest.raises(ConversionError, match=r"are the base model's: give the folder of its weights with --base"):
            convert(source, tmp_path / "out", base=given, progress=False)
    (source / "gpt2_block_0.pt").unlink()
    with pytest.raises(ConversionError, match="holds blocks 1 of a GPT-2, not all from 0 on"):
        convert(source, tmp_path / "out", base=base, progress=False)
    llama = build_model("llama")
    other = save_safetensors(tmp_path / "llama", state_dict(llama), hf_config(llama))
    with pytest.raises(ConversionError, match="blocks of GPT-2, but its model is llama"):
        convert(save_blocks(tmp_path / "again", low_rank()), tmp_path / "out", base=other, progress=False)
