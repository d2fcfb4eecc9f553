"""A finished demo, made once for all tests that look at one."""

from pathlib import Path

import pytest

from tests.integration.micro_demo import demo


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an undisturbed micro demo; tests leave its files as they are."""
    run = tmp_path_factory.mktemp("demo") / "run"
    done = demo("--output", str(run))
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return run
