"""Progress bars for what takes more than two seconds."""

import sys

from tqdm import tqdm


def progress_bar(what: str, total: int | None, unit: str = "it", enabled: bool = True) -> "tqdm":
    """A bar on standard error that appears after two seconds, if it is a terminal or a log; silent when not enabled."""
    scale = unit != "it"
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=scale,
        delay=2.0,
        disable=not enabled,
        file=sys.stderr,
        leave=False,
    )
