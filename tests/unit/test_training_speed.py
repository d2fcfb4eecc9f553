"""The benchmark of training steps: its rival is the same model, its clock and counts are right."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_cogview.analysis.training_speed import report, roofline, shapes
from megatron_cogview.analysis.training_speed.against import check_same_model, compare, steps_of
from megatron_cogview.analysis.training_speed.plain import PlainModel
from megatron_cogview.analysis.training_speed.split import PHASES, PhaseClock, clocked
from megatron_cogview.analysis.training_speed.tables import REHEARSAL, tables
from megatron_cogview.analysis.training_speed.whole_step import TrainingLoop
from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.configs.model import NormConfig
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.data.loader import build_loader
from megatron_cogview.parallel import topology
from megatron_cogview.parallel.seeding import seed_initialization
from megatron_cogview.testing.oracle import Oracle, random_weights, weighted_mean
from megatron_cogview.tokenization.layout import SequenceLayout

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a measurement on a CPU")


def small(folder: Path, **norm: Any) -> RunConfig:
    """The rehearsal's shape in fp32 without dropout, its shards written."""
    base = shapes.case("micro:2", str(folder / "tokens"), "fp32", 2, 2, None).config
    model = replace(base.model, hidden_dropout=0.0, attention_dropout=0.0, norm=NormConfig(**norm))
    config = replace(base, model=model)
    shapes.write_random_shards(folder / "tokens", config, 64)
    return config


def loader_of(config: RunConfig) -> Any:
    layout = SequenceLayout(config.sequence, config.model.vocab)
    return build_loader(layout, config.training, config.data)


@pytest.mark.parametrize(
    "norm",
    [{}, {"placement": "pre"}, {"relax_rule": "none"}],
    ids=["sandwich, relaxed", "pre", "not relaxed"],
)
def test_the_plain_model_is_the_paper_s(tmp_path: Path, norm: dict[str, str]) -> None:
    """Loss and gradients of the oracle, which shares no code with either."""
    config = small(tmp_path, **norm)
    weights = random_weights(config.model, 1)
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    (batch, *_) = loader_of(config).micro_batches(0)
    inputs = (batch.tokens_BS, batch.positions_BS, batch.labels_BS)
    weights_BS = batch.loss_weights_BS.double()
    wanted = weighted_mean(Oracle(config.model, leaves).token_losses(*inputs), weights_BS)
    wanted.backward()
    model = PlainModel(config.model).double()
    model.take(weights)
    found = weighted_mean(model(*inputs), weights_BS)
    found.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=0)
    table = leaves["embedding.word_embeddings.weight"].grad
    torch.testing.assert_close(model.tokens.weight.grad, table)
    layer = model.layers[1]
    fc1 = leaves["decoder.layers.1.mlp.linear_fc1.weight"].grad
    torch.testing.assert_close(layer.fc1.weight.grad, fc1)


def test_other_models_are_not_compared(tmp_path: Path) -> None:
    for norm in ({"relax_scope": "all"}, {"relax_rule": "tensor_max_over_8"}):
        with pytest.raises(ValueError, match="knows"):
            PlainModel(small(tmp_path / str(norm), **norm).model)
    check_same_model({"ours": 7.0, "plain": 7.00001, "core": 5.0})
    check_same_model({"ours": 7.0})
    for loss in (7.01, float("nan")):
        with pytest.raises(RuntimeError, match="not ours"):
            check_same_model({"ours": 7.0, "plain": loss})


@without_cuda
def test_engine_and_rivals_take_the_same_steps(tmp_path: Path) -> None:
    """One process, two micro-batches: losses of three steps; then where the time goes."""
    config = small(tmp_path)
    with topology.running(config.parallel) as groups:
        from megatron_cogview.engines.megatron import MegatronEngine

        loader = loader_of(config)
        seed_initialization(3, groups)
        engine = MegatronEngine(config, groups)
        steps = steps_of(config, engine, ("plain", "core"))
        batches = [loader.micro_batches(step) for step in range(3)]
        for batch in batches:
            losses = {name: step(batch) for name, step in steps.items()}
            assert losses["plain"] == pytest.approx(losses["ours"], rel=1e-5)
            assert 0 < losses["core"] < 10
        seed_initialization(4, groups)
        engine = MegatronEngine(config, groups)
        found = compare(steps_of(config, engine, ("plain",)), batches, 1, 2)
        assert set(found["times_as_fast"]) == {"plain"}
        assert found["first_loss"]["plain"] == pytest.approx(found["first_loss"]["ours"], rel=1e-5)
        loop = TrainingLoop(config, groups, engine, loader)
        original = dist.all_reduce
        split = loop.split(3, 1, tmp_path / "log")
        assert dist.all_reduce is original
        assert set(split) == set(PHASES)
        for phase in ("data", "forward", "backward", "optimizer", "log"):
            assert split[phase] > 0, phase
        assert len(loop.losses) == 4
        assert len(loop.times(2, 1)) == 2


