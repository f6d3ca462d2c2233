"""What is in the wheel, what importing it costs, and what the repository must not hold."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("converters", "flashsvd_jax", "pallas_kernels")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# No path of a machine, and no package registry: what is written here holds wherever it is read.
_FOREIGN = re.compile(r"/(?:root|home)/|pypi\.org|pythonhosted\.org|npmjs\.org|deb\.debian\.org")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """Built from a copy, so that a build folder left in the tree can neither help nor hurt."""
    tree, out = tmp_path_factory.mktemp("tree") / "copy", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info"))
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    (file,) = out.iterdir()
    with zipfile.ZipFile(file) as opened:
        yield opened


def _requirement_name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_wheel_holds_the_packages_and_their_data_alone(wheel: zipfile.ZipFile) -> None:
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    code = {path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    data = {
        ROOT / "flashsvd_jax/py.typed",
        ROOT / "flashsvd_jax/compress/decode_costs.json",
        *(path for path in (ROOT / "flashsvd_jax/bundled").rglob("*") if path.is_file() and path.suffix != ".pyc"),
        *(ROOT / "pallas_kernels").rglob("*.json"),
    }
    assert files == {path.relative_to(ROOT).as_posix() for path in code | data}
    assert {name.split("/")[0] for name in files} == set(PACKAGES)


def test_wheel_carries_its_licences(wheel: zipfile.ZipFile) -> None:
    for licence in PROJECT["license-files"]:
        (packed,) = (name for name in wheel.namelist() if name.endswith(f".dist-info/licenses/{licence}"))
        assert wheel.read(packed) == (ROOT / licence).read_bytes()


def test_running_does_not_ask_for_pytorch(wheel: zipfile.ZipFile) -> None:
    needed = [line for line in _metadata(wheel).get_all("Requires-Dist", []) if "extra ==" not in line]
    assert len(needed) == len(PROJECT["dependencies"])
    assert "torch" not in map(_requirement_name, needed)


def test_every_import_is_declared() -> None:
    developers = {"test", "dev"}
    extras = (lines for extra, lines in PROJECT["optional-dependencies"].items() if extra not in developers)
    declared = {_requirement_name(line) for lines in (PROJECT["dependencies"], *extras) for line in lines}
    distributions = importlib.metadata.packages_distributions()
    # PyTorch serves a comparison that is left out where it is not installed.
    known = {*sys.stdlib_module_names, *PACKAGES, "torch"}
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for module in _imported(path) - known:
            providers = {_requirement_name(name) for name in distributions.get(module, [module])}
            assert providers & declared, f"{path} imports {module}, which pyproject.toml does not ask for"


def _imported(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_console_script_starts() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="flashsvd")
    assert callable(script.load())


def test_import_leaves_the_heavy_packages_out() -> None:
    use = "import flashsvd_jax, sys; flashsvd_jax.load, flashsvd_jax.generate; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", use], check=True, capture_output=True, text=True)
    assert {"flashsvd_jax.engine", "jax"} <= set(run.stdout.split())
    assert not {"torch", "transformers", "converters"} & set(run.stdout.split())


def test_repository_names_no_machine() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True)
    found = []
    for path in (ROOT / name for name in listed.stdout.split("\0") if name):
        try:
            lines = path.read_text().splitlines()
        except (UnicodeDecodeError, FileNotFoundError):  # not text, or deleted but not yet committed
            continue
        found += [
            f"{path}:{number}: {line.strip()[:120]}" for number, line in enumerate(lines, 1) if _FOREIGN.search(line)
        ]
    assert not found
