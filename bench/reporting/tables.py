"""Tables of the README made from rows, in Markdown. Each function gives "" where none of its rows exist."""

import dataclasses
from collections.abc import Iterable, Sequence

from reporting.rows import IMPLEMENTATIONS, OURS, Results, Setting

MAIN = {"model": "llama-2-7b", "batch": 1, "context": 512}


def decode(results: Results) -> str:
    """Milliseconds a token of every implementation, beside the floor that the bytes read set."""
    settings = results.settings()
    impls = results.implementations(settings)
    lines = []
    for setting in settings:
        own = results.own(setting)
        floor = f"{own['floor_ms']:.2f}" if own else "-"
        lines.append([*_what(setting), floor, *(_cell(results, setting, impl) for impl in impls)])
    return markdown(["model", "kept", "batch", "context", "floor", *(IMPLEMENTATIONS[impl] for impl in impls)], lines)


def start(compiled: Results, cached: Results) -> str:
    """Time to the first token, and the first call of a process with and without executables of an earlier one."""
    lines = []
    for setting in compiled.settings():
        impl = next((i for i in OURS if compiled.row(setting, i) and cached.row(setting, i)), None)
        if impl is None:
            continue
        row, again = compiled.by_setting[setting][impl], cached.by_setting[setting][impl]
        if row["commit"] == again["commit"]:
            times = [f"{row['prefill_ms']:.1f}", f"{row['cold_start_s']:.1f} s", f"{again['cold_start_s']:.1f} s"]
            lines.append([*_what(setting), IMPLEMENTATIONS[impl], *times])
    return markdown(["model", "kept", "batch", "context", "with", "prompt ms", "first call", "cached"], lines)


def low_rank_against_dense(results: Results) -> str:
    """What share of the dense model's time is left, beside the share of its bytes."""
    settings = results.settings(**MAIN)
    dense = next((setting for setting in settings if setting.ranks == "dense"), None)
    if dense is None or (own_dense := results.own(dense)) is None:
        return ""
    impls = [impl for impl in OURS if results.value(dense, impl) is not None]
    lines = []
    for setting in settings:
        own = results.own(setting)
        if setting == dense or own is None:
            continue
        times = [_share(results.value(setting, impl), results.value(dense, impl)) for impl in impls]
        lines.append([setting.kept_text, _share(own["bytes_per_token"], own_dense["bytes_per_token"]), *times])
    return markdown(["kept", "bytes", *(f"time, {IMPLEMENTATIONS[impl]}" for impl in impls)], lines)


def allocated_against_uniform(results: Results) -> str:
    """Milliseconds a token with ranks chosen by time, beside those with uniform ranks and as many parameters."""
    pairs = []
    for setting in results.settings():
        uniform = dataclasses.replace(setting, ranks="uniform")
        if setting.ranks.startswith("allocated") and uniform in results.by_setting:
            pairs.append((setting, uniform))
    impls = [impl for impl in OURS if any(results.value(s, impl) and results.value(u, impl) for s, u in pairs)]
    lines = []
    for setting, uniform in pairs:
        cells = [_beside(results, setting, uniform, impl) for impl in impls]
        if any(cell != "-" for cell in cells):
            lines.append([setting.model, setting.kept_text, str(setting.batch), str(setting.context), *cells])
    return markdown(["model", "kept", "batch", "context", *(IMPLEMENTATIONS[impl] for impl in impls)], lines)


def _beside(results: Results, setting: Setting, other: Setting, impl: str) -> str:
    own, theirs = results.value(setting, impl), results.value(other, impl)
    return "-" if own is None or theirs is None else f"{own:.2f}, uniform {theirs:.2f} ({own / theirs - 1:+.1%})"


def speedups(results: Results) -> str:
    """How many times as fast as each other implementation flashsvd_jax decodes, in the fastest of its own ways."""
    settings = [setting for setting in results.settings() if results.own(setting) is not None]
    others = [impl for impl in results.implementations(settings) if impl != OURS[0]]
    if not others:
        return ""
    lines = []
    for setting in settings:
        own = results.own(setting)
        times = [results.value(setting, other) for other in others]
        best = own["ms_per_token"] if own else 0.0
        cells = ["-" if time is None or time == best else f"{time / best:.2f}" for time in times]
        if any(cell != "-" for cell in cells):
            lines.append([*_what(setting), *cells])
    return markdown(["model", "kept", "batch", "context", *(IMPLEMENTATIONS[other] for other in others)], lines)


def end_to_end(results: Results) -> str:
    """Milliseconds from a call to its last token."""
    settings = results.settings("end-to-end")
    impls = results.implementations(settings)
    lines = []
    for setting in settings:
        cells = [_number(results, setting, impl, "total_ms", 1) for impl in impls]
        new_tokens = next(iter(results.by_setting[setting].values()))["new_tokens"]
        lines.append([*_what(setting)[:3], f"{setting.context} + {new_tokens}", *cells])
    return markdown(["model", "kept", "batch", "tokens", *(IMPLEMENTATIONS[impl] for impl in impls)], lines)


def _what(setting: Setting) -> list[str]:
    return [setting.model, setting.kept_text, str(setting.batch), str(setting.context)]


def _cell(results: Results, setting: Setting, impl: str) -> str:
    """Milliseconds a token, ours with the share of the bandwidth."""
    share = results.value(setting, impl, "fraction_of_bandwidth")
    return _number(results, setting, impl, "ms_per_token", 2) + (
        "" if impl not in OURS or share is None else f" ({share:.0%})"
    )


def _number(results: Results, setting: Setting, impl: str, key: str, digits: int) -> str:
    """A number of a row; "fails" for a failure, "-" where nothing was measured."""
    row = results.row(setting, impl)
    if row is None:
        return "-"
    return "fails" if "error" in row else f"{row[key]:.{digits}f}"


def _share(part: float | None, whole: float | None) -> str:
    return "-" if part is None or whole is None else f"{part / whole:.0%}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; "" without lines."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows]) if rows else ""
