"""A training that is killed, damaged or spread over two processes is the undisturbed one."""

import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_cogview.configs.errors import CheckpointError, ConfigError
from megatron_cogview.testing.distributed import run_distributed
from megatron_cogview.testing.picture_tars import write_tars
from megatron_cogview.tokenization.image import load_image_tokenizer
from megatron_cogview.training.tokenizer_state import resume
from megatron_cogview.training.tokenizer_trainer import train_tokenizer
from megatron_cogview.training.tokenizer_update import TokenizerUpdate
from megatron_cogview.training.world import World
from tests.unit.tokenizer_cases import CPU, VARIANTS, config, killed_at, rows

FINAL = "image_tokenizer.safetensors"
LAST = "checkpoints/step-000000012.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("tokenizer") / "tars")


@pytest.fixture(scope="module")
def runs(data: Path) -> dict[str, Path]:
    """Output folders of uninterrupted runs."""
    folders = {variant: data.parent / variant for variant in VARIANTS}
    for variant, folder in folders.items():
        train_tokenizer(config(data, folder, variant), CPU)
    return folders


def assert_same_run(one: Path, other: Path) -> None:
    """Final file, last checkpoint and all numbers, bit for bit."""
    assert (one / FINAL).read_bytes() == (other / FINAL).read_bytes()
    first, second = load_file(one / LAST), load_file(other / LAST)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert rows(one) == rows(other)


