"""Tiny checkpoints of every family, saved as their authors publish them."""

import contextlib
import functools
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from basis_sharing import GROUPS, share_bases, share_config
from compressed_modules import (
    SVDLLM_MODULES,
    ABLinear,
    FirstSecond,
    LinLinear,
    ModLinear,
    ProjLinear,
    SequentialPair,
    SVDTransformLayer,
    UVLinear,
    compress,
    compress_in_blocks,
)
from dobi_remapping import remap
from hf_models import build_model
from lora_modules import add_lora
from narrow_modules import eigen_attention, narrow
from palu_modules import group_heads
from residual_modules import BLOCK, CovSVDLinear, SVDLinearWithDenseBlocks
from safetensors.torch import save_file
from torch import nn

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 44, "head_dim": 12, "intermediate_size": 58},
    "llama_bias": {"hidden_size": 40, "head_dim": 14, "intermediate_size": 62},
    "llama_tied": {"hidden_size": 36, "head_dim": 10, "intermediate_size": 60},
    "mistral": {"hidden_size": 40, "head_dim": 16, "intermediate_size": 66},
    "qwen2": {"hidden_size": 36, "head_dim": 10, "intermediate_size": 54},
    "qwen3": {"hidden_size": 34, "head_dim": 18, "intermediate_size": 50},
}
COMMON = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97, "num_hidden_layers": 2}
ROPE = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
}
MODULES = tuple(
    f"model.layers.{layer}.{part}"
    for layer in range(2)
    for part in (*(f"self_attn.{x}_proj" for x in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
)


@dataclass(frozen=True)
class Published:
    """A checkpoint on disk and the model it was saved from.

    Attributes:
      path: what a user would convert.
      model: the source, with its family's own layers, in evaluation mode.
      family: name of the family that should be found.
      ranks: rank by module path of every low-rank projection.
      base: what --base has to be, if the checkpoint has no configuration of its own, or is an adapter.
    """

    path: Path
    model: nn.Module
    family: str
    ranks: Mapping[str, int]
    base: Path | None = None


def base_model(architecture: str, **overrides: Any) -> Any:
    """A random transformers model in which all sizes that could be mistaken for one another differ."""
    return build_model(architecture, **{**SHAPES[architecture], **COMMON, **overrides})


# Nearly all checkpoints have these ranks, so that models of one architecture compile once: a rank of its own for most
# projections, every third one dense.
RANKS = {module: 3 + index for index, module in enumerate(MODULES) if index % 3 != 2}
REMAPPED = {module: 3 + index for index, module in enumerate(MODULES)}
RANKS_AND_HEAD = {**RANKS, "lm_head": 11}


def hf_config(model: nn.Module, **added: Any) -> dict[str, Any]:
    return json.loads(model.config.to_json_string(use_diff=False)) | added


def state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """As `save_pretrained` stores it: a tied head is left out."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def write_config(folder: Path, config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def save_safetensors(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Path:
    write_config(folder, config)
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def save_shards(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], suffix: str) -> Path:
    """Two shards and an index, `.bin` or `.safetensors`."""
    write_config(folder, config)
    stem = "pytorch_model" if suffix == ".bin" else "model"
    names, weight_map = list(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{number:05d}-of-00002{suffix}"
        chosen = {name: tensors[name] for name in part}
        (torch.save if suffix == ".bin" else save_file)(chosen, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


class _Tokenizer:
    """Stands for the tokenizer that authors pickle beside the model."""


@contextlib.contextmanager
def published_module_names(modules: Mapping[type, str]) -> Iterator[None]:
    """Classes pickle under the module names that they have in their authors' repositories."""
    kept = {cls: cls.__module__ for cls in modules}
    packages = {part for name in modules.values() for part in (name, name.partition(".")[0])}
    added = {name: types.ModuleType(name) for name in packages}
    try:
        sys.modules.update(added)
        for cls, name in modules.items():
            cls.__module__ = name
            setattr(sys.modules[name], cls.__name__, cls)
        yield
    finally:
        for cls, name in kept.items():
            cls.__module__ = name
        for name in added:
            del sys.modules[name]


def save_pickle(path: Path, model: nn.Module, modules: Mapping[type, str]) -> Path:
    """`torch.save` of the whole module and its tokenizer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with published_module_names({**modules, _Tokenizer: "tokenization_llama_fast"}):
        torch.save({"model": model, "tokenizer": _Tokenizer()}, path)
    return path


class LlamaRotaryEmbedding(nn.Module):
    """Older transformers keep one in every attention block, with a buffer that is saved."""

    def __init__(self, head_dim: int, base: float = 10000.0):
        super().__init__()
        self.register_buffer("inv_freq", base ** -(torch.arange(0, head_dim, 2) / head_dim))


def _lowrankarena(folder: Path, architecture: str, ranks: Mapping[str, int] = RANKS) -> Published:
    model = base_model(architecture)
    compress(model, ranks, ABLinear)
    config = hf_config(
        model,
        model_type=f"lowrank_{model.config.model_type}",
        architectures=[f"LowRank{type(model).__name__}"],
        auto_map={"AutoModelForCausalLM": "modeling_lowrank.LowRankForCausalLM"},
        low_rank_schema="ABLinear",
        low_rank_format_version=1,
        low_rank_method="svd_llm",
        low_rank_modules={module: {"rank": rank} for module, rank in ranks.items()},
    )
    return Published(save_shards(folder, state_dict(model), config, ".safetensors"), model, "lowrankarena", ranks)


def _asvd(folder: Path, architecture: str, ranks: Mapping[str, int] = RANKS) -> Published:
    model = base_model(architecture)
    compress(model, ranks, ABLinear)
    config = hf_config(
        model, model_type="asvd_llama", architectures=["ASVDLlamaForCausalLM"], truncation_ranks=dict(ranks)
    )
    return Published(save_safetensors(folder, state_dict(model), config), model, "asvd", ranks)


def _dobi(folder: Path) -> Published:
    model, ranks = base_model("qwen3"), RANKS
    compress(model, ranks, SVDTransformLayer)
    names = {module.removeprefix("model."): rank for module, rank in ranks.items()}
    config = hf_config(model, architectures=["DobiSVDQwen3ForCausalLM"], dobi_target_modules=names)
    return Published(save_safetensors(folder, state_dict(model), config), model, "dobi", ranks)


def _dobi_pickle(folder: Path) -> Published:
    model, ranks = base_model("llama"), RANKS
    compress(model, ranks, SVDTransformLayer)
    path = save_pickle(folder / "DobiSVD_Model.pt", model, {SVDTransformLayer: "modules.module"})
    return Published(path, model, "bare_ab", ranks)


def _asvd_pickle(folder: Path) -> Published:
    model, ranks = base_model("llama_bias"), RANKS
    compress(model, ranks, ABLinear)
    path = save_pickle(folder / "asvd.pt", model, {ABLinear: "modules.svd_linear"})
    return Published(path, model, "bare_ab", ranks)


def _svdllm(
    folder: Path, architecture: str, ranks: Mapping[str, int], bias_as_buffer: bool = False, **config: Any
) -> Published:
    model = base_model(architecture, **config)
    compress_in_blocks(model, ranks, bias_as_buffer)
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = LlamaRotaryEmbedding(model.config.head_dim)
    modules = {**SVDLLM_MODULES, LlamaRotaryEmbedding: "component.svd_llama"}
    path = save_pickle(folder / "tiny_llama_whitening_only_0.8.pt", model, modules)
    return Published(path, model, "svdllm", ranks)


def _svdllm_hf(folder: Path) -> Published:
    model, ranks = base_model("llama"), RANKS
    compress(model, ranks, ProjLinear)
    config = hf_config(
        model, model_type="svdllm-llama", architectures=["SVDLLMLlamaForCausalLM"], svd_ranks=dict(ranks)
    )
    return Published(save_shards(folder, state_dict(model), config, ".bin"), model, "svdllm_hf", ranks)


def _lems(folder: Path) -> Published:
    model, ranks = base_model("qwen2"), RANKS
    compress(model, ranks, ModLinear)
    inner = hf_config(model)
    config = {
        "model_type": "low_rank_compressed",
        "architectures": ["LowRankCausalLM"],
        "base_model_type": inner.pop("model_type"),
        "base_model_id": "somebody/tiny-qwen2",
        "base_config": inner,
        "rank_dict": dict(ranks),
        "eos_token_id": 5,
    }
    tensors = {f"wrapped_model.{name}": tensor for name, tensor in state_dict(model).items()}
    return Published(save_safetensors(folder, tensors, config), model, "lems", ranks)


def _generic(folder: Path, architecture: str, layer: type[nn.Module], family: str) -> Published:
    """A state dict in a pickle, with the configuration of the base model elsewhere."""
    model, ranks = base_model(architecture), RANKS
    compress(model, ranks, layer)
    base = write_config(folder / "base", hf_config(model)).parent
    path = folder / "weights" / "pytorch_model.bin"
    path.parent.mkdir()
    torch.save(model.state_dict(), path)
    return Published(path, model, family, ranks, base)


def _dynrank(folder: Path) -> Published:
    model, ranks = base_model("mistral"), RANKS
    compress(model, ranks, FirstSecond)
    base = write_config(folder / "base", hf_config(model))
    path = folder / "dynrank.pt"
    torch.save({"step": 7, "ranks": [*ranks.values()], "state_dict": model.state_dict(), "val_loss": 2.5}, path)
    return Published(path, model, "dynrank", ranks, base)


def _zs_svd(folder: Path) -> Published:
    model, ranks = base_model("qwen2"), RANKS
    compress(model, ranks, ProjLinear)
    path = save_pickle(folder / "zs_svd.pt", model, {ProjLinear: "utils.model_utils"})
    return Published(path, model, "zs_svd", ranks)


def _basis_sharing(folder: Path) -> Published:
    """Llama's classes: tied tensors under the names of the model and of the blocks."""
    model = base_model("llama_bias", num_hidden_layers=4)
    ranks = share_bases(model)
    config = hf_config(model, architectures=["ShareLlamaForCausalLM"], **share_config())
    write_config(folder, config)
    torch.save(state_dict(model), folder / "pytorch_model.bin")
    return Published(folder, model, "basis_sharing", ranks)


def _basis_sharing_mistral(folder: Path) -> Published:
    """Names of the model alone, repeated in several shards; some projections are dense."""
    model = base_model("mistral", num_hidden_layers=4)
    groups = {stem: GROUPS[stem] for stem in ("q", "k", "o", "gate")}
    ranks = share_bases(model, groups, in_blocks=False)
    config = hf_config(model, architectures=["ShareMistralForCausalLM"], **share_config(groups))
    return Published(save_shards(folder, state_dict(model), config, ".bin"), model, "basis_sharing", ranks)


def _d_rank(folder: Path) -> Published:
    """Basis Sharing's form with a rank of its own for every group, which num_basis_* has no place for."""
    model = base_model("llama_bias", num_hidden_layers=4)
    groups = {stem: GROUPS[stem] for stem in ("q", "v", "down")}
    ranks = share_bases(model, groups, {"q": [4, 9], "v": [8, 5], "down": [3, 12, 7, 10]})
    added = {f"{stem}_groups": list(map(list, groups[stem])) for stem in groups}
    config = hf_config(model, architectures=["ShareLlamaForCausalLM"], **added)
    write_config(folder, config)
    torch.save(state_dict(model), folder / "pytorch_model.bin")
    return Published(folder, model, "basis_sharing", ranks)


def _swift_svd(folder: Path) -> Published:
    """SVD-LLM's names the other way round, as a state dict beside the base model's configuration."""
    model, ranks = base_model("llama"), RANKS
    compress_in_blocks(model, ranks, u_first=True)
    base = write_config(folder / "base", hf_config(model))
    torch.save(model.state_dict(), folder / "compressed.pt")
    return Published(folder / "compressed.pt", model, "svdllm", ranks, base)


def _lillama(folder: Path) -> Published:
    model, ranks = base_model("llama"), RANKS
    compress(model, ranks, SequentialPair)
    config = hf_config(model, architectures=["LowRankLlamaForCausalLM"], ranks=dict(ranks))
    return Published(save_safetensors(folder, state_dict(model), config), model, "sequential", ranks)


def _dobi_remapped(folder: Path) -> Published:
    """Every projection but the head as codes; what remains of the model is in float16."""
    model = base_model("llama").half().float()
    codes = remap(model, REMAPPED)
    config = hf_config(model)
    write_config(folder, config)
    rest = {
        name: t.half() for name, t in state_dict(model).items() if ".self_attn." not in name and ".mlp." not in name
    }
    torch.save(rest, folder / "pytorch_model.bin")
    torch.save(codes, folder / "remapping_weight.pt")
    return Published(folder, model, "dobi_remapped", REMAPPED)


def _corda(folder: Path) -> Published:
    """Every projection but the head has a residual, so the model that is read is dense."""
    model = base_model("llama_bias")
    compress(model, dict.fromkeys(MODULES, 5), CovSVDLinear)
    config = hf_config(model, architectures=["CovSVDLlamaForCausalLM"], lora_r=5)
    return Published(save_safetensors(folder, state_dict(model), config), model, "corda", {})


def _fisher_svd(folder: Path) -> Published:
    """Blocks in a few columns make a pair wider; the value projection of the last layer has them in nearly all."""
    model, ranks = base_model("llama_bias"), dict(RANKS)
    compress(model, ranks, SVDLinearWithDenseBlocks)
    for module in (MODULES[0], MODULES[4]):
        model.get_submodule(module).add_blocks([0, 9], [[3, 17], [5, 7]])
        ranks[module] += 2 * BLOCK
    many = MODULES[9]
    model.get_submodule(many).add_blocks([*range(0, 36, BLOCK)], [[0, 20]] * 9)
    del ranks[many]
    path = save_pickle(folder / "tiny_fisher_svd_0.6.pt", model, {SVDLinearWithDenseBlocks: "fisher_svd"})
    return Published(path, model, "fisher_svd", ranks)


HEAD_RANKS = {  # one group, groups of one rank, groups of different ranks; everything else is dense
    MODULES[1]: [3, 5],
    MODULES[2]: [6],
    MODULES[8]: [4, 4],
    MODULES[9]: [7, 2],
}


def _palu(folder: Path, architecture: str = "llama_bias") -> Published:
    model = base_model(architecture)
    group_heads(model, HEAD_RANKS)
    config = hf_config(
        model,
        model_type=f"palu{model.config.model_type}",
        architectures=[f"Palu{model.config.model_type.capitalize()}ForCausalLM"],
        head_wise_ranks=HEAD_RANKS,
        original_model_name_or_path="somebody/tiny",
    )
    path = save_safetensors(folder, state_dict(model), config)
    return Published(path, model, "palu", {module: max(ranks) for module, ranks in HEAD_RANKS.items()})


def _eigen_attention(folder: Path, architecture: str = "llama_bias") -> Published:
    """Heads of 5 and 6 columns for keys and of 3 and 4 for values, in place of 14, the values' as factors."""
    model = base_model(architecture, num_attention_heads=4, head_dim=10)  # its class has no head_dim of its own
    eigen_attention(model, [(10, 6), (12, 8)])
    config = hf_config(model, architectures=["LlamaForCausalLM_EigenAttn"])
    ranks = {MODULES[1]: 5, MODULES[2]: 3, MODULES[8]: 6, MODULES[9]: 4}
    return Published(save_safetensors(folder, state_dict(model), config), model, "eigen_attention", ranks)


# Columns of heads of 14 that are kept by each of two heads: pairs, in the order of their scores.
KEPT = tuple(
    torch.tensor([[*first, *(column + 7 for column in first)] for first in heads])
    for heads in (([4, 0], [1, 6]), ([5, 1, 2, 0, 4, 3], [0, 6, 5, 3, 2, 1]))
)


def _modegpt(folder: Path) -> Published:
    """Heads of 4 and 12 in place of 14: factors in the first layer, dense weights in the second, where these are smaller."""
    model = base_model("llama_bias")
    added = narrow(model, KEPT, [51, 38])
    masks = "/somewhere/else/rotary_masks.pt"
    write_config(folder, hf_config(model, mask_path=masks, ffn_dim=-1, **added))
    torch.save(state_dict(model), folder / "pytorch_model.bin")
    torch.save(list(KEPT), folder / "rotary_masks.pt")
    return Published(folder, model, "modegpt", dict.fromkeys(MODULES[:3], 4))


class WeightQuantizer(nn.Module):
    """QSVD stores one for every layer beside the model, of no use for running it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(3))


def _qsvd(folder: Path) -> Published:
    """Query, key and value with one first factor, in copies; the weights' quantizers beside the model."""
    model, ranks = base_model("llama"), RANKS | dict.fromkeys(MODULES[:3], 5)
    compress(model, ranks, ABLinear)
    for module in MODULES[1:3]:
        model.get_submodule(module).BLinear.weight.copy_(model.get_submodule(MODULES[0]).BLinear.weight)
    path, base = folder / "qsvd.pth", write_config(folder / "base", hf_config(model))
    with published_module_names({WeightQuantizer: "quant_utils"}):
        torch.save({"w_quantizers": {f"{MODULES[0]}.ALinear": WeightQuantizer()}, "model": model.state_dict()}, path)
    return Published(path, model, "bare_ab", ranks, base)


def _lora(folder: Path) -> Published:
    """On a dense base: ranks and scales of single modules, an embedding, and an output head that was trained whole."""
    model = base_model("qwen2")
    base = save_safetensors(folder / "base", state_dict(model), hf_config(model))
    ranks = {MODULES[0]: 4, MODULES[2]: 4, MODULES[6]: 3, MODULES[11]: 4, "model.embed_tokens": 4}
    alphas = dict.fromkeys(ranks, 6.0) | {MODULES[2]: 5.0}
    add_lora(model, folder / "adapter", ranks, alphas, use_rslora=True, modules_to_save=["lm_head"])
    return Published(folder / "adapter", model, "lora", {}, base)


def _lora_on_factors(folder: Path) -> Published:
    """On a factorized base: a projection as a whole, which gets wider; one of another's factors; one that is dense."""
    source = _lowrankarena(folder / "base", "mistral")
    whole, factor, dense = MODULES[0], f"{MODULES[1]}.ALinear", MODULES[2]
    ranks = {whole: 2, factor: 2, dense: 2}
    add_lora(source.model, folder / "adapter", ranks, dict.fromkeys(ranks, 3.0))
    return Published(
        folder / "adapter", source.model, "lora", {**source.ranks, whole: source.ranks[whole] + 2}, source.path
    )


def _dense(folder: Path, architecture: str) -> Published:
    model = base_model(architecture, **(ROPE if architecture == "llama_tied" else {}))
    return Published(save_safetensors(folder, state_dict(model), hf_config(model)), model, "dense", {})


_SVDLLM_V1 = {module: 13 if "self_attn" in module else 17 for module in MODULES}  # one rank for each kind of block
_PUBLISHERS: dict[str, Callable[[Path], Published]] = {
    "lowrankarena-llama": functools.partial(_lowrankarena, architecture="llama", ranks=RANKS_AND_HEAD),
    "lowrankarena-mistral": functools.partial(_lowrankarena, architecture="mistral"),
    "lowrankarena-qwen2": functools.partial(_lowrankarena, architecture="qwen2"),
    "lowrankarena-qwen3": functools.partial(_lowrankarena, architecture="qwen3"),
    "lowrankarena-tied": functools.partial(_lowrankarena, architecture="llama_tied"),
    "asvd": functools.partial(_asvd, architecture="llama", ranks=RANKS_AND_HEAD),
    "asvd-bias": functools.partial(_asvd, architecture="llama_bias"),
    "asvd-pickle": _asvd_pickle,
    "dobi": _dobi,
    "dobi-pickle": _dobi_pickle,
    "svdllm": functools.partial(_svdllm, architecture="llama", ranks=_SVDLLM_V1),
    "svdllm-v2-mistral": functools.partial(_svdllm, architecture="mistral", ranks=RANKS),
    "svdllm-qwen-buffers": functools.partial(_svdllm, architecture="qwen2", ranks=RANKS, bias_as_buffer=True),
    "svdllm-bias": functools.partial(_svdllm, architecture="llama_bias", ranks=RANKS),
    "svdllm-hf": _svdllm_hf,
    "lems": _lems,
    "aa_svd": functools.partial(_generic, architecture="llama_bias", layer=UVLinear, family="aa_svd"),
    "sequential": functools.partial(_generic, architecture="qwen2", layer=SequentialPair, family="sequential"),
    "fwsvd": functools.partial(_generic, architecture="llama_tied", layer=LinLinear, family="fwsvd"),
    "dynrank": _dynrank,
    "zs_svd": _zs_svd,
    "swift_svd": _swift_svd,
    "lillama": _lillama,
    "d_rank": _d_rank,
    "basis_sharing": _basis_sharing,
    "basis_sharing-mistral": _basis_sharing_mistral,
    "dobi_remapped": _dobi_remapped,
    "palu": _palu,
    "palu-mistral": functools.partial(_palu, architecture="mistral"),
    "eigen_attention": _eigen_attention,
    "modegpt": _modegpt,
    "qsvd": _qsvd,
    "lora": _lora,
    "lora-factors": _lora_on_factors,
    "corda": _corda,
    "fisher_svd": _fisher_svd,
    "dense-llama-tied": functools.partial(_dense, architecture="llama_tied"),
    "dense-mistral": functools.partial(_dense, architecture="mistral"),
    "dense-qwen2": functools.partial(_dense, architecture="qwen2"),
    "dense-qwen3": functools.partial(_dense, architecture="qwen3"),
}
CASES = tuple(_PUBLISHERS)


def publish(case: str, folder: Path) -> Published:
    """Makes the checkpoint of a case in an empty folder."""
    with torch.no_grad():
        return _PUBLISHERS[case](folder)
