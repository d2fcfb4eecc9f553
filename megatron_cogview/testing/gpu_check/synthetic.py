"""A small run for rehearsals; the checks bring their own data."""

from dataclasses import replace

from megatron_cogview.analysis.training_speed.shapes import with_grid
from megatron_cogview.configs.presets import tiny
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.configs.vocab import VocabConfig


def micro_run() -> RunConfig:
    """A run for a rehearsal on a CPU: two layers, 4 x 4 codes."""
    base = tiny()
    model = replace(
        base.model,
        num_layers=2,
        hidden_size=32,
        num_heads=2,
        vocab=VocabConfig(num_image_codes=64, num_text_ids=64),
    )
    run = replace(
        base,
        preset="micro",
        model=model,
        image_tokenizer=replace(base.image_tokenizer, num_codes=64),
        parallel=replace(base.parallel, tensor=1),
    )
    return with_grid(run, 4)
