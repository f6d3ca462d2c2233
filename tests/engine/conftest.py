"""One tiny model with a real tokenizer for every test of this folder, and engines over it that are compiled once."""

import dataclasses
import functools
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hf_models
import pytest
from compiled_decoder import device_weights
from kept_executables import jax_options
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.engine import Engine
from flashsvd_jax.models.weights import DecoderWeights
from flashsvd_jax.sampling import SamplingParams
from flashsvd_jax.tokenizer import Tokenizer

MAX_LENGTH = 96
VOCAB = 320
TRAINING_TEXT = [
    "the quick brown fox jumps over the dog",
    "naïve café, über Straße",
    "日本語 日本 テスト",
    "😀😃 👍🏽 good",
]
END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True, eq=False)
class Tiny:
    """A factorized model, small enough to compile in a second; ``engine`` gives the same object for the same arguments."""

    config: ModelConfig
    weights: DecoderWeights

    @functools.cache  # noqa: B019  # lives as long as the session
    def engine(self, batch: int = 1, decode_chunk: int = 8, prefill_chunk: int = 16) -> Engine:
        return self.new_engine(batch, decode_chunk, prefill_chunk)

    def new_engine(self, batch: int = 1, decode_chunk: int = 8, prefill_chunk: int = 16) -> Engine:
        sizes = {"batch": batch, "decode_chunk": decode_chunk, "prefill_chunk": prefill_chunk}
        return Engine(self.config, self.weights, max_length=MAX_LENGTH, **sizes)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": MAX_LENGTH, "num_hidden_layers": 1}
    model = hf_models.build_model("llama_tied", **sizes)
    ranks = hf_models.mixed_ranks(ModelConfig.from_hf(model.config.to_dict()))
    hf_models.factorize(model, ranks)
    reference = hf_models.reference_of(model, ranks)
    return Tiny(reference.config, device_weights(reference))


@pytest.fixture(scope="session")
def complete() -> Callable[[Engine, Sequence[Sequence[int]], Sequence[SamplingParams]], list[list[int]]]:
    """Runs an engine to its end: each row's tokens, the rows that only fill the batch included."""

    def run(engine: Engine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in range(engine.batch)]
        for block in engine.generate(prompts, params):
            assert block.tokens.shape[1] == engine.batch
            for row, column in zip(rows, block.tokens.T.tolist(), strict=True):
                row += [token for token in column if token >= 0]
        return rows

    return run


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE, as Llama 3 and Qwen have: most characters beyond ASCII take several tokens."""
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 10,  # models often know more ids than their tokenizer
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    backend.train_from_iterator(TRAINING_TEXT, trainer)
    return _saved(backend, tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As Llama 1 and 2 have: spaces are marks before words, and a character that is no token falls back to its bytes."""
    letters = ["\u2581", *string.ascii_letters, *".,!?\n\u00e9"]
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("\u2581", "\u2581"), ("o", "o"), ("\u2581", "a")]
    tokens = ["<unk>", END_OF_TEXT, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *map("".join, merges)]
    vocab = {token: number for number, token in enumerate(tokens)}
    backend = BackendTokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return _saved(backend, tmp_path_factory.mktemp("sentencepiece"))


def _saved(backend: BackendTokenizer, folder: Path) -> Tokenizer:
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT).save_pretrained(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module", autouse=True)
def kept_executables(executables_folder: Path) -> Iterator[None]:
    """Keeps executables on disk for the session: engines that differ in one step share the others, across workers too."""
    with jax_options(
        jax_compilation_cache_dir=str(executables_folder),
        jax_persistent_cache_min_compile_time_secs=0.0,
        jax_persistent_cache_min_entry_size_bytes=-1,
    ):
        yield


@pytest.fixture(scope="session")
def executables_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    base = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # a worker of pytest-xdist, whose folder lies in the one of all
        base = base.parent
    return base / "engine_executables"
