"""The house rules that a program can check: sizes, names, docstrings, cheap imports."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_TOOL_LINES = 80
VAGUE_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}
# Written in two parts so that this file does not contain what it forbids.
FORBIDDEN = ("/work" + "/", "/tmp/" + "brief", "/ro" + "ot/")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".sh", ".yaml", ".yml", ".cfg", ".json", ""}


def repository_files(root: Path) -> list[Path]:
    """Files that git tracks or would track; without git, everything but environments and caches."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, check=True, text=True)
        files = [root / name for name in listed.stdout.split("\0") if name]
    except (FileNotFoundError, subprocess.CalledProcessError):
        files = [
            path
            for path in root.rglob("*")
            if not any(
                part.startswith(".venv") or part in {"__pycache__", "runs", "build", ".git"}
                for part in path.relative_to(root).parts
            )
        ]
    return sorted(path for path in files if path.is_file())


FILES = repository_files(ROOT)
PYTHON_FILES = [path for path in FILES if path.suffix == ".py"]
PACKAGE_FILES = [path for path in PYTHON_FILES if path.is_relative_to(ROOT / "megatron_cogview")]


def functions_of(source: str) -> Iterator[tuple[str, int]]:
    """Name and number of lines of each function, decorators included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - first + 1


def print_calls(source: str) -> list[int]:
    """Lines that call the built-in ``print``."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_the_checks_see_the_package() -> None:
    assert ROOT / "megatron_cogview" / "configs" / "run.py" in PACKAGE_FILES
    assert ROOT / "tests" / "unit" / "test_repo_shape.py" in PYTHON_FILES
    assert not [path for path in FILES if ".venv" in path.parts]


def test_the_measures_measure() -> None:
    source = "@decorated\ndef f():\n    print(1)\n    return 2\n"
    assert list(functions_of(source)) == [("f", 4)]
    assert print_calls(source) == [3]
    assert print_calls("logger.print(1)\nx = 'print(2)'\n") == []


def test_files_are_short() -> None:
    long = {
        name: count
        for name, path in zip(names(PYTHON_FILES), PYTHON_FILES, strict=True)
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MAX_FILE_LINES
    }
    assert not long


def test_tools_only_wire() -> None:
    tools = [path for path in PYTHON_FILES if path.parent == ROOT / "tools"]
    long = {
        path.name: count
        for path in tools
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MAX_TOOL_LINES
    }
    assert not long


def test_functions_are_short() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{name}": lines
        for path in PYTHON_FILES
        for name, lines in functions_of(path.read_text(encoding="utf-8"))
        if lines > MAX_FUNCTION_LINES
    }
    assert not long


def test_modules_have_docstrings() -> None:
    bare = [
        path
        for path in PYTHON_FILES
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not names(bare)


def test_no_vague_module_names() -> None:
    assert not names([path for path in PYTHON_FILES if path.name in VAGUE_NAMES])


def test_the_package_logs_and_does_not_print() -> None:
    printing = {
        str(path.relative_to(ROOT)): lines
        for path in PACKAGE_FILES
        if (lines := print_calls(path.read_text(encoding="utf-8")))
    }
    assert not printing


def test_no_machine_paths() -> None:
    found = {
        str(path.relative_to(ROOT)): text
        for path in FILES
        if path.suffix in TEXT_SUFFIXES
        for text in FORBIDDEN
        if re.search(rf"(?<![\w.]){re.escape(text)}", path.read_text(encoding="utf-8"))
    }
    assert not found


def test_cited_clauses_are_explained() -> None:
    """An id in a docstring that no document explains is noise."""
    pattern = re.compile(r"\b(?:P-[A-Z]+|OP|AD)-\d+\b")
    explained = set(pattern.findall((ROOT / "docs" / "architecture.md").read_text("utf-8")))
    cited = {
        clause
        for path in PACKAGE_FILES
        for clause in pattern.findall(path.read_text(encoding="utf-8"))
    }
    assert "P-STAB-8" in cited
    assert not cited - explained


@pytest.mark.parametrize(
    "module",
    ["megatron_cogview", "megatron_cogview.configs.presets", "megatron_cogview.tasks.plan"],
)
def test_importing_is_cheap(module: str) -> None:
    heavy = "{'torch', 'numpy', 'megatron'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