@pytest.mark.parametrize(("quiet", "counted", "seconds"), [(6, 6, 1.0), (4, 10, 3.0)])
def test_rounds_that_others_spoilt_are_left_out(
    monkeypatch: pytest.MonkeyPatch, quiet: int, counted: int, seconds: float
) -> None:
    """Of ten rounds the first are quiet and take a second a step, the others three."""
    from megatron_cogview.analysis.training_speed import against

    now = {"wall": 0.0, "busy": 0.0, "round": 0}

    def step(batches: Any) -> float:
        slow = now["round"] >= 2 * quiet
        now["wall"] += 3.0 if slow else 1.0
        now["busy"] += 3.0 if slow else 1.0  # Ours takes one second of them.
        now["round"] += 1
        return 1.0

    clock = SimpleNamespace(
        perf_counter=lambda: now["wall"], process_time=lambda: float(now["round"])
    )
    monkeypatch.setattr(against, "time", clock)
    monkeypatch.setattr(against, "_busy_seconds", lambda: now["busy"])
    found = against.compare({"ours": step, "core": step}, [[]], 0, 10)
    assert (found["rounds"], found["rounds_counted"]) == (10, counted)
    assert found["seconds"]["ours"] == seconds
    assert found["processor_seconds"] == {"ours": 1.0, "core": 1.0}


