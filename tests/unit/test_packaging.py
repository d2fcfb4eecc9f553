"""The wheel holds the package, asks for the right things, and imports without any of them."""

import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_cogview import __version__

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that no build output lands in the tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("megatron_cogview", "tests", "tools"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    out = tmp_path_factory.mktemp("wheel")
    code = f"import setuptools.build_meta as b; b.build_wheel({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def requirements(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "megatron-cogview"
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.11"
    return [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]


def pins() -> dict[str, str]:
    """Name and version of each line of constraints.txt."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            found[canonicalize_name(name)] = version
    return found


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {n for n in archive.namelist() if ".dist-info/" not in n}
        assert any(n.endswith("LICENSE") for n in archive.namelist())
    written = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "megatron_cogview").rglob("*.py")
        if (path.parent / "__init__.py").is_file()
    }
    assert held == written | {"megatron_cogview/py.typed"}


def test_every_folder_with_code_is_a_package() -> None:
    package = ROOT / "megatron_cogview"
    folders = {
        folder
        for path in package.rglob("*.py")
        for folder in path.parents
        if folder.is_relative_to(package)
    }
    assert [f.name for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def test_requirements_are_pinned_and_satisfied_by_the_pins(wheel: Path) -> None:
    pinned = pins()
    for requirement in requirements(wheel):
        extra = str(requirement.marker or "")
        if "deepspeed" in extra or "eval" in extra:
            continue
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), (requirement, version)
    assert pinned["torch"] == "2.13.0"
    assert pinned["megatron-core"] == "0.16.1"


def test_optional_accelerators_are_never_required(wheel: Path) -> None:
    names = {canonicalize_name(r.name) for r in requirements(wheel)}
    # The public index's "apex" is an unrelated package; no extra may name it either.
    assert not names & {"apex", "nvidia-apex", "transformer-engine", "flash-attn"}
    # For the tests, which interpret and compile the kernels; torch's CUDA builds bring it.
    assert {str(r.marker) for r in requirements(wheel) if r.name == "triton"} == {'extra == "dev"'}
    plain = {canonicalize_name(r.name) for r in requirements(wheel) if r.marker is None}
    assert not plain & {"deepspeed", "triton"}
    assert {"torch", "megatron-core", "psutil", "numpy", "pillow", "sentencepiece"} <= plain


def test_wheel_imports_with_nothing_installed(wheel: Path) -> None:
    """-S leaves site-packages out, so an import of any third-party package would fail."""
    code = (
        f"import sys; sys.path.insert(0, {str(wheel)!r});"
        "import megatron_cogview, megatron_cogview.tasks.plan as plan;"
        "from megatron_cogview.configs.presets import preset;"
        "plan.run(preset('base_4b'), gpus=64, gpu_memory_gib=80, auto_layout=True);"
        "assert megatron_cogview.__file__.startswith(sys.path[0])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "3,929,175,040 parameters" in done.stdout


def test_setup_knows_no_torch() -> None:
    source = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import|from) +(torch|numpy|megatron)", source, re.M)


def test_constraints_hold_exact_versions_without_local_builds() -> None:
    versions = pins()
    assert len(versions) > 40
    assert not [v for v in versions.values() if not re.fullmatch(r"[0-9][0-9a-z.]*", v)]


def test_continuous_integration_runs_what_a_user_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert text.rstrip().endswith("make check test")
