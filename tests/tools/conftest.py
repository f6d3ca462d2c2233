"""One tiny model with a character tokenizer and a chat template: in transformers, as a folder, and loaded."""

import dataclasses
import os
import string
from pathlib import Path

import hf_models
import numpy as np
import pytest
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as BackendTokenizer
from transformers import PreTrainedTokenizerFast

from flashsvd_jax.checkpoint import Manifest, save_params
from flashsvd_jax.checkpoint.layout import companion_files
from flashsvd_jax.model import Model, load
from flashsvd_jax.schema import count_params

MAX_POSITION = 128
SHORT = 32
CHARACTERS = sorted(set(string.printable) - set("\x0b\x0c\r"))
VOCAB = ["<pad>", "<s>", "</s>", *CHARACTERS]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """The model in all its forms; values are float32 everywhere. ``short`` is the model with room for SHORT tokens."""

    reference: hf_models.Reference
    folder: Path
    model: Model
    short: Model

    def logprobs(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """What transformers says: log-probability of each token but the first, and whether it is the likeliest."""
        logits = torch.tensor(self.reference.logits(np.array([ids]))[0, :-1])
        targets = torch.tensor(ids[1:])
        chosen = torch.log_softmax(logits.double(), -1).gather(1, targets[:, None])[:, 0]
        return chosen.numpy(), (logits.argmax(-1) == targets).numpy()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    # Not the user's own cache, but one: every test that loads the model anew would compile it anew.
    os.environ.setdefault("FLASHSVD_CACHE_DIR", str(tmp_path_factory.mktemp("executables")))
    files = tmp_path_factory.mktemp("tokenizer")
    _tokenizer().save_pretrained(files)
    sizes = {"num_hidden_layers": 1, "vocab_size": len(VOCAB), "max_position_embeddings": MAX_POSITION}
    dense = hf_models.build_model("llama", **sizes, bos_token_id=1, eos_token_id=2)
    ranks = hf_models.mixed_ranks(hf_models.reference_of(dense).config)
    hf_models.factorize(dense, ranks)
    reference = hf_models.reference_of(dense, ranks)
    config = reference.config
    manifest = Manifest(
        family="svdllm",
        dtype="float32",
        factorization=config.factorization,
        params=count_params(config),
        params_dense=count_params(config.dense()),
        base_model="owner/base",
        notes=("made by a test",),
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    hf_config = reference.model.config.to_dict()
    save_params(folder, reference.params, config, hf_config, manifest, copy_files=companion_files(files))
    model = load(folder)
    return Tiny(reference, folder, model, Model(model.config, model.weights, model.tokenizer, max_length=SHORT))


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; encoding puts <s> first."""
    backend = BackendTokenizer(models.WordLevel({token: i for i, token in enumerate(VOCAB)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"(.|\n)"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )
