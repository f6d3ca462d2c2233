"""The persistent kernel under stress: random requests again and again, two engines in turn, never another bit.

20 000 steps unless FLASHSVD_STRESS_STEPS says more; a million take minutes, most of them the host's.
"""

import os
import random
from pathlib import Path

import numpy as np
import pytest
from persistent_faults import skip_unless_hopper

from converters import convert
from flashsvd_jax import SamplingParams, load
from flashsvd_jax.bundled import COMPRESSED, DENSE
from flashsvd_jax.engine import Engine

pytestmark = pytest.mark.gpu

STEPS = int(os.environ.get("FLASHSVD_STRESS_STEPS", "20000"))
Request = tuple[list[list[int]], list[SamplingParams]]


def requests(rng: random.Random, batch: int, longest: int) -> list[Request]:
    """Prompts of random lengths, with completions of random lengths, some of which are broken off early."""
    found = []
    for _ in range(6):
        lengths = [rng.randint(1, longest // 2) for _ in range(rng.randint(1, batch))]
        prompts = [[rng.randint(1, 4000) for _ in range(length)] for length in lengths]
        limits = [rng.randint(1, longest - length) for length in lengths]
        params = [SamplingParams(temperature=0.0, max_tokens=limit, ignore_eos=True) for limit in limits]
        found.append((prompts, params))
    return found


def tokens(engine: Engine, request: Request, blocks: int | None = None) -> np.ndarray:
    """All tokens, or those of the first blocks: a request that is dropped half way."""
    found = []
    for number, block in enumerate(engine.generate(*request)):
        if number == blocks:
            break
        found.append(block.tokens)
    return np.concatenate(found)


def test_no_bit_changes_in_many_steps(tmp_path: Path) -> None:
    skip_unless_hopper()
    convert(COMPRESSED, tmp_path / "model", base=DENSE, progress=False)
    rng, engines = random.Random(0), []
    for batch, longest, chunk in ((1, 500, 64), (4, 190, 8)):
        model = load(tmp_path / "model", kernels="persistent", max_length=longest, dtype="bfloat16")
        sizes = {"batch": batch, "max_length": longest, "decode_chunk": chunk}
        engine = Engine(model.config, model.weights, kernels="persistent", **sizes)
        engines.append([(engine, r, tokens(engine, r)) for r in requests(rng, batch, longest)])
        assert set(engine.kernels_used["decode_layers"]) == {"persistent"}
    done = 0
    while done < STEPS:
        engine, request, want = rng.choice(engines[rng.randint(0, 1)])
        blocks = rng.choice([None, None, 3])
        got = tokens(engine, request, blocks)
        np.testing.assert_array_equal(got, want[: len(got)])
        assert blocks is not None or len(got) == len(want)
        done += len(got)
