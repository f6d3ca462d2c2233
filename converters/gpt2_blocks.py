"""FlashSVD's GPT-2: blocks with factors of single heads, stored transposed, inside transformers' model or as files of their own.

A block (its `decoders/gpt2`) holds, with width d, heads h of o columns, and rank r:

    q_U, k_U, v_U  [d, h, r]     q_V, k_V, v_V  [h, r, o]     q_b, k_b, v_b  [h, o]
    out_U [d, r], out_V [r, d], out_b     fc1_U [d, r], fc1_V [r, mlp], fc1_b     fc2_U [mlp, r], fc2_V [r, d], fc2_b     ln1, ln2

so that a product is ``x @ U[:, h] @ V[h] + b[h]`` or ``x @ U @ V + b``. Files `gpt2_block_0.pt` and so on hold factors and biases
alone; all else is the base model's.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from converters.head_factors import FIRST, SECOND
from converters.sources import TensorInfo, TensorSource, WrappedSource, open_source
from converters.sources.joined_source import JoinedSource
from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import ConversionError

_FILE = re.compile(r"^gpt2_block_(\d+)\.pt$")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_PART = re.compile(r"^(.*?h\.\d+)\.block\.((?:[qkv]|out|fc1|fc2)_[UVb]|ln[12]\.\w+)$")
_REPLACED = re.compile(r"^(?:transformer\.)?h\.(\d+)\.(?:attn|mlp)\.c_\w+\.\w+$")
_PROJECTIONS = {"out": "attn.c_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
_NORMS = {"ln1": "ln_1", "ln2": "ln_2"}


def open_checkpoint(path: Path, base: Path | None) -> TensorSource:
    """As `open_source`; of blocks in files of their own, with the rest of the base model.

    Raises:
      ConversionError: blocks are not numbered through, or there are no weights of a base model.
    """
    folder = path if path.is_dir() else path.parent if _FILE.match(path.name) else None
    numbers = sorted(int(match[1]) for file in folder.iterdir() if (match := _FILE.match(file.name))) if folder else []
    if folder is None or not numbers:
        return open_source(path)
    if numbers != list(range(len(numbers))):
        raise ConversionError(f"{folder} holds blocks {', '.join(map(str, numbers))} of a GPT-2, not all from 0 on")
    if base is None or not base.is_dir() or not any(file.suffix in _WEIGHTS for file in base.iterdir()):
        raise ConversionError(
            f"{folder} holds factors alone, embeddings and norms are the base model's: give the folder of its weights with --base"
        )

    def name_of(number: int, name: str) -> str | None:
        if number < len(numbers):
            return f"h.{number}.block.{name}"
        replaced = _REPLACED.match(name)
        return None if replaced and int(replaced[1]) in numbers else name

    sources = [open_source(folder / f"gpt2_block_{number}.pt") for number in numbers]
    return JoinedSource(folder, [*sources, open_source(base)], name_of)


class Gpt2Blocks(WrappedSource):
    """A checkpoint with such blocks under transformers' names of modules, every factor with its contraction axis last.

    q, k and v are one projection as in transformers, with groups of outputs for the heads of all three.

    Args:
      source: the checkpoint.
      claims: the configuration that came with it.
      config: the base model.

    Raises:
      ConversionError: names every tensor of a block that is missing or mis-shaped.
    """

    def __init__(self, source: TensorSource, claims: Mapping[str, Any], config: AnyConfig):
        super().__init__(source)
        if not isinstance(config, ModelConfig) or config.model_type != "gpt2":
            raise ConversionError(f"{self.path} has FlashSVD's blocks of GPT-2, but its model is {config.model_type}")
        self._config = config
        self._problems: list[str] = []
        if config.activation != "gelu":
            self.hf = {"activation_function": "gelu"}
            self.notes = (
                "gelu is computed exactly, as FlashSVD's blocks do it, not by its tanh form; config.json says so",
            )
        blocks: dict[str, dict[str, TensorInfo]] = {}
        for name in source.infos():
            if match := _PART.match(name):
                blocks.setdefault(match[1], {})[match[2]] = self._infos.pop(name)
        for block, parts in blocks.items():
            self._attention(block, parts)
            for stem, module in _PROJECTIONS.items():
                self._projection(block, stem, module, parts)
            for part, info in parts.items():
                norm, _, leaf = part.partition(".")
                self._infos[f"{block}.{_NORMS[norm]}.{leaf}" if norm in _NORMS else info.name] = info
        if self._problems:
            listed = "".join(f"\n  {problem}" for problem in self._problems)
            raise ConversionError(f"{self.path}, read as FlashSVD's blocks of GPT-2, has problems:{listed}")

    def _attention(self, block: str, parts: dict[str, TensorInfo]) -> None:
        heads, width, d = self._config.num_heads, self._config.head_dim, self._config.hidden_size
        found = {stem: self._take(block, stem, parts) for stem in "qkv"}
        if not all(found.values()):
            return
        triples = [triple for triple in found.values() if triple]
        rank = _rank(triples[0][0])
        for first, second, bias in triples:
            self._check(first, (d, heads, rank))
            self._check(second, (heads, rank, width))
            self._check(bias, (heads, width))
        firsts, seconds, biases = ([info.name for info in infos] for infos in zip(*triples, strict=True))

        def down() -> np.ndarray:
            return np.concatenate([self._source.get(name).transpose(1, 2, 0).reshape(-1, d) for name in firsts])

        def up() -> np.ndarray:
            return np.concatenate([self._source.get(name).swapaxes(1, 2) for name in seconds])

        def output(x: np.ndarray) -> np.ndarray:
            latents = [np.einsum("td,dhr->thr", x, self._float64(name)) for name in firsts]
            pairs = zip(latents, seconds, strict=True)
            of_heads = [np.einsum("thr,hro->tho", latent, self._float64(name)) for latent, name in pairs]
            return np.concatenate([outputs.reshape(len(x), -1) for outputs in of_heads], axis=1)

        def joined_bias() -> np.ndarray:
            return np.concatenate([self._source.get(name).reshape(-1) for name in biases])

        module, (like, _, like_bias) = f"{block}.attn.c_attn", triples[0]
        self._make(FIRST.format(module=module), (3 * heads * rank, d), down, like, like.dtype)
        self._make(SECOND.format(module=module), (3 * heads, width, rank), up, like, like.dtype)
        self._make(f"{module}.bias", (3 * heads * width,), joined_bias, like_bias, like_bias.dtype)
        self._outputs[FIRST.format(module=module)] = output

    def _projection(self, block: str, stem: str, path: str, parts: dict[str, TensorInfo]) -> None:
        d, mlp = self._config.hidden_size, self._config.intermediate_size
        d_in, d_out = {"out": (d, d), "fc1": (d, mlp), "fc2": (mlp, d)}[stem]
        found, module = self._take(block, stem, parts), f"{block}.{path}"
        if found is None:
            return
        first, second, bias = found
        rank = _rank(first)
        for info, shape in ((first, (d_in, rank)), (second, (rank, d_out)), (bias, (d_out,))):
            self._check(info, shape)
        for name, info in ((FIRST.format(module=module), first), (SECOND.format(module=module), second)):
            self._make(name, info.shape[::-1], partial(self._turned, info.name), info, info.dtype)
        self._infos[f"{module}.bias"] = bias
        self._outputs[FIRST.format(module=module)] = lambda x: (
            x @ self._float64(first.name) @ self._float64(second.name)
        )

    def _turned(self, name: str) -> np.ndarray:
        return self._source.get(name).T

    def _take(
        self, block: str, stem: str, parts: dict[str, TensorInfo]
    ) -> tuple[TensorInfo, TensorInfo, TensorInfo] | None:
        """Factors and bias of a projection; what is missing of them is a problem."""
        names = [f"{stem}_{part}" for part in "UVb"]
        absent = [name for name in names if name not in parts]
        self._problems += [f"missing: {block}.block.{name}" for name in absent]
        first, second, bias = (parts.pop(name, None) for name in names)
        return None if first is None or second is None or bias is None else (first, second, bias)

    def _check(self, info: TensorInfo, wanted: tuple[int, ...]) -> None:
        if info.shape != wanted or 0 in wanted:
            self._problems.append(
                f"mis-shaped: {info.name} is {list(info.shape)}, the base model makes it {list(wanted)}"
            )


def _rank(first: TensorInfo) -> int:
    return first.shape[-1] if first.shape else 0
