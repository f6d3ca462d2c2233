"""Converts the bundled checkpoint, completes a prompt and measures held-out perplexity, dense and compressed.

Writes measured.json beside the models; `bench/report.py` puts it into the README.
"""

import importlib.metadata
import json
import tempfile
from pathlib import Path

import jax

from converters import convert
from flashsvd_jax import generate, load
from flashsvd_jax.bundled import COMPRESSED, DENSE, HELDOUT
from flashsvd_jax.cli.demo import OPTIONS, PROMPT
from flashsvd_jax.schema import count_params
from flashsvd_jax.scoring import perplexity

TOKENS = 120


def main() -> None:
    """Measures both models and writes what was found."""
    text = HELDOUT.read_text(encoding="utf-8")
    found: dict[str, object] = {
        "prompt": PROMPT,
        "options": OPTIONS,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, source in (("dense", DENSE), ("compressed", COMPRESSED)):
            convert(source, Path(folder, name), base=DENSE, progress=False)
            model = load(Path(folder, name), max_length=1024, dtype="float32")
            result = perplexity(model, text)
            found[name] = {
                "parameters": count_params(model.config),
                "perplexity": round(result.value, 3),
                "standard_error": round(result.standard_error, 3),
                "tokens": result.tokens,
                "completion": generate(model, PROMPT, max_tokens=TOKENS, **OPTIONS),
            }
    found["flashsvd_jax"] = importlib.metadata.version("flashsvd-jax")
    DENSE.parent.joinpath("measured.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
