"""Layers with a residual beside their factors, under their published names: CorDA's, and Fisher-SVD's with dense blocks."""

from collections.abc import Sequence

import torch
from compressed_modules import ABLinear, ProjLinear
from torch import nn

BLOCK = 4


class CovSVDLinear(ABLinear):  # CorDA
    def __init__(self, d_in: int, rank: int, d_out: int, bias: bool):
        super().__init__(d_in, rank, d_out, bias)
        self.weight_residual = nn.Parameter(torch.empty(d_out, d_in), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + nn.functional.linear(x, self.weight_residual)


class SVDLinearWithDenseBlocks(ProjLinear):  # Fisher-SVD
    """Blocks of `BLOCK` by `BLOCK` beside the factors; ``add_blocks`` groups them by their first input."""

    def __init__(self, d_in: int, rank: int, d_out: int, bias: bool):
        super().__init__(d_in, rank, d_out, bias)
        self.block_size, self.num_groups = BLOCK, 0

    def add_blocks(self, columns: Sequence[int], rows: Sequence[Sequence[int]]) -> None:
        """Random blocks at ``columns``, those of each at outputs that begin at ``rows``, which may repeat."""
        for group, (column, starts) in enumerate(zip(columns, rows, strict=True)):
            index = torch.cat([torch.arange(start, start + BLOCK) for start in starts])
            self.register_buffer(f"g{group}_col", torch.tensor(column))
            self.register_buffer(f"g{group}_row_index", index)
            self.register_buffer(f"g{group}_blocks_T", torch.randn(BLOCK, len(index)) * 0.3)
        self.num_groups = len(columns)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        for group in range(self.num_groups):
            column, index, blocks = (getattr(self, f"g{group}_{part}") for part in ("col", "row_index", "blocks_T"))
            y = y.index_add(-1, index, x[..., column : column + self.block_size] @ blocks)
        return y
