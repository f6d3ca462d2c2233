"""Kernels made to stall on a GPU: without one, that they lower, and miss exactly the words that they should."""

import jax
import pytest
from decoder_cases import DecoderCase
from described_device import as_on_device
from persistent_faults import FEW_SPINS, forgetting

from pallas_kernels import decode_layers
from pallas_kernels.persistent import kernel, multiplying

CASE = DecoderCase(2, 256, 512, 2, 2, (136, 200), (0,))


def stores(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps whose products the kernel stores, as it is lowered."""
    found, store = [], multiplying.store_words

    def counted(place: object, *rest: object) -> None:
        found.append(place.step)  # pyright: ignore[reportAttributeAccessIssue]
        store(place, *rest)  # pyright: ignore[reportArgumentType,reportCallIssue]

    monkeypatch.setattr(multiplying, "store_words", counted)
    return found


@pytest.mark.parametrize("step", [3, None])
def test_a_forgetful_kernel_lowers(step: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found, spins = stores(monkeypatch), kernel.SPINS
    with forgetting(step), as_on_device():
        assert kernel.SPINS == FEW_SPINS
        run = jax.jit(lambda *arguments: decode_layers(*arguments, implementation="persistent"))
        run.trace(*jax.eval_shape(CASE.arguments)).lower(lowering_platforms=("cuda",))
    assert set(found) == (
        set() if step is None else {0, 1, 4, 5, 6, 7, 8, 9}
    )  # 2 is attention, 10 the sum of the logits
    assert spins == kernel.SPINS