class Ticks:
    """Time that passes by one second a look."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


def test_every_moment_belongs_to_one_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_cogview.analysis.training_speed import split

    monkeypatch.setattr(split, "time", Ticks())
    clock = PhaseClock(CPU)
    clock.enter("data")
    clock.enter("optimizer")
    clock.entered("forward")
    with clock.inside("backward"), clock.waiting():
        pass
    clock.entered("gradients")
    clock.entered("update")
    found = clock.lap()
    wanted = {
        "data": 1,
        "optimizer": 2,
        "forward": 2,
        "backward": 2,
        "communication": 2,
        "log": 0,
    }
    assert found == {**wanted}
    assert sum(clock.lap().values()) == 0


def test_collectives_are_timed_under_every_name_and_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = Counter()

    def collective(*args: Any, **kwargs: Any) -> None:
        calls["done"] += 1

    held = SimpleNamespace(kept_elsewhere=collective)
    monkeypatch.setattr(dist, "all_reduce", collective)
    monkeypatch.setitem(sys.modules, "megatron.core.pretended", held)
    clock = PhaseClock(CPU)
    with pytest.raises(KeyError), clocked(clock):
        clock.enter("forward")
        dist.all_reduce(None)
        held.kept_elsewhere(None)
        found = clock.lap()
        raise KeyError
    assert calls["done"] == 2
    assert found["communication"] > 0
    assert dist.all_reduce is held.kept_elsewhere is collective


def test_products_of_a_step_are_counted(tmp_path: Path) -> None:
    config = small(tmp_path)
    h, tokens = config.model.hidden_size, 2 * config.sequence.model_length
    found = roofline.linears(config)
    assert found[roofline.Linear(tokens, h, 3 * h, True)] == 4  # Two layers, two micro-batches.
    assert found[roofline.Linear(tokens, h, config.model.vocab.padded_size, False)] == 2
    matrices = 12 * h * h * config.model.num_layers + h * config.model.vocab.padded_size
    assert roofline.gemm_flops(config) == 6 * matrices * tokens * 2
    assert roofline.best_seconds(config, CPU, torch.float32, 1) > 0


def test_shapes_are_named_and_shrunk_until_they_fit() -> None:
    assert shapes.named("base_4b:4").model.num_layers == 4
    assert shapes.named("toy").sequence.model_length == 1088
    for name in ("base_4b:", "base_4b:x", "base_4b:0"):
        with pytest.raises(ConfigError, match="PRESET:LAYERS"):
            shapes.named(name)
    with pytest.raises(ConfigError, match="preset"):
        shapes.named("none")
    whole = shapes.case("base_4b", "t", "bf16", 8, 1, 141 * 2**30)
    assert whole.note == ""
    assert whole.config.training.global_batch_size == 8
    tight = shapes.case("base_4b", "t", "bf16", 8, 2, 79 * 2**30)
    assert tight.note == "micro-batch 1 instead of 8"
    assert tight.config.training.global_batch_size == 2
    with pytest.raises(ConfigError, match=r"does not fit.*base_4b:4"):
        shapes.case("base_4b", "t", "bf16", 8, 1, 40 * 2**30)


def row(shape: str, tflops: float, **more: Any) -> dict[str, Any]:
    """A measured shape."""
    return {
        "shape": shape,
        "dtype": "bf16",
        "global_batch_size": 8,
        "threads": 1,
        "on_cpu": False,
        "note": "",
        "peak_bytes": 2**36,
        "clocks": "1980 MHz",
        "split": dict.fromkeys(PHASES, 0.0) | {"forward": 0.99, "data": 0.002, "log": 0.008},
        "seconds": 1.0,
        "tokens_per_second": 8704.0,
        "model_tflops": tflops,
        "square_product_tflops": 790.0,
        "mfu_of_square_product": tflops / 790,
        "mfu_of_specification": tflops / 989,
        "products_seconds": 0.86,
        "roofline_fraction": 0.86,
        **more,
    }


def test_table_judges_figures_and_labels_a_rehearsal() -> None:
    against: dict[str, Any] = {"times_as_fast": {"plain": 0.98, "core": 1.1}}
    against |= {"rounds": 9, "rounds_counted": 5, "others_share": 0.01}
    against["processor_times_as_fast"] = {"plain": 0.99, "core": 1.2}
    against["seconds"] = {"ours": 0.1, "plain": 0.098, "core": 0.11}
    rows = [row("base_4b", 630.0), row("base_4b:4", 600.0)]
    rows.append(row("tiny", 0.05, on_cpu=True, mfu_of_specification=None, against=against))
    rows.append({"shape": "large_8b3", "left_out": "does not fit"})
    text = tables({"rehearsal": False, "shapes": rows})
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert lines["base_4b, bf16, 8 sequences: model FLOPs"].endswith("| 620 TFLOP/s | yes |")
    assert "63.7% of the specification" in text
    assert lines["base_4b:4 against base_4b: model FLOPs a second"].endswith("| 0.97 x | **no** |")
    assert lines["base_4b, bf16, 8 sequences: loader and log"].endswith("| 1 % | **no** |")
    title = "tiny, bf16, 8 sequences, 1 thread(s)"
    plain, core = (
        lines[f"{title}: throughput against {who}"]
        for who in ("plain PyTorch", "megatron-core's local layers")
    )
    assert "1.0% of the cores in the 5 of 9 rounds that count" in text
    assert plain.endswith("; 0.990 x in processor time) | 0.97 x | yes |")
    assert core.endswith("| 1.2 x | **no** |")
    assert "left out: does not fit" in lines["large_8b3"]
    rehearsed = tables({"rehearsal": True, "shapes": rows})
    assert rehearsed.startswith(f"**{REHEARSAL}**")
    assert "**no**" not in rehearsed


@without_cuda
def test_devices_that_are_not_there_and_several_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match="no CUDA device here"):
        report.measure(report.Settings(device="cuda"))
    with pytest.raises(ConfigError, match="steps = 0"):
        report.measure(report.Settings(steps=0))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        report.measure(report.Settings())


@without_cuda
def test_the_tool_rehearses_a_gpu_s_measurement(tmp_path: Path) -> None:
    script = str(ROOT / "tools" / "bench_training.py")
    options = ["--device", "cpu", "--shapes", "micro", "micro:2", "--threads", "1"]
    options += ["--steps", "1", "--warmup", "1", "--micro-batch-size", "1"]
    done = subprocess.run(
        [sys.executable, script, *options, "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "out" / "bench_training.json").read_text())
    assert [one["shape"] for one in numbers["shapes"]] == ["micro", "micro:2"]
    assert numbers["shapes"][0]["dtype"] == "bf16"
    assert numbers["megatron_core"]
    table = (tmp_path / "out" / "bench_training.md").read_text()
    assert REHEARSAL in table
    assert "micro:2 against micro: model FLOPs a second" in table
    done = subprocess.run(
        [sys.executable, script, "--shapes", "nothing"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: preset = 'nothing'")
