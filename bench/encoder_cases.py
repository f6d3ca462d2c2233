"""What the encoder benchmark measures, as data, and the work that a pass is."""

import dataclasses
from typing import Any

from prompt_cases import PromptCase

from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.schema import schema
from flashsvd_jax.shapes import layer_sites, uniform_rank

_BERT: dict[str, Any] = {
    "model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_MODERN: dict[str, Any] = {
    "model_type": "modernbert", "vocab_size": 50368, "max_position_embeddings": 8192, "hidden_size": 768,
    "num_hidden_layers": 22, "num_attention_heads": 12, "intermediate_size": 1152, "global_attn_every_n_layers": 3,
    "local_attention": 128, "hidden_activation": "gelu", "pad_token_id": 50283,
}  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = {
    "bert-base": _BERT | _BASE,
    "bert-large": _BERT | _LARGE,
    "modernbert-base": _MODERN,
    "tiny": _BERT | _TINY | {"vocab_size": 128, "max_position_embeddings": 64},
}


BLOCK_TOKENS = 8192
"""Enough for products of BERT's width to fill an H200, and its second-level cache holds what a block leaves."""


@dataclasses.dataclass(frozen=True)
class EncoderCase(PromptCase):
    """A pass of an encoder. Low-rank queries, keys and values have factors of single heads, as FlashSVD's have."""

    suite = "encoder"

    @property
    def script(self) -> str:
        if self.impl.startswith("torch"):
            return "peers/encoder.py"
        return "peers/jax_encoder.py" if self.impl.startswith("jax") else "encoder_ours.py"

    @property
    def preferred(self) -> str | None:
        """The implementation that ours tries first: what follows "flashsvd_jax-", but for blocks."""
        return next((part for part in self.impl.split("-")[1:] if not part.startswith("blocks")), None)

    @property
    def block_tokens(self) -> int | None:
        """Tokens that ours computes together: of "flashsvd_jax-blocks4096" 4096, of "flashsvd_jax-blocks" `BLOCK_TOKENS`."""
        part = next((part for part in self.impl.split("-")[1:] if part.startswith("blocks")), None)
        return None if part is None else int(part.removeprefix("blocks") or BLOCK_TOKENS)

    @property
    def config(self) -> EncoderConfig:
        """The model, every projection of its layers at one ratio of kept parameters."""
        dense = EncoderConfig.from_hf(SHAPES[self.model])
        if self.ratio == 1:
            return dense
        ranks = {site.name: uniform_rank(site, self.ratio) for site in layer_sites(dense)}
        groups = {}
        for site in layer_sites(dense):
            if site.name.endswith(("q_proj", "k_proj", "v_proj", "qkv_proj")):
                groups[site.name] = site.d_out // dense.head_dim
                ranks[site.name] = max(1, int(self.ratio * dense.head_dim * site.d_in / (dense.head_dim + site.d_in)))
        return EncoderConfig.from_hf(SHAPES[self.model], Factorization.of(ranks, groups=groups))

    def flops(self) -> int:
        """The layers' weights once a token, and attention over all pairs that see each other."""
        config = self.config
        specs = schema(config).items()
        weights = sum(spec.size for name, spec in specs if name.startswith("layers_") and len(spec.shape) > 1)
        tokens = self.batch * self.length
        seen = sum(self.length if w is None else min(self.length, 2 * w + 1) for w in config.windows)
        return 2 * weights * tokens + 4 * tokens * seen * config.hidden_size


CASES = [
    *(
        (model, ratio, 64, length)
        for model, length in (("bert-base", 512), ("bert-base", 128), ("bert-large", 512))
        for ratio in (0.5, 0.75, 1.0)
    ),
    *(("modernbert-base", ratio, 4, 8192) for ratio in (0.5, 1.0)),
    *(("bert-base", 0.5, batch, 512) for batch in (1, 8, 256)),
    *(("bert-base", ratio, 64, 512) for ratio in (0.25, 0.35)),
]
IMPLS = (
    "flashsvd_jax", "flashsvd_jax-blocks", "flashsvd_jax-products", "jax-cudnn", "jax-scores", "torch-eager", "torch-sdpa",
    "torch-compile",
)  # fmt: skip
"""Ours as it chooses, the same in blocks of tokens, and without rank streaming; plain JAX, attention by cuDNN and with its scores
in memory; PyTorch."""
