"""What a run costs each process, before it starts: parameters, bytes, floating-point operations.

Parameter counts are exact.  Bytes of activations and logits are estimates of what PyTorch keeps for
the backward pass; they follow Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models" (arXiv 2205.05198), section 4, adapted to Sandwich-LN and to element widths
other than two bytes.  Not counted: the CUDA context, communication buffers, padding of gradient
buckets, fragmentation.  This module knows formulas only; it sees no tensor and no device.
"""

from dataclasses import dataclass, replace

from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.configs.layout import Layout, failure
from megatron_cogview.configs.model import ModelConfig
from megatron_cogview.configs.parallel import ParallelConfig, Recompute
from megatron_cogview.configs.run import RunConfig

GPUS_PER_NODE = 8
"""Tensor parallelism does not leave a node: it communicates in every layer."""

USABLE_FRACTION = 0.9
"""Part of a GPU's memory that the counted bytes may fill; the rest is for what is not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageParameters:
    """Parameters that one process of a pipeline stage holds."""

    split: int
    """Its share of the tensors that are divided over the tensor axis."""
    replicated: int
    """What every process of the tensor axis holds whole: norms, output biases, positions."""
    head_copy: int
    """Its share of the second copy of the token table, 0 unless the head has a stage of its own."""

    @property
    def total(self) -> int:
        """Parameters in this process's memory."""
        return self.split + self.replicated + self.head_copy


@dataclass(frozen=True, kw_only=True, slots=True)
class RankBudget:
    """Bytes of one process while it trains, at the peak of a step."""

    stage: int
    """Pipeline stage, from 0."""
    parameters: StageParameters
    """Counts, not bytes."""
    weight_bytes: int
    """Weights in the compute dtype."""
    gradient_bytes: int
    """fp32 gradients that add up over micro-batches."""
    optimizer_bytes: int
    """Adam's two moments and, for 16-bit weights, the fp32 master copy."""
    activation_bytes: int
    """All micro-batches that are in flight at once."""
    logits_bytes: int
    """Logits of one micro-batch; 0 except on the last stage."""

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return (
            self.weight_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.activation_bytes
            + self.logits_bytes
        )


def stage_parameters(model: ModelConfig, parallel: ParallelConfig, stage: int) -> StageParameters:
    """Count the parameters of one process of ``stage``.

    The layout must have passed :meth:`RunConfig.check_layout`, so every division is exact.  With
    several stages the tied head is a copy on the last one: the stages together then hold
    ``padded vocabulary x hidden`` more than :meth:`ModelConfig.num_params`.
    """
    h, t = model.hidden_size, parallel.tensor
    last = parallel.pipeline - 1
    layers = model.num_layers // parallel.pipeline
    matrices = 12 * h * h + 7 * h  # the four matrices; biases of qkv (3h) and fc1 (4h)
    norms = (4 if model.norm.placement == "sandwich" else 2) * 2 * h
    table = model.vocab.padded_size * h // t
    split = layers * matrices // t
    replicated = layers * (2 * h + norms)  # 2h: biases of the projection and fc2
    head_copy = 0
    if stage == 0:
        split += table
        replicated += model.max_positions * h
    elif stage == last:
        head_copy = table
    if stage == last:
        replicated += 2 * h
    return StageParameters(split=split, replicated=replicated, head_copy=head_copy)


def compute_bytes(config: RunConfig) -> int:
    """Bytes of one weight or activation; ``precision.dtype = "auto"`` counts as bf16, a GPU's."""
    return 4 if config.precision.dtype == "fp32" else 2


def layer_activation_bytes(config: RunConfig) -> int:
    """Bytes that one layer keeps of one micro-batch, without recomputation, on one process.

    Per token and unit of hidden size, with w bytes an element (w = 2 and two norms give the 34 of
    the cited paper).  Kept whole without sequence parallelism: the inputs of the norms and of the
    qkv and fc1 matrices, and the masks of the two branch-end dropouts.  Divided over the tensor
    axis: q, k, v, the projection's input, and the GELU's and fc2's inputs (4 h wide each).
    Sandwich-LN adds the inputs of its two branch-end norms; a norm that PB-relaxes keeps the
    quotient in place of its input.
    """
    m, p = config.model, config.parallel
    w = compute_bytes(config)
    tokens = config.sequence.model_length * config.training.micro_batch_size
    norm_inputs = (4 if m.norm.placement == "sandwich" else 2) * w
    whole = norm_inputs + 2 * w + (2 if m.hidden_dropout else 0)
    divided = 12 * w
    share = p.tensor if p.sequence else 1
    linear = tokens * m.hidden_size * whole // share + tokens * m.hidden_size * divided // p.tensor
    return linear + _attention_bytes(config, tokens, w)


