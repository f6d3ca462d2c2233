"""Compresses a random dense model of a published shape as `flashsvd compress --resume` does: time, memory, kill and resume.

The checkpoint is written to a scratch folder, in Hugging Face's form; a process of its own compresses it, and may be killed after
some layers (--kill-after), or when the budget is over: the same call then goes on where it was, the checkpoint and finished layers
included. When all is done, a row is added to bench/results/DEVICE/compression_large.jsonl and the scratch folder is deleted.
"""

import argparse
import dataclasses
import filecmp
import importlib.metadata
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jobs import append_row, results_folder
from random_checkpoint import NAMES, write_checkpoint
from reporting import compression_large
from watched_process import watch

from flashsvd_jax.benchmark import provenance
from flashsvd_jax.checkpoint.layout import INDEX_FILE
from flashsvd_jax.inspection import inspect

# The command, and in the end what only the process itself knows: its device and how much of it was used.
_PROCESS = """
import json, sys
import jax
from flashsvd_jax.cli import main
code = main(sys.argv[2:])
device = jax.devices()[0]
peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
name = "cpu" if device.platform == "cpu" else device.device_kind
with open(sys.argv[1], "w") as file:
    json.dump({"device": name, "device_peak_gib": peak and round(peak / 2**30, 3)}, file)
sys.exit(code)
"""


class Compression:
    """The runs of one scratch folder; what is known of those before this process is in its state.json.

    Args:
      scratch: the folder.
      options: of the command line.
      deadline: on the monotonic clock, after which nothing may run.
    """

    def __init__(self, scratch: Path, options: argparse.Namespace, deadline: float):
        self._scratch, self._options, self._deadline = scratch, options, deadline
        self._state_file = scratch / "state.json"
        names = ("shape", "layers", "method", "ratio", "alloc", "samples", "length", "kill_after", "compare")
        settings = {name: getattr(options, name) for name in names}
        self.state: dict[str, Any] = {"settings": settings, "runs": [], "whole_runs": []}
        if self._state_file.exists():
            self.state = json.loads(self._state_file.read_text(encoding="utf-8"))
            if self.state["settings"] != settings:
                raise SystemExit(f"{scratch} is of {self.state['settings']}: delete it, or give another --scratch")

    def write_checkpoint(self) -> None:
        """The dense model, unless it is there."""
        if (self._scratch / "dense" / INDEX_FILE).exists():
            return
        begin = time.monotonic()
        write_checkpoint(self._scratch / "dense", self._options.shape, self._options.layers)
        self._keep(checkpoint_s=round(time.monotonic() - begin, 1))

    def compress(self) -> bool:
        """Runs the command until its folder is there, killed once on the way if that is asked for; False at the deadline."""
        begun = any(run["layer_s"] for run in self.state["runs"])
        return self._until_done("out", "runs", None if begun else self._options.kill_after)

    def compare(self) -> bool:
        """Makes the same once more, interrupted by nothing but the budget, and says how alike both are; False at the deadline."""
        if not self._until_done("whole", "whole_runs", None):
            return False
        folders = [self._scratch / name for name in ("whole", "out")]
        names, others = (sorted(file.name for file in folder.iterdir()) for folder in folders)
        equal, differ, failed = filecmp.cmpfiles(*folders, names, shallow=False)
        self._keep(identical=names == others == sorted(equal), different_files=[*differ, *failed])
        return True

    def row(self) -> dict[str, Any]:
        """What there is to say of it."""
        state, runs, found = self.state, self.state["runs"], inspect(self._scratch / "out")
        versions = {name: importlib.metadata.version(name) for name in ("jax", "numpy")}
        return {
            "suite": "compression_large", "model": self._options.shape, **state["settings"], "layers": found.num_layers,
            "params_dense": found.params_dense, "params": found.params, "cores": len(os.sched_getaffinity(0)),
            "seconds": round(sum(run["seconds"] for run in runs), 1), "checkpoint_s": state["checkpoint_s"],
            "convert_s": next((run["convert_s"] for run in runs if run["convert_s"] is not None), None),
            "layer_s": statistics.median([s for run in runs for s in run["layer_s"]] or [0]),
            "peak_rss_gib": max(run["peak_rss_gib"] for run in runs),
            "peak_anonymous_gib": max(run["peak_anonymous_gib"] for run in runs),
            "device": runs[-1]["device"], "device_peak_gib": runs[-1]["device_peak_gib"],
            "killed": sum(run["exit_code"] != 0 for run in runs), "identical": state.get("identical"),
            "different_files": state.get("different_files"),
            "runs": runs, "whole_runs": state["whole_runs"], "versions": versions, **provenance(),
        }  # fmt: skip

    def _until_done(self, name: str, runs: str, kill_after: int | None) -> bool:
        out = self._scratch / name
        while not out.exists() and time.monotonic() <= self._deadline:
            run = self._run(out, kill_after)
            self._keep(**{runs: [*self.state[runs], run]})
            kill_after = None if run["layer_s"] else kill_after
        return out.exists()

    def _run(self, out: Path, enough: int | None) -> dict[str, Any]:
        """One process, killed when ``enough`` layers are done: what was measured of it."""
        o, report = self._options, self._scratch / "process.json"
        report.unlink(missing_ok=True)
        command = [
            sys.executable, "-c", _PROCESS, str(report), "compress", str(self._scratch / "dense"), str(out), "--quiet",
            "--method", o.method, "--ratio", str(o.ratio), "--alloc", o.alloc, "--samples", str(o.samples),
            "--length", str(o.length), "--resume",
        ]  # fmt: skip
        env = dict(os.environ)
        if o.compare:  # how products are computed is else tried out by each process, and may differ between two
            env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
        progress = Progress(out.with_name(f".{out.name}.resume"))

        def over() -> bool:
            done = progress.look()
            return time.monotonic() > self._deadline or (enough is not None and done >= enough)

        found = watch(command, env, over)
        if found.exit_code and not found.killed:
            raise SystemExit(f"the command failed with {found.exit_code}")
        known = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
        return {**dataclasses.asdict(found), **progress.times(), "device": None, "device_peak_gib": None, **known}

    def _keep(self, **fields: Any) -> None:
        self.state |= fields
        self._state_file.write_text(json.dumps(self.state, indent=1), encoding="utf-8")


