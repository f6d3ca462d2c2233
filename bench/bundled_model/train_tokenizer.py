"""Trains the byte-level BPE tokenizer of the bundled model and writes the corpus as token ids for `train.py`.

The tokenizer sees the training part alone. A line break and the indentation after it are one piece of text for the
merges, so that Python's usual indentations become single tokens; every byte is in the vocabulary, so any text survives
`decode(encode(text))`.
"""

import argparse
import hashlib
import json
import platform
from pathlib import Path

import numpy as np
import tokenizers
from corpus import BUNDLED, Document, collect, heldout_text
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
MAX_POSITION_EMBEDDINGS = 1024
WORK = Path(__file__).resolve().parent / ".work"

_PIECES = "|".join(
    (
        r"(?:\r?\n)+[ \t]*",  # line breaks with the indentation of the line after them
        r" ?[\p{L}_]+",  # a word or an identifier, with the one space before it
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}_]+",  # a run of operators, brackets or quotes
        r"\s+(?!\S)",
        r"\s+",
    )
)


def build_tokenizer(texts: list[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Trains a tokenizer of `vocab_size` entries; entry 0 is the end-of-text token, then come the 256 bytes."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files that `transformers.AutoTokenizer` and generation read, except the model's own config."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITION_EMBEDDINGS,
    }
    _write_json(folder / "tokenizer_config.json", config)
    eos = tokenizer.token_to_id(END_OF_TEXT)
    _write_json(folder / "generation_config.json", {"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos})


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Returns the ids of all texts in one uint16 array, an end-of-text token before each and one at the end."""
    eos = tokenizer.token_to_id(END_OF_TEXT)
    # Source text may spell the end-of-text token; encoded apart from special tokens it stays ordinary text.
    tokenizer.encode_special_tokens = True
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    tokenizer.encode_special_tokens = False
    pieces = [np.asarray([eos, *encoding.ids], dtype=np.uint16) for encoding in encoded]
    return np.concatenate([*pieces, np.asarray([eos], dtype=np.uint16)])


def write_token_files(tokenizer: Tokenizer, documents: list[Document], work: Path) -> dict[str, object]:
    """Writes `{train,validation,heldout}.npy` and `corpus.json` into `work`, and returns what corpus.json says."""
    work.mkdir(parents=True, exist_ok=True)
    texts = {part: [d.text for d in documents if d.part == part] for part in ("train", "validation")}
    texts["heldout"] = [heldout_text(documents)]
    facts: dict[str, object] = {"python": platform.python_version(), "tokenizers": tokenizers.__version__}
    for part, chosen in texts.items():
        ids = encode_documents(tokenizer, chosen)
        np.save(work / f"{part}.npy", ids)
        size = sum(len(text.encode()) for text in chosen)
        facts[part] = {
            "files": sum(d.part == part for d in documents),
            "bytes": size,
            "tokens": len(ids),
            "bytes_per_token": round(size / len(ids), 3),
            "sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
        }
    _write_json(work / "corpus.json", facts)
    return facts


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Trains the tokenizer on the running interpreter's standard library and writes all files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=BUNDLED / "stdlib-llama", help="folder of the bundled model")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the token files")
    options = parser.parse_args()

    documents = collect()
    tokenizer = build_tokenizer([d.text for d in documents if d.part == "train"])
    save_tokenizer(tokenizer, options.out)
    print(json.dumps(write_token_files(tokenizer, documents, options.work), indent=2))


if __name__ == "__main__":
    main()
