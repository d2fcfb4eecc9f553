"""What every test needs: one thread a process, megatron-core usable on a CPU, the two markers."""

import os
from pathlib import Path

# Before torch is imported: several test processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from megatron_cogview.parallel import cpu_backend

if not torch.cuda.is_available():
    # Before a kernel is imported, for Triton looks when a function is decorated: without a GPU
    # kernels run step by step on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
cpu_backend.install()

SHARED_DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real pictures and texts that may lie beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return SHARED_DATA.resolve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device, and say so."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run that skipped every test has shown nothing, so it is red."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus != 0 or reporter is None:
        return
    if reporter.stats.get("skipped") and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