class Progress:
    """How far a run is, by the folder of its finished layers, which is there once the checkpoint is converted."""

    def __init__(self, work: Path):
        self._work, self._begin = work, time.monotonic()
        self._resumed, self._begun, self._seen = len(self._layers()), None, {}

    def look(self) -> int:
        """Notes what is new; the number of files of finished layers."""
        now, layers = time.monotonic() - self._begin, self._layers()
        if self._begun is None and self._work.exists():
            self._begun = now
        for layer in layers:
            self._seen.setdefault(layer, now)
        return len(layers)

    def times(self) -> dict[str, Any]:
        """Seconds until the first layer was begun, unless earlier runs had finished some, and those that each layer took."""
        at = sorted(self._seen.values())[self._resumed :]
        steps = [round(b - a, 1) for a, b in itertools.pairwise(at if self._resumed else [self._begun or 0.0, *at])]
        return {"convert_s": None if self._resumed or self._begun is None else round(self._begun, 1), "layer_s": steps}

    def _layers(self) -> list[str]:
        return [file.name for file in self._work.glob("layer_*.safetensors")]


def main() -> int:
    """Runs what is missing; 0 when the row is there, 1 where the budget ended before."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--shape", choices=NAMES, default="llama-2-7b")
    add("--layers", type=int, help="of the shape, if not all")
    add("--method", default="drone")
    add("--ratio", type=float, default=0.6)
    add("--alloc", default="uniform")
    add("--samples", type=int, default=128, help="windows of the calibration text")
    add("--length", type=int, default=512, help="tokens of each")
    add("--kill-after", type=int, metavar="N", help="kill the first process when it has finished so many layers")
    add("--compare", action="store_true", help="make the same once more without an interruption, and compare the files")
    add("--budget", type=float, default=float("inf"), metavar="S", help="kill what runs after so long")
    add("--scratch", type=Path, help="for all files; beside it are two to four times the checkpoint's bytes")
    add("--out", type=Path, help="file of rows; by the device if not given")
    options = parser.parse_args()
    deadline = time.monotonic() + options.budget
    named = f"flashsvd-compress-{options.shape}-{options.layers or 'all'}-{options.method}"
    scratch = options.scratch or Path(tempfile.gettempdir(), named)
    scratch.mkdir(parents=True, exist_ok=True)
    work = Compression(scratch.absolute(), options, deadline)
    work.write_checkpoint()
    if not (work.compress() and (not options.compare or work.compare())):
        print(f"the budget is over; the same call goes on from {scratch}")
        return 1
    row = work.row()
    append_row(options.out or results_folder(row["device"]) / "compression_large.jsonl", row)
    shutil.rmtree(scratch)
    print(compression_large.table([row]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
