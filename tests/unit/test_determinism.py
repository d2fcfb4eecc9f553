"""``training.deterministic`` sets what it promises, in time, and says what stands against it."""

from collections.abc import Iterator

import pytest
import torch

from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.parallel.determinism import CUBLAS, NCCL, make_deterministic


@pytest.fixture(autouse=True)
def settings_return() -> Iterator[None]:
    """The switches are the process's; other tests find them as they were."""
    memory = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    owners = [
        (memory, "fill_uninitialized_memory"),
        (torch.backends.cudnn, "deterministic"),
        (torch.backends.cudnn, "benchmark"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_tf32"),
    ]
    values = [getattr(owner, name) for owner, name in owners]
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    for (owner, name), value in zip(owners, values, strict=True):
        setattr(owner, name, value)


def with_cuda(monkeypatch: pytest.MonkeyPatch, in_use: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)


def test_without_cuda_only_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    environment: dict[str, str] = {}
    make_deterministic(environment)
    assert environment == {}
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_with_cuda_everything_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cuda(monkeypatch)
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True
    environment: dict[str, str] = {}
    make_deterministic(environment)
    assert environment == {CUBLAS: ":4096:8", NCCL: "^NVLS,NVLSTree"}
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("chosen", [{CUBLAS: ":16:8"}, {NCCL: "Ring"}, {NCCL: "^NVLS"}])
def test_a_choice_that_fits_is_kept(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str]
) -> None:
    with_cuda(monkeypatch)
    environment = dict(chosen)
    make_deterministic(environment)
    assert chosen.items() <= environment.items()


@pytest.mark.parametrize(
    ("variable", "value"), [(CUBLAS, ":0:0"), (NCCL, "NVLS"), (NCCL, "Ring,NVLSTree")]
)
def test_a_choice_against_it_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    with_cuda(monkeypatch)
    with pytest.raises(
        ConfigError, match=rf"training\.deterministic = True: {variable} is '{value}'"
    ):
        make_deterministic({variable: value})


def test_too_late_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cuda(monkeypatch, in_use=True)
    with pytest.raises(ConfigError, match="before the first use of CUDA"):
        make_deterministic({})


def test_an_operation_without_a_deterministic_form_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's promise, on which the rest stands; its CPU kernels know one such operation."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make_deterministic({})
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
