"""What decoding a token costs in time, as measured: bytes over a bandwidth, and something for each layer and each product.

Layers of different ranks cost more than layers that are alike, of the same bytes and products.

`bench/decode_costs.py` fits it to rows of the decode benchmark, batch 1. A product is one of the matrices that a step multiplies
with: dense projections of one input are one, their factors two, because the second waits for the first.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashsvd_jax.errors import RequestError, first_line

COSTS_FILE = Path(__file__).with_name("decode_costs.json")
DEFAULT_COSTS = "nvidia_h200/persistent"


@dataclasses.dataclass(frozen=True)
class DecodeCosts:
    """Of one device and one kind of kernels.

    Attributes:
      name: of both.
      read_tb_s: bandwidth of reads, in 10^12 bytes a second.
      us_a_layer, us_a_product: microseconds beyond that.
      us_a_differing_layer: microseconds more for each layer, where not all layers have the same ranks.
    """

    name: str
    read_tb_s: float
    us_a_layer: float
    us_a_product: float
    us_a_differing_layer: float = 0.0

    def milliseconds(self, read: float, *, products: float = 0.0, layers: int = 0, differ: bool = False) -> float:
        """Time for so many bytes, products and layers, whose ranks may ``differ``."""
        a_layer = self.us_a_layer + (self.us_a_differing_layer if differ else 0.0)
        return read / self.read_tb_s / 1e9 + (products * self.us_a_product + layers * a_layer) / 1e3


def load_costs(name: str = DEFAULT_COSTS, file: Path = COSTS_FILE) -> DecodeCosts:
    """Costs by name, such as "nvidia_h200/persistent".

    Raises:
      RequestError: the file cannot be read, has none of that name, or numbers that mean nothing.
    """
    try:
        tables: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        known = [key for key in tables if isinstance(tables[key], dict)]
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(f"{file} cannot be read as a table of costs: {first_line(error)}") from error
    if name not in known:
        raise RequestError(f"{file} has no costs of {name!r}; it has {', '.join(known) or 'none'}")
    fields = tables[name]
    numbers = [fields.get(field) for field in ("read_tb_s", "us_a_layer", "us_a_product", "us_a_differing_layer")]
    if not all(isinstance(n, int | float) and 0 <= n < float("inf") for n in numbers) or not numbers[0]:
        raise RequestError(
            f"{file}: {name} needs read_tb_s above 0, us_a_layer, us_a_product and us_a_differing_layer of 0 or more"
        )
    return DecodeCosts(name, *numbers)
