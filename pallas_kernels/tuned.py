"""Tables of what was measured on a device, kept as data beside the kernels that they are for."""

import json
import re
from importlib import resources
from typing import Any


def table(package: str, device: str, subject: str = "") -> Any:
    """What ``tuned/<device>.json`` of a package, or ``tuned/<device>_<subject>.json``, holds; None if there is none.

    A device goes by the name that it gives itself.
    """
    name = re.sub(r"\W+", "_", f"{device.lower()} {subject}".strip()) + ".json"
    file = resources.files(package) / "tuned" / name
    return json.loads(file.read_text(encoding="utf-8")) if device and file.is_file() else None