def kept_layer_bytes(config: RunConfig) -> int:
    """What is left of :func:`layer_activation_bytes` under the run's recomputation.

    ``selective`` gives up what attention keeps beside q, k, v and its output, where it writes its
    scores out; ``full`` keeps a layer's input only.
    """
    m, p = config.model, config.parallel
    w = compute_bytes(config)
    tokens = config.sequence.model_length * config.training.micro_batch_size
    if p.recompute == "full":
        return w * tokens * m.hidden_size // (p.tensor if p.sequence else 1)
    layer = layer_activation_bytes(config)
    if p.recompute == "selective" and m.attention.is_written_out:
        return layer - _attention_bytes(config, tokens, w)
    return layer


def _attention_bytes(config: RunConfig, tokens: int, w: int) -> int:
    """Kept beside q, k, v and the output: the scores, or a fused kernel's row sums."""
    m = config.model
    heads = m.num_heads // config.parallel.tensor
    if not m.attention.is_written_out:
        return 4 * tokens * heads
    # The softmax; with dropout also its mask and its result.
    per_score = w + (w + 1 if m.attention_dropout else 0)
    return tokens * config.sequence.model_length * heads * per_score


def chunks_in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> int:
    """Forward passes of one model chunk whose backward pass has not run, at the peak.

    1F1B: stage s of P holds P - s micro-batches.  Interleaved with V chunks a stage: the warm-up of
    that schedule plus one, so stage 0 holds P V + P - 1 chunks (the 1 + (P - 1) / (P V) of the
    cited paper).
    """
    depth, chunks = parallel.pipeline, parallel.virtual_pipeline
    if chunks == 1:
        return min(depth - stage, micro_batches)
    return min(2 * (depth - stage - 1) + (chunks - 1) * depth + 1, chunks * micro_batches)


