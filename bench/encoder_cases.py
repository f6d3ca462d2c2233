"""What the encoder benchmark measures, as data, and the work that a pass is."""

import dataclasses
import json
from typing import Any

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

SHAPES: dict[str, dict[str, Any]] = {
    "bert-base": _BERT | _BASE,
    "bert-large": _BERT | _LARGE,
    "tiny": _BERT | _TINY | {"vocab_size": 128, "max_position_embeddings": 64},
}


@dataclasses.dataclass(frozen=True)
class EncoderCase:
    """One measurement by one implementation, in a process of its own; ``ratio`` 1 is the dense model."""

    impl: str
    model: str
    ratio: float
    batch: int
    length: int
    repeats: int = 20

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "EncoderCase":
        return cls(**json.loads(text))

    @property
    def config(self) -> EncoderConfig:
        """The model, every projection of its layers at one ratio of kept parameters."""
        dense = EncoderConfig.from_hf(SHAPES[self.model])
        if self.ratio == 1:
            return dense
        ranks = {site.name: uniform_rank(site, self.ratio) for site in layer_sites(dense)}
        return EncoderConfig.from_hf(SHAPES[self.model], Factorization.of(ranks))

    def described(self) -> dict[str, Any]:
        """The keys that say what a row is of."""
        return {"suite": "encoder", **{k: v for k, v in dataclasses.asdict(self).items() if k != "repeats"}}

    def flops(self) -> int:
        """Multiplications and additions of a pass: the layers' weights once a token, and attention over all pairs."""
        config = self.config
        weights = sum(
            spec.size for name, spec in schema(config).items() if name.startswith("layers_") and len(spec.shape) == 2
        )
        tokens = self.batch * self.length
        return 2 * weights * tokens + 4 * config.num_layers * tokens * self.length * config.hidden_size


CASES = [
    (model, ratio, 64, length)
    for model, length in (("bert-base", 512), ("bert-base", 128), ("bert-large", 512))
    for ratio in (0.5, 0.75, 1.0)
]
IMPLS = ("flashsvd_jax", "torch-eager", "torch-sdpa", "torch-compile")
