"""Imports point downward: the contract holds for the tree and notices what would break it."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_cogview"
MEGATRON_USERS = (
    "model",
    "engines",
    "parallel",
    "testing",
    "analysis/data_speed",
    "analysis/training_speed",
    "checkpoint/sharded.py",
    "generation/decoder.py",
)


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the contract of ``folder/pyproject.toml`` on the package beside it."""
    code = (
        "import sys; from importlinter.cli import lint_imports;"
        "sys.exit(lint_imports(config_filename='pyproject.toml', no_cache=True))"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def imports_of(path: Path) -> set[str]:
    """Every module that the file imports, by full name; the package has no relative imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def users_of(prefix: str) -> list[str]:
    """Files of the package that import ``prefix`` or something inside it."""
    return [
        path.relative_to(PACKAGE).as_posix()
        for path in sorted(PACKAGE.rglob("*.py"))
        if any(f"{name}.".startswith(f"{prefix}.") for name in imports_of(path))
    ]


def test_the_tree_keeps_the_contract() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kept, 0 broken" in done.stdout


@pytest.fixture
def skeleton(tmp_path: Path) -> Path:
    """A copy of the contract with one empty module per layer."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for layer in ("configs", "storage", "data", "training", "tasks", "testing", "engines"):
        folder = tmp_path / "megatron_cogview" / layer
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (tmp_path / "megatron_cogview" / "__init__.py").touch()
    return tmp_path


def test_a_clean_skeleton_passes(skeleton: Path) -> None:
    done = lint_imports(skeleton)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        ("configs", "import megatron_cogview.data"),
        ("configs", "import torch"),
        ("data", "import megatron_cogview.training"),
        ("tasks", "import megatron_cogview.testing"),
        ("engines", "import deepspeed"),
    ],
)
def test_a_violation_is_noticed(skeleton: Path, layer: str, line: str) -> None:
    (skeleton / "megatron_cogview" / layer / "__init__.py").write_text(line + "\n")
    done = lint_imports(skeleton)
    assert done.returncode == 1
    assert "BROKEN" in done.stdout


def test_a_package_without_a_layer_is_noticed(skeleton: Path) -> None:
    (skeleton / "megatron_cogview" / "odds").mkdir()
    (skeleton / "megatron_cogview" / "odds" / "__init__.py").touch()
    done = lint_imports(skeleton)
    assert done.returncode == 1
    assert "odds" in done.stdout


def test_megatron_core_has_few_users() -> None:
    users = users_of("megatron")
    assert [name for name in users if not name.startswith(MEGATRON_USERS)] == []


def test_configs_use_the_standard_library_only() -> None:
    foreign = {
        name
        for path in (PACKAGE / "configs").glob("*.py")
        for name in imports_of(path)
        if name.split(".")[0] not in {*sys.stdlib_module_names, "megatron_cogview"}
    }
    assert not foreign


def test_the_command_line_library_stays_in_cli() -> None:
    assert set(users_of("tyro")) <= {"cli.py"}
