"""Tables of what was measured on a device, kept as data beside the kernels that they are for."""

import json
import re
from importlib import resources
from typing import Any


def table(package: str, device: str) -> Any:
    """What ``tuned/<device>.json`` of a package holds, for a device by the name that it gives itself; None if there is none."""
    name = re.sub(r"\W+", "_", device.lower()) + ".json"
    file = resources.files(package) / "tuned" / name
    return json.loads(file.read_text(encoding="utf-8")) if device and file.is_file() else None