def activation_bytes(config: RunConfig, stage: int, micro_batches: int) -> int:
    """Bytes of all activations that one process of ``stage`` keeps at the peak of a step."""
    m, p = config.model, config.parallel
    w = compute_bytes(config)
    share = p.tensor if p.sequence else 1
    hidden = (
        config.sequence.model_length * config.training.micro_batch_size * m.hidden_size // share
    )
    in_flight = chunks_in_flight(p, stage, micro_batches)
    layers = in_flight * (m.num_layers // (p.pipeline * p.virtual_pipeline))
    kept = kept_layer_bytes(config)
    # Of the one layer whose backward pass runs, what was given up is there again; after ``full``
    # that is a second copy of the layer's input too.
    again = layer_activation_bytes(config) - (0 if p.recompute == "full" else kept)
    total = layers * kept + again
    if stage == 0 and m.hidden_dropout:
        total += min(p.pipeline, micro_batches) * hidden  # mask of the embedding's dropout
    if stage == p.pipeline - 1:
        total += 2 * w * hidden  # inputs of the final norm and of the head
    return total


def logits_bytes(config: RunConfig) -> int:
    """Logits of one micro-batch on one process: the head's output and its fp32 copy."""
    w = compute_bytes(config)
    tokens = config.sequence.model_length * config.training.micro_batch_size
    per_logit = 4 if w == 4 else 4 + w
    return tokens * (config.model.vocab.padded_size // config.parallel.tensor) * per_logit


def rank_budget(config: RunConfig, world_size: int, stage: int = 0) -> RankBudget:
    """The budget of any process of pipeline stage ``stage`` in a world of ``world_size``.

    Raises:
        ConfigError: the model cannot be split that way.
    """
    config.check_layout(world_size)
    p = config.parallel
    if not 0 <= stage < p.pipeline:
        raise ValueError(f"stage {stage} of {p.pipeline}")
    data = p.data(world_size)
    parameters = stage_parameters(config.model, p, stage)
    w = compute_bytes(config)
    state = parameters.total * (8 if w == 4 else 12)
    return RankBudget(
        stage=stage,
        parameters=parameters,
        weight_bytes=parameters.total * w,
        gradient_bytes=parameters.total * 4,
        optimizer_bytes=-(-state // data) if p.distributed_optimizer else state,
        activation_bytes=activation_bytes(config, stage, config.training.num_micro_batches(data)),
        logits_bytes=logits_bytes(config) if stage == p.pipeline - 1 else 0,
    )


def largest_budget(config: RunConfig, world_size: int) -> RankBudget:
    """The budget of the stage that needs most memory."""
    stages = range(config.parallel.pipeline)
    return max((rank_budget(config, world_size, s) for s in stages), key=lambda b: b.total_bytes)


def attention_pairs(config: RunConfig) -> int:
    """(query, key) pairs one head must score in one sequence.

    Dense: every key up to the query.  Three-region (P-ATT-1): at most the pivots, which include the
    text, and the window's blocks; the bound counts a key that lies in both twice.
    """
    s, a = config.sequence.model_length, config.model.attention
    if a.kind == "dense":
        return s * (s + 1) // 2
    pairs = 0
    for query in range(s):
        window_start = max(0, query // a.window_block - a.window_blocks + 1) * a.window_block
        pairs += min(query + 1, a.num_pivots + query + 1 - window_start)
    return pairs


def flops_per_token(config: RunConfig) -> float:
    """Floating-point operations of training on one token, forward and backward.

    6 per parameter of the blocks and of the head, plus causal attention (two products forward, four
    backward, 2 x hidden operations per pair); not recomputation, not the embedding look-up.
    """
    m = config.model
    blocks = m.num_params() - (m.vocab.padded_size + m.max_positions + 2) * m.hidden_size
    head = m.vocab.padded_size * m.hidden_size
    attention = 12 * m.hidden_size * m.num_layers * attention_pairs(config)
    return 6 * (blocks + head) + attention / config.sequence.model_length


def fits(config: RunConfig, world_size: int, gpu_bytes: int) -> bool:
    """Whether the largest stage leaves the reserve of :data:`USABLE_FRACTION` free."""
    return largest_budget(config, world_size).total_bytes <= USABLE_FRACTION * gpu_bytes


def _layouts(config: RunConfig, gpus: int) -> list[ParallelConfig]:
    """Legal layouts: fewest processes per model copy first, then fewest stages."""
    sizes = [
        (t, p)
        for t in range(1, min(gpus, GPUS_PER_NODE) + 1)
        for p in range(1, min(gpus // t, config.model.num_layers) + 1)
        if gpus % (t * p) == 0
    ]
    layouts = []
    for tensor, pipeline in sorted(sizes, key=lambda size: (size[0] * size[1], size[1])):
        layout = ParallelConfig(
            tensor=tensor,
            pipeline=pipeline,
            sequence=tensor > 1 and config.sequence.model_length % tensor == 0,
            distributed_optimizer=gpus > tensor * pipeline,
            overlap_gradients=config.parallel.overlap_gradients,
            overlap_parameters=config.parallel.overlap_parameters and gpus > tensor * pipeline,
            recompute=config.parallel.recompute,
        )
        if failure(Layout.of(replace(config, parallel=layout), gpus)) is None:
            layouts.append(layout)
    return layouts


def choose_layout(config: RunConfig, gpus: int, gpu_bytes: int) -> ParallelConfig:
    """The smallest model-parallel layout whose processes fit; ``.data(gpus)`` is its data axis.

    Only if none fits does it try again with more recomputation: ``selective`` where that saves
    anything, and then ``full``, which costs a third more arithmetic.

    Raises:
        ConfigError: no layout is legal on so many GPUs, or none fits.
    """
    legal = _layouts(config, gpus)
    if not legal:
        raise ConfigError(
            f"gpus = {gpus}: no split of model.num_heads = {config.model.num_heads}, "
            f"model.num_layers = {config.model.num_layers} and training.global_batch_size = "
            f"{config.training.global_batch_size} (micro-batches of "
            f"{config.training.micro_batch_size}) uses all of them; try another number"
        )
    own = config.parallel.recompute
    steps: list[Recompute] = ["none", "selective", "full"]
    for recompute in steps[steps.index(own) :]:
        if recompute == "selective" != own and not config.model.attention.is_written_out:
            continue
        for layout in (replace(layout, recompute=recompute) for layout in legal):
            if fits(replace(config, parallel=layout), gpus, gpu_bytes):
                return layout
    least = min(
        largest_budget(
            replace(config, parallel=replace(layout, recompute="full")), gpus
        ).total_bytes
        for layout in legal
    )
    raise ConfigError(
        f"gpus = {gpus}: the smallest layout needs {least / 2**30:.1f} GiB per GPU, more than "
        f"{USABLE_FRACTION:.0%} of {gpu_bytes / 2**30:.1f} GiB; use more GPUs, larger ones, or a "
        f"smaller training.micro_batch_size (now {config.training.micro_batch_size})"
    )
