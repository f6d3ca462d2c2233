"""What the benchmark of prompts measures, as data, and the work that a prompt is."""

import dataclasses

from prompt_cases import PromptCase

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.schema import schema
from flashsvd_jax.shapes import shape_config


@dataclasses.dataclass(frozen=True)
class PrefillCase(PromptCase):
    """A prompt of a decoder, from its tokens to keys and values and the logits of its last token."""

    repeats: int = 10

    suite = "prefill"

    @property
    def script(self) -> str:
        if self.impl.startswith("torch"):
            return "peers/prefill.py"
        return "peers/jax_prefill.py" if self.impl.startswith("jax") else "prefill_ours.py"

    @property
    def config(self) -> ModelConfig:
        return shape_config(self.model, self.ratio)

    def flops(self) -> int:
        """The layers' weights once a token, the head once a sequence, and causal attention.

        Behind the last layer's attention one token of a sequence is enough.
        """
        config = self.config
        sizes = {name: spec.size for name, spec in schema(config).items() if len(spec.shape) > 1}
        layers = sum(size for name, size in sizes.items() if name.startswith("layers_"))
        last = tuple(f"layers_{config.num_layers - 1}.{part}" for part in ("self_attn.o_proj", "mlp"))
        behind = sum(size for name, size in sizes.items() if name.startswith(last))
        tokens, width = self.batch * self.length, config.num_heads * config.head_dim
        attention = 2 * config.num_layers * tokens * self.length * width
        weights = 2 * (layers * tokens - behind * (tokens - self.batch))
        return weights + 2 * config.vocab_size * config.hidden_size * self.batch + attention


CASES = [
    *(("llama-2-7b", ratio, *size) for ratio in (0.5, 1.0) for size in ((1, 512), (8, 512), (1, 8192))),
    *(("llama-3.1-8b", 0.6, *size) for size in ((1, 512), (8, 512), (1, 8192))),
]
IMPLS = ("flashsvd_jax", "jax-cudnn", "torch-sdpa", "torch-compile")
