"""Names of the files in a model's folder."""

from pathlib import Path

CONFIG_FILE = "config.json"
MANIFEST_FILE = "factorization.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CHECKSUMS_FILE = "SHA256SUMS"

# Files of the base model that a factorized one needs unchanged: how text becomes tokens, and how to sample.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def shard_file(number: int, count: int) -> str:
    """Name of shard ``number`` (from 1) of ``count``, as Hugging Face names it; a single one has a plain name."""
    return WEIGHTS_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def companion_files(folder: Path) -> list[Path]:
    """The tokenizer and generation files that a folder has."""
    return [folder / name for name in COMPANION_FILES if (folder / name).is_file()]
