"""How many sequences are computed together."""

import pytest

from flashsvd_jax.length_batches import batch_within_workspace, scores_held
from pallas_kernels import Target, assume_target
from pallas_kernels.target import H200

B200, B300 = Target("cuda", "NVIDIA B200", (10, 0), 148), Target("cuda", "NVIDIA B300", (10, 3), 148)


@pytest.mark.parametrize(
    ("device", "held"),
    [(Target("cpu"), 12 * 512), (H200, 0), (B200, 0), (B300, 12 * 512)],
    ids=["cpu", "H200", "B200", "B300"],
)
def test_scores_count_where_no_kernel_does_without_them(device: Target, held: int) -> None:
    with assume_target(device):
        assert scores_held(12, 512) == held


def test_a_batch_is_a_power_of_two_within_the_workspace_and_the_need() -> None:
    assert batch_within_workspace(2**20, 10**6) == 1024
    assert batch_within_workspace(3 * 2**20, 10**6) == 256
    assert batch_within_workspace(2**20, 5) == 8
    assert batch_within_workspace(2**40, 5) == 1
