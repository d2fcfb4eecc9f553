"""The budget against tensors listed one by one, a simulated schedule and hand arithmetic."""

import re
from dataclasses import replace

import pytest

from megatron_cogview.configs.budget import (
    USABLE_FRACTION,
    activation_bytes,
    attention_pairs,
    choose_layout,
    chunks_in_flight,
    flops_per_token,
    kept_layer_bytes,
    largest_budget,
    layer_activation_bytes,
    logits_bytes,
    rank_budget,
    stage_parameters,
)
from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.configs.model import ModelConfig, NormConfig
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.precision import PrecisionConfig
from megatron_cogview.configs.presets import PRESETS, base_4b, fashion_3b, large_8b3, preset, tiny
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.tasks import plan

GB = 10**9
GIB = 2**30

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 4), (8, 1)]


def tensors_of_rank(model: ModelConfig, tensor: int, pipeline: int, stage: int) -> dict[str, int]:
    """Elements of each tensor that one process holds, named as in megatron-core."""
    h, f = model.hidden_size, 4 * model.hidden_size
    rows = model.vocab.padded_size // tensor
    held: dict[str, int] = {}
    if stage == 0:
        held["embedding.word_embeddings.weight"] = rows * h
        held["embedding.position_embeddings.weight"] = model.max_positions * h
    per_stage = model.num_layers // pipeline
    norms = ["input_layernorm", "pre_mlp_layernorm"]
    if model.norm.placement == "sandwich":
        norms += ["self_attn_bda.norm", "mlp_bda.norm"]
    for i in range(stage * per_stage, (stage + 1) * per_stage):
        layer = f"decoder.layers.{i}"
        held[f"{layer}.self_attention.linear_qkv.weight"] = (3 * h // tensor) * h
        held[f"{layer}.self_attention.linear_qkv.bias"] = 3 * h // tensor
        held[f"{layer}.self_attention.linear_proj.weight"] = h * (h // tensor)
        held[f"{layer}.self_attention.linear_proj.bias"] = h
        held[f"{layer}.mlp.linear_fc1.weight"] = (f // tensor) * h
        held[f"{layer}.mlp.linear_fc1.bias"] = f // tensor
        held[f"{layer}.mlp.linear_fc2.weight"] = h * (f // tensor)
        held[f"{layer}.mlp.linear_fc2.bias"] = h
        for norm in norms:
            held[f"{layer}.{norm}.weight"] = h
            held[f"{layer}.{norm}.bias"] = h
    if stage == pipeline - 1:
        held["decoder.final_layernorm.weight"] = h
        held["decoder.final_layernorm.bias"] = h
        if pipeline > 1:
            held["output_layer.weight"] = rows * h
    return held


@pytest.mark.parametrize("placement", ["sandwich", "pre"])
@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_every_rank_against_a_list_of_its_tensors(
    tensor: int, pipeline: int, placement: str
) -> None:
    norm = NormConfig(placement="pre" if placement == "pre" else "sandwich")
    model = replace(base_4b().model, norm=norm)
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    for stage in range(pipeline):
        held = tensors_of_rank(model, tensor, pipeline, stage)
        counted = stage_parameters(model, parallel, stage)
        assert counted.total == sum(held.values())
        if tensor > 1:
            whole = tensors_of_rank(model, 1, pipeline, stage)
            unsplit = sum(n for name, n in held.items() if n == whole[name])
            assert counted.replicated == unsplit
        assert counted.head_copy == held.get("output_layer.weight", 0)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (4, 4)])
def test_ranks_sum_to_the_model(name: str, tensor: int, pipeline: int) -> None:
    model = preset(name).model
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    stages = [stage_parameters(model, parallel, stage) for stage in range(pipeline)]
    distinct = sum(tensor * s.split + s.replicated for s in stages)
    assert distinct == model.num_params()
    # In memory on top: the replicas, and the head's copy when it has a stage of its own.
    table = model.vocab.padded_size * model.hidden_size
    copies = (tensor - 1) * sum(s.replicated for s in stages) + (table if pipeline > 1 else 0)
    assert tensor * sum(s.total for s in stages) == model.num_params() + copies


def test_state_of_base_4b_in_bf16_is_18_bytes_a_parameter() -> None:
    budget = rank_budget(base_4b(), 1)
    state = budget.weight_bytes + budget.gradient_bytes + budget.optimizer_bytes
    assert state == 18 * 3_929_175_040 == 70_725_150_720
    assert round(state / GB) == 71


def test_state_in_fp32_is_16_bytes_a_parameter() -> None:
    config = replace(tiny(), parallel=ParallelConfig(), precision=PrecisionConfig(dtype="fp32"))
    budget = rank_budget(config, 1)
    assert (budget.weight_bytes, budget.gradient_bytes) == (4 * 937_728, 4 * 937_728)
    assert budget.optimizer_bytes == 8 * 937_728


def test_distributed_optimizer_divides_the_state_by_the_data_axis() -> None:
    config = base_4b()
    shared = replace(config, parallel=ParallelConfig(distributed_optimizer=True))
    whole, part = rank_budget(config, 64), rank_budget(shared, 64)
    assert part.optimizer_bytes == -(-whole.optimizer_bytes // 64)
    assert replace(part, optimizer_bytes=whole.optimizer_bytes) == whole


def two_norm_twin(config: RunConfig, **parallel: int | bool) -> RunConfig:
    """Pre-LN, as the cited paper's transformer."""
    model = replace(config.model, norm=NormConfig(placement="pre"))
    return replace(config, model=model, parallel=ParallelConfig(**parallel))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parallel", "per_unit"),
    [
        ({}, 34.0),
        ({"tensor": 4}, 10 + 24 / 4),
        ({"tensor": 4, "sequence": True}, 34 / 4),
    ],
)
def test_activations_of_the_cited_paper(parallel: dict[str, int | bool], per_unit: float) -> None:
    """Table 2 of arXiv 2205.05198: s b h (10 + 24/t + 5 a s / (h t)), and all over t with SP."""
    config = two_norm_twin(base_4b(), **parallel)
    s, b, h, a, t = 1088, 4, 2560, 40, config.parallel.tensor
    fused = layer_activation_bytes(config)
    assert fused == s * b * h * per_unit + 4 * s * b * a / t
    attention = replace(config.model.attention, backend="reference")
    written_out = replace(config, model=replace(config.model, attention=attention))
    assert layer_activation_bytes(written_out) == s * b * h * per_unit + 5 * a * s * s * b / t


def test_sandwich_keeps_two_more_norm_inputs() -> None:
    config = base_4b()
    more = layer_activation_bytes(config) - layer_activation_bytes(two_norm_twin(config))
    assert more == 2 * 2 * 1088 * 4 * 2560


def test_no_dropout_keeps_no_masks() -> None:
    config = base_4b()
    dry = replace(config, model=replace(config.model, hidden_dropout=0.0))
    assert layer_activation_bytes(config) - layer_activation_bytes(dry) == 2 * 1088 * 4 * 2560


def test_recomputation_keeps_layer_inputs_and_one_layer() -> None:
    config = replace(base_4b(), parallel=ParallelConfig(recompute="full"))
    hidden = 1088 * 4 * 2560
    ends = hidden + 2 * 2 * hidden  # embedding mask; inputs of final norm and head
    assert activation_bytes(config, 0, 1) == (
        48 * 2 * hidden + layer_activation_bytes(config) + ends
    )


def simulated_peak(stages: int, chunks: int, stage: int, micro_batches: int) -> int:
    """Run megatron-core's warm-up rule and 1F1B, and watch how many forward passes are open."""
    total = chunks * micro_batches
    if chunks == 1:
        warmup = min(stages - stage - 1, micro_batches)
    else:
        warmup = min(2 * (stages - stage - 1) + (chunks - 1) * stages, total)
    order = ["F"] * warmup
    for _ in range(total - warmup):
        order += ["F", "B"]
    order += ["B"] * warmup
    open_passes = peak = 0
    for step in order:
        open_passes += 1 if step == "F" else -1
        peak = max(peak, open_passes)
    assert open_passes == 0
    return peak


@pytest.mark.parametrize(("stages", "chunks"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 3)])
@pytest.mark.parametrize("rounds", [1, 2, 6])
def test_passes_in_flight_against_the_schedule(stages: int, chunks: int, rounds: int) -> None:
    parallel = ParallelConfig(pipeline=stages, virtual_pipeline=chunks)
    for stage in range(stages):
        expected = simulated_peak(stages, chunks, stage, rounds * stages)
        assert chunks_in_flight(parallel, stage, rounds * stages) == expected


def test_logits_live_on_the_last_stage_only() -> None:
    config = replace(base_4b(), parallel=ParallelConfig(tensor=2, pipeline=2))
    assert rank_budget(config, 4, stage=0).logits_bytes == 0
    # 4,352 tokens x half the vocabulary x (bf16 output + fp32 copy).
    assert rank_budget(config, 4, stage=1).logits_bytes == 4352 * 29_184 * 6
    fp32 = replace(base_4b(), precision=PrecisionConfig(dtype="fp32"))
    assert logits_bytes(fp32) == 4352 * 58_368 * 4


def test_attention_pairs_by_brute_force() -> None:
    config = fashion_3b()
    a, s = config.model.attention, config.sequence.model_length
    pairs = 0
    for query in range(s):
        first_block = query // a.window_block - (a.window_blocks - 1)
        window = sum(1 for key in range(query + 1) if key // a.window_block >= first_block)
        pairs += min(query + 1, a.num_pivots + window)
    assert attention_pairs(config) == pairs
    assert pairs < s * (s + 1) // 2
    assert attention_pairs(base_4b()) == sum(range(1, 1089))


def test_flops_of_base_4b() -> None:
    """23.5 GF linear and 0.80 GF causal attention per token."""
    head, blocks = 58_368 * 2560, 48 * (12 * 2560**2 + 17 * 2560)
    linear = 6 * (head + blocks)
    assert flops_per_token(base_4b()) == linear + 6 * 48 * 2560 * 1089
    assert flops_per_token(base_4b()) / 1e9 == pytest.approx(23.56 + 0.80, abs=0.01)


def test_the_smallest_layout_that_fits_is_chosen() -> None:
    config = large_8b3()
    for gib in (141, 80, 40, 24):
        layout = choose_layout(config, 64, gib * GIB)
        chosen = replace(config, parallel=layout)
        assert largest_budget(chosen, 64).total_bytes <= USABLE_FRACTION * gib * GIB
        assert layout.sequence == (layout.tensor > 1)
        assert layout.distributed_optimizer == (layout.data(64) > 1)
        # Every model copy on fewer GPUs, tried one by one, is too large.
        for tensor, pipeline in [(t, p) for t in (1, 2, 4, 8) for p in (1, 2, 4, 5, 8)]:
            if tensor * pipeline < layout.model_ranks and 64 % (tensor * pipeline) == 0:
                smaller = replace(
                    layout, tensor=tensor, pipeline=pipeline, sequence=tensor > 1, recompute="none"
                )
                budget = largest_budget(replace(config, parallel=smaller), 64)
                assert budget.total_bytes > USABLE_FRACTION * gib * GIB
    assert choose_layout(config, 64, 40 * GIB).model_ranks > 1


def written_out(config: RunConfig) -> RunConfig:
    """The same run without kernels for attention."""
    attention = replace(config.model.attention, backend="reference")
    return replace(config, model=replace(config.model, attention=attention))


def test_recomputation_is_the_last_resort() -> None:
    config = replace(base_4b(), training=replace(base_4b().training, micro_batch_size=64))
    assert choose_layout(base_4b(), 1, 141 * GIB).recompute == "none"
    assert choose_layout(config, 8, 80 * GIB).recompute == "none"
    # Its attention is fused and keeps no scores: there is nothing between none and full.
    assert choose_layout(config, 1, 192 * GIB).recompute == "full"
    assert choose_layout(written_out(fashion_3b()), 1, 141 * GIB).recompute == "selective"
    assert choose_layout(fashion_3b(), 1, 141 * GIB).recompute == "none"


def test_selective_gives_up_what_attention_keeps() -> None:
    """Scores that are written out, of all layers but the one whose backward pass runs."""
    config = written_out(fashion_3b())
    m, tokens = config.model, config.sequence.model_length * config.training.micro_batch_size
    # bf16: softmax, dropout mask and result, for each pair of query and key.
    scores = tokens * config.sequence.model_length * m.num_heads * (2 + 1 + 2)
    config = replace(config, parallel=ParallelConfig())
    selective = replace(config, parallel=ParallelConfig(recompute="selective"))
    saved = activation_bytes(config, 0, 1) - activation_bytes(selective, 0, 1)
    assert saved == (m.num_layers - 1) * scores
    assert kept_layer_bytes(selective) == layer_activation_bytes(config) - scores
    # Kernels keep no scores, so there nothing is given up.
    for fused in (base_4b(), replace(fashion_3b(), parallel=ParallelConfig())):
        selective = replace(fused, parallel=ParallelConfig(recompute="selective"))
        assert activation_bytes(fused, 0, 1) == activation_bytes(selective, 0, 1)


def test_automatic_layouts_keep_what_was_asked_for() -> None:
    overlapped = ParallelConfig(
        distributed_optimizer=True, overlap_gradients=True, overlap_parameters=True
    )
    layout = choose_layout(replace(base_4b(), parallel=overlapped), 64, 80 * GIB)
    assert layout.overlap_gradients and layout.overlap_parameters
    alone = choose_layout(replace(base_4b(), parallel=overlapped), 1, 141 * GIB)
    assert not alone.overlap_parameters
    selective = replace(base_4b(), parallel=ParallelConfig(recompute="selective"))
    assert choose_layout(selective, 8, 80 * GIB).recompute == "selective"


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gpus = 1: .* GiB per GPU"):
        choose_layout(large_8b3(), 1, 24 * GIB)
    with pytest.raises(ConfigError, match="gpus = 7"):
        choose_layout(base_4b(), 7, 80 * GIB)


def test_plan_prints_the_layout_and_its_cost(capsys: pytest.CaptureFixture[str]) -> None:
    plan.run(base_4b(), gpus=64, gpu_memory_gib=80, auto_layout=True)
    text = capsys.readouterr().out
    layout = choose_layout(base_4b(), 64, 80 * GIB)
    budget = rank_budget(replace(base_4b(), parallel=layout), 64)
    assert "3,929,175,040" in text
    assert f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data(64)}" in text
    for row, value in (
        ("weights", budget.weight_bytes),
        ("gradients", budget.gradient_bytes),
        ("optimizer state", budget.optimizer_bytes),
        ("activations", budget.activation_bytes),
        ("logits", budget.logits_bytes),
        ("total", budget.total_bytes),
    ):
        assert re.search(rf"^ +{row} +{value / GIB:.2f} GiB$", text, re.M), row
    assert "6,684,672" in text  # 6,144 x 1,088 tokens per step
    assert "144,000" in text
    assert text.endswith("\n") and max(map(len, text.splitlines())) <= 100


def test_plan_keeps_a_fixed_layout_and_refuses_bad_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fixed = replace(base_4b(), parallel=ParallelConfig(tensor=2, pipeline=4, sequence=True))
    plan.run(fixed, gpus=64, gpu_memory_gib=80, auto_layout=False)
    text = capsys.readouterr().out
    assert "tensor 2 x pipeline 4 x data 8" in text
    assert "stage 0" in text and "stage 3" in text
    with pytest.raises(ConfigError, match=r"parallel\.tensor = 3"):
        plan.run(
            replace(base_4b(), parallel=ParallelConfig(tensor=3)),
            gpus=3,
            gpu_memory_gib=80,
            auto_layout=False,
        )
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match=r"gpu_memory_gib = 40"):
        plan.run(base_4b(), gpus=1, gpu_memory_gib=40, auto_layout=False)
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(("gpus", "memory", "field"), [(0, 80.0, "gpus"), (1, 0.0, "gpu_memory")])
def test_plan_refuses_nonsense(gpus: int, memory: float, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        plan.run(tiny(), gpus=gpus, gpu_memory_gib=memory, auto_layout=True)