def train_in_two_lives(
    data: Path, output: Path, variant: str, world: World, **training: Any
) -> None:
    """Killed in step 7, after the checkpoint of step 5 and off the log's grid."""
    settings = config(data, output, variant, **training)
    with killed_at(7), pytest.raises(KeyboardInterrupt):
        train_tokenizer(settings, world)
    assert not (output / FINAL).exists()
    with killed_at(None) as done:
        train_tokenizer(settings, world)
    assert done == list(range(5, 12)), "it did not resume at the checkpoint of step 5"


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_is_bitwise_the_uninterrupted_one(
    variant: str, runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    train_in_two_lives(data, tmp_path / "run", variant, CPU)
    assert_same_run(tmp_path / "run", runs[variant])


@pytest.mark.parametrize("variant", ["moving_average", "vqgan"])
def test_resumed_bf16_run_is_bitwise_the_uninterrupted_one(
    variant: str, data: Path, tmp_path: Path
) -> None:
    train_tokenizer(config(data, tmp_path / "whole", variant, precision="bf16"), CPU)
    train_in_two_lives(data, tmp_path / "run", variant, CPU, precision="bf16")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_damaged_checkpoints(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train_tokenizer(config(data, output), CPU)
    final = (output / "image_tokenizer.safetensors").read_bytes()
    (output / "summary.json").unlink()
    newest, older = sorted((output / "checkpoints").iterdir(), reverse=True)
    newest.write_bytes(newest.read_bytes()[:-10])
    train_tokenizer(config(data, output), CPU)
    assert (output / "image_tokenizer.safetensors").read_bytes() == final
    (output / "summary.json").unlink()
    for path in (newest, older):
        path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints"):
        train_tokenizer(config(data, output), CPU)


class Told(World):
    """A process that was told what the first one has decided, or the first, which is heard."""

    said: ClassVar[list[Any]] = []

    def from_rank_0(self, value: Any) -> Any:
        """What the process of rank 0 has said last."""
        if self.rank == 0:
            self.said[:] = [value]
        return self.said[0]


def test_all_processes_go_on_from_one_checkpoint(data: Path, tmp_path: Path) -> None:
    """The first chooses; who cannot read that one fails, whatever else it could read."""
    settings = config(data, tmp_path / "run")
    train_tokenizer(settings, CPU)
    whole = tmp_path / "run" / "checkpoints"
    damaged = tmp_path / "damaged"
    shutil.copytree(whole, damaged)
    newest = max(damaged.iterdir())
    newest.write_bytes(newest.read_bytes()[:-10])
    first, second = (Told(torch.device("cpu"), rank, 2) for rank in (0, 1))

    def state(folder: Path, world: World) -> tuple[int, Any]:
        update = TokenizerUpdate(settings, CPU)
        progress = resume(folder, update.parts, world)
        assert progress is not None
        if world.rank > 0:
            assert not progress.code_counts.any(), "they would be counted twice"
        return progress.step, update.model.state_dict()

    for folder, step in ((whole, 12), (damaged, 10)):
        (one, weights), (other, copies) = state(folder, first), state(whole, second)
        assert one == other == step
        assert all(torch.equal(value, copies[name]) for name, value in weights.items())
    state(whole, first)
    with pytest.raises(CheckpointError, match=r"step-000000012.*: process 1 cannot use"):
        state(damaged, second)
    for path in damaged.iterdir():
        path.write_bytes(b"nothing")
    for world in (first, second):
        with pytest.raises(CheckpointError, match="none of its 2 checkpoints"):
            state(damaged, world)


def two_process_case(arguments: dict[str, str]) -> None:
    group = dist.group.WORLD
    world = World(torch.device("cpu"), dist.get_rank(), dist.get_world_size(), group, group)
    data, output = Path(arguments["data"]), Path(arguments["output"])
    for variant in VARIANTS:
        train_tokenizer(config(data, output / variant, variant), world)
    for variant in ("moving_average", "vqgan"):
        train_in_two_lives(data, output / f"{variant} again", variant, world)


@pytest.fixture(scope="module")
def of_two(data: Path) -> Path:
    """Folder of the same runs by two processes."""
    arguments = {"data": str(data), "output": str(data.parent / "two")}
    run_distributed(f"{__name__}:two_process_case", 2, arguments, timeout_s=150.0)
    return data.parent / "two"


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_train_what_one_does(
    variant: str, runs: dict[str, Path], of_two: Path
) -> None:
    """Losses, weights, codebooks, moments and discriminator, to fp32 rounding; and the codes."""
    # Adam turns gradients that are next to nothing, rounding and all, into whole steps; VQGANs have
    # such gradients.
    share = 1e-3 if variant == "vqgan" else 1e-5
    one, two = load_file(runs[variant] / LAST), load_file(of_two / variant / LAST)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert (two[key] - value).abs().max() <= share * value.abs().max(), key
    for first, second in zip(rows(runs[variant]), rows(of_two / variant), strict=True):
        assert first == pytest.approx(second, rel=10 * share if variant == "vqgan" else share)
        assert first.get("codes_in_use") == second.get("codes_in_use")
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (8, 16, 16, 3), generator=generator, dtype=torch.uint8)
    codes = [
        load_image_tokenizer(folder / FINAL).encode(pictures)
        for folder in (runs[variant], of_two / variant)
    ]
    assert len(codes[0].unique()) > 10
    assert torch.equal(*codes)


@pytest.mark.parametrize("variant", ["moving_average", "vqgan"])
def test_two_processes_resume_bitwise(variant: str, of_two: Path) -> None:
    assert_same_run(of_two / f"{variant} again", of_two / variant)


def test_the_adversarial_phase_begins_where_it_should(runs: dict[str, Path]) -> None:
    """The discriminator learns from its first step on, and both losses are reported."""
    last = rows(runs["vqgan"])[-1]
    assert {"adversarial_loss", "discriminator_loss", "adversarial_weight"} <= last.keys()
    assert 0.0 < last["adversarial_weight"] <= 0.8e4
    state = load_file(runs["vqgan"] / "checkpoints/step-000000012.safetensors")
    steps = {v.item() for k, v in state.items() if k.startswith("discriminator.adam.step")}
    assert steps == {9.0}


@pytest.mark.parametrize("variant", ["moving_average", "straight_through"])
def test_a_codebook_drawn_late_starts_from_a_trained_encoder(
    variant: str, data: Path, tmp_path: Path
) -> None:
    """Before it there are no codes and no losses of theirs; a resume across it is exact."""
    late: dict[str, Any] = {"codebook_warmup_steps": 6, "log_every": 1}
    for name in ("one", "other"):
        folder = tmp_path / name
        if name == "other":
            with killed_at(6), pytest.raises(KeyboardInterrupt):
                train_tokenizer(config(data, folder, variant, **late), CPU)
            assert (folder / "checkpoints" / "step-000000005.safetensors").is_file()
        train_tokenizer(config(data, folder, variant, **late), CPU)
    curve = rows(tmp_path / "one")
    assert [r["commitment_loss"] == 0.0 for r in curve] == [True] * 6 + [False] * 6
    assert [r["codes_in_use"] > 0 for r in curve] == [False] * 6 + [True] * 6
    assert curve[5]["perplexity"] is None
    # Validation is due after steps 6 and 12; after 6 there is no codebook yet.
    assert [r["step"] for r in curve if "validation_l2" in r] == [12]
    for name in ("image_tokenizer.safetensors", "checkpoints/step-000000012.safetensors"):
        one, other = load_file(tmp_path / "one" / name), load_file(tmp_path / "other" / name)
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    with pytest.raises(ConfigError, match=r"codebook_warmup_steps = 12"):
        config(data, tmp_path, codebook_warmup_steps=12)
