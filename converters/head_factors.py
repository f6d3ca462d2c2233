"""FlashSVD's encoder form as any other checkpoint: factors of single heads, stored transposed in blocks of their own.

A block of FlashSVD (its `why_finetuning` and `src/utils/FlashSVDBlocks.py`) holds, with heads h, width d, head width o, rank r:

    Pq, Pk, Pv  [h, d, r]     Vq, Vk, Vv  [h, r, o]     bq, bk, bv  [1, h, 1, o]     one more axis of size 1 in front or not
    Uo  [d, r]  Vo  [r, d]  bo_attn       U1  [d, r]  V1  [r, mlp]  b1       U2  [mlp, r]  V2  [r, d]  b2       ln1, ln2

so that a product is ``x @ P[h] @ V[h]`` or ``x @ U @ V``. The canonical factors contract over their last axis. Blocks stand in a
model of transformers, or as ``svd_layers`` in a class of FlashSVD that multiplies the embedding with the square root of its width.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from converters.sources import TensorInfo, TensorSource, WrappedSource, folder_of
from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.checkpoint.json_files import read_object
from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.errors import ConversionError

FIRST, SECOND = "{module}.P", "{module}.V"  # what the factors are called here
_RANKS_FILE = "svd_config.json"
_BLOCK = re.compile(r"^(.*?)(?:svd_layers\.(\d+)|encoder\.layer\.(\d+)\.block)\.([\w.]+)$")
_TYPES = ("bert", "roberta", "xlm-roberta", "camembert")
_Q, _K, _V = (f"attention.self.{name}" for name in ("query", "key", "value"))
# Module -> names of its factors and bias, and the entry of svd_config.json that tells its rank.
_MODULES = {
    _Q: ("Pq", "Vq", "bq", "rank_attn"),
    _K: ("Pk", "Vk", "bk", "rank_attn"),
    _V: ("Pv", "Vv", "bv", "rank_attn"),
    "attention.output.dense": ("Uo", "Vo", "bo_attn", "rank_wo"),
    "intermediate.dense": ("U1", "V1", "b1", "rank_ff"),
    "output.dense": ("U2", "V2", "b2", "rank_ff"),
}
_NORMS = {"ln1": "attention.output.LayerNorm", "ln2": "output.LayerNorm"}


@dataclass(frozen=True)
class _Stored:
    """The factors of one projection as stored, without leading axes of size 1: [i, r] and [r, o], or [h, i, r] and [h, r, o]."""

    first: str
    second: str
    first_shape: tuple[int, ...]
    second_shape: tuple[int, ...]


class HeadFactorSource(WrappedSource):
    """Another source under transformers' names of modules, every factor with its contraction axis last.

    Args:
      source: the checkpoint.
      claims: the configuration that came with it.
      config: the base model.

    Raises:
      ConversionError: names every tensor of a block that is missing, mis-shaped or of another rank than the checkpoint says.
    """

    def __init__(self, source: TensorSource, claims: Mapping[str, Any], config: AnyConfig):
        super().__init__(source)
        self._where = str(source.path)
        if not isinstance(config, EncoderConfig) or config.model_type not in _TYPES:
            raise ConversionError(f"{self._where} has FlashSVD's blocks of BERT, but its model is {config.model_type}")
        if config.activation != "gelu":
            raise ConversionError(
                f"{self._where}: FlashSVD's blocks compute gelu, but hidden_act in the configuration means {config.activation}"
            )
        self._config = config
        # Stored name -> shape before its last two axes change places, None where they stay, and shape in the end.
        self._layouts: dict[str, tuple[tuple[int, ...] | None, tuple[int, ...]]] = {}
        self._problems: list[str] = []
        self._infos = self._renamed()
        if self._problems:
            listed = "".join(f"\n  {problem}" for problem in self._problems)
            count = f"{len(self._problems)} problem{'s' * (len(self._problems) > 1)}"
            raise ConversionError(f"{self._where}, read as FlashSVD's blocks, has {count}:{listed}")
        if any(name.startswith("svd_layers.") for name in source.infos()):
            self.hf = {"embedding_scale": config.hidden_size**0.5, "final_norm": True}
            self._tie_last_norms()

    def get(self, name: str) -> np.ndarray:
        """A tensor in the canonical layout, by either name."""
        stored = self._infos[name].name if name in self._infos else name
        array = self._source.get(stored)
        if stored not in self._layouts:
            return array
        given, wanted = self._layouts[stored]
        return array.reshape(wanted) if given is None else array.reshape(given).swapaxes(-1, -2).reshape(wanted)

    def _through(self, found: _Stored, x: np.ndarray) -> np.ndarray:
        """What two factors make of x [tokens, d_in], in FlashSVD's own order."""
        first = self._float64(found.first).reshape(found.first_shape)
        second = self._float64(found.second).reshape(found.second_shape)
        if first.ndim == 2:
            return x @ first @ second
        latent = np.einsum("ti,hir->thr", x, first)
        return np.einsum("thr,hro->tho", latent, second).reshape(len(x), -1)

    def _renamed(self) -> dict[str, TensorInfo]:
        """All tensors by their names here; blocks are taken apart, and what is wrong with them is noted."""
        found: dict[str, TensorInfo] = {}
        blocks: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self._source.infos().items():
            match = _BLOCK.match(name)
            if match is None:
                found[name] = info
            else:
                prefix, own, shim, part = match.groups()
                twin = blocks.setdefault(f"{prefix}encoder.layer.{own or shim}", {}).setdefault(part, info)
                if twin is not info:
                    self._problems.append(f"unexpected: {name}, the checkpoint holds {twin.name} as well")
        claimed = self._claimed_ranks()
        for block, parts in blocks.items():
            taken: dict[str, TensorInfo] = {}
            for module, names in _MODULES.items():
                taken |= self._factors(f"{block}.{module}", module, names, parts, claimed)
            for part, info in parts.items():  # norms, and what is not known
                norm, _, leaf = part.partition(".")
                taken[f"{block}.{_NORMS[norm]}.{leaf}" if norm in _NORMS else info.name] = info
            for name in taken.keys() & found.keys():
                self._problems.append(f"unexpected: {name}, the checkpoint holds {taken[name].name} as well")
            found |= taken
        return found

    def _tie_last_norms(self) -> None:
        """The class that calls its blocks svd_layers norms the last layer's output twice, by one module: savers may keep either."""
        for leaf in ("weight", "bias"):
            twins = f"norm.{leaf}", f"encoder.layer.{self._config.num_layers - 1}.output.LayerNorm.{leaf}"
            there = [self._infos[name] for name in twins if name in self._infos]
            self._infos |= dict.fromkeys(twins, there[0]) if len(there) == 1 else {}

    def _factors(
        self, path: str, module: str, names: tuple[str, ...], parts: dict[str, TensorInfo], claimed: Mapping[str, int]
    ) -> dict[str, TensorInfo]:
        """Takes one module's factors and bias out of a block; nothing where it has none of them."""
        given = {name: parts.pop(name) for name in names[:3] if name in parts}
        if len(given) < 3:
            for name, info in list(given.items())[:1]:
                absent = (info.name.removesuffix(name) + other for other in names[:3] if other not in given)
                self._problems += [f"missing: {other}, beside {info.name}" for other in absent]
            return {}
        first, second, bias = given.values()
        heads, d_in, d_out = self._sizes(module)
        width, leading = d_out // max(heads, 1), (heads,) if heads else ()
        shapes = [_cut(info.shape, len(leading) + 2) for info in (first, second)]
        rank = shapes[0][-1] if shapes[0] else 0
        for info, shape, wanted in zip((first, second), shapes, ((d_in, rank), (rank, width)), strict=True):
            if shape != (*leading, *wanted) or not rank:
                self._mis_shaped(info, [*leading, *wanted])
        if np.prod(bias.shape) != d_out or bias.shape[-1] not in (width, d_out):
            self._mis_shaped(bias, [1, heads, 1, width] if heads else [d_out])
        told = claimed.get(names[3], rank)
        if rank != min(told, d_in, width):
            self._problems.append(f"rank: {_RANKS_FILE} says {names[3]} {told}, {first.name} has {rank}")
        name_of_first, groups = FIRST.format(module=path), (heads,) if heads > 1 else ()
        stored = _Stored(first.name, second.name, shapes[0], shapes[1])
        self._outputs[name_of_first] = partial(self._through, stored)
        return {
            name_of_first: self._relaid(first, (max(heads, 1) * rank, d_in), shapes[0]),
            SECOND.format(module=path): self._relaid(second, (*groups, width, rank), shapes[1]),
            f"{path}.bias": self._relaid(bias, (d_out,)),
        }

    def _sizes(self, module: str) -> tuple[int, int, int]:
        """Heads that have factors of their own, 0 for factors of the whole; inputs; outputs."""
        d, mlp = self._config.hidden_size, self._config.intermediate_size
        if module in (_Q, _K, _V):
            return self._config.num_heads, d, d
        return {"intermediate.dense": (0, d, mlp), "output.dense": (0, mlp, d)}.get(module, (0, d, d))

    def _relaid(self, info: TensorInfo, shape: tuple[int, ...], turned: tuple[int, ...] | None = None) -> TensorInfo:
        self._layouts[info.name] = turned, shape
        return replace(info, shape=shape)

    def _mis_shaped(self, info: TensorInfo, wanted: list[int]) -> None:
        self._problems.append(f"mis-shaped: {info.name} is {list(info.shape)}, the base model makes it {wanted}")

    def _claimed_ranks(self) -> dict[str, int]:
        """Ranks by entry of the file beside the weights; none where there is no such file."""
        path = folder_of(self.path) / _RANKS_FILE
        said = read_object(path, ConversionError) if path.is_file() else {}
        return {name: rank for name, rank in said.items() if name.startswith("rank_") and type(rank) is int}


def _cut(shape: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """A shape without the axes of size 1 before its last ``axes``; empty where others are there, or too few."""
    front, back = shape[: len(shape) - axes], shape[len(shape) - axes :]
    return back if len(back) == axes and all(size == 1 for size in front) else ()
