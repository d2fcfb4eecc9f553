"""Named shapes, one function each.  ``tiny`` runs anywhere; the rest are the paper's scale.

Shapes the paper does not give (``base_363m``, ``fashion_3b``, ``large_8b3``) are ours and labelled
so in the documentation.
"""

from collections.abc import Callable
from dataclasses import replace

from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.configs.generation import GenerationConfig
from megatron_cogview.configs.image_tokenizer import (
    GumbelConfig,
    ImageTokenizerConfig,
    VQGANConfig,
)
from megatron_cogview.configs.model import AttentionConfig, ModelConfig, NormConfig
from megatron_cogview.configs.optimizer import OptimizerConfig
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.configs.sequence import SequenceConfig
from megatron_cogview.configs.tokenizer_training import (
    AdversarialConfig,
    TokenizerTrainingConfig,
)
from megatron_cogview.configs.training import TrainingConfig
from megatron_cogview.configs.vocab import VocabConfig


def tiny() -> RunConfig:
    """64-pixel pictures on a laptop: the demo's preset."""
    return RunConfig(
        preset="tiny",
        model=ModelConfig(
            num_layers=4,
            hidden_size=128,
            num_heads=4,
            max_positions=88,
            # 256 codes + 741 pieces + 27 commands fill one padding unit exactly.
            vocab=VocabConfig(num_image_codes=256, num_text_ids=741),
            # Next to branches whose LayerNorm gives unit variance, embeddings of the usual 0.02
            # drown, and so small a model learns slowly.
            init_std=0.08,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
        sequence=SequenceConfig(length=89, text_budget=21, codes_per_side=(8,)),
        image_tokenizer=ImageTokenizerConfig(
            image_size=64,
            hidden_size=64,
            code_dim=32,
            num_codes=256,
            codebook_init="data",
            revive_dead_codes=True,
        ),
        tokenizer_training=TokenizerTrainingConfig(
            steps=1000, batch_size=16, lr=2e-3, warmup_steps=50, random_crop=0.0
        ),
        parallel=ParallelConfig(tensor=2),
        optimizer=OptimizerConfig(lr=3e-3, min_lr_ratio=0.05),
        training=TrainingConfig(
            steps=3200,
            global_batch_size=16,
            micro_batch_size=16,
            save_every=250,
            validate_every=250,
        ),
        generation=GenerationConfig(temperature=0.7, top_k=0),
    )


def tiny_vqgan() -> RunConfig:
    """``tiny`` with a VQGAN as image tokenizer."""
    base = tiny()
    return replace(
        base,
        preset="tiny_vqgan",
        image_tokenizer=replace(
            base.image_tokenizer,
            kind="vqgan",
            hidden_size=16,
            # Groups of few channels would normalise flat colours away.
            vqgan=VQGANConfig(multipliers=(1, 2, 2, 4), residual_blocks=1, norm_groups=1),
        ),
        tokenizer_training=replace(
            base.tokenizer_training,
            lr=4e-3,
            codebook_warmup_steps=200,
            # Drawings are flat: texture that a strong discriminator asks for is only noise.
            adversarial=AdversarialConfig(weight=0.02, start_step=500, channels=16, layers=2),
        ),
    )


def photos_64() -> RunConfig:
    """64-pixel photographs in 16 x 16 codes, f = 4: an image tokenizer for two CPU cores."""
    return RunConfig(
        preset="photos_64",
        model=ModelConfig(
            num_layers=8,
            hidden_size=256,
            num_heads=8,
            max_positions=288,
            vocab=VocabConfig(num_image_codes=1024),
        ),
        sequence=SequenceConfig(length=289, text_budget=29, codes_per_side=(16,)),
        image_tokenizer=ImageTokenizerConfig(
            image_size=64,
            downsampling_layers=2,
            hidden_size=64,
            code_dim=64,
            num_codes=1024,
            codebook_init="data",
            revive_dead_codes=True,
        ),
        tokenizer_training=TokenizerTrainingConfig(
            steps=2000,
            batch_size=32,
            lr=1e-3,
            warmup_steps=50,
            codebook_warmup_steps=200,
            validate_every=250,
        ),
        training=TrainingConfig(global_batch_size=64, micro_batch_size=16),
    )


def base_363m() -> RunConfig:
    """24 layers of 1,024: one GPU (our shape)."""
    return RunConfig(
        preset="base_363m",
        model=ModelConfig(num_layers=24, hidden_size=1024, num_heads=16),
        training=TrainingConfig(global_batch_size=512, micro_batch_size=16),
    )


def fashion_3b() -> RunConfig:
    """3 billion parameters on 50 x 50 codes with three-region attention (P-FASH-2; our shape)."""
    return RunConfig(
        preset="fashion_3b",
        model=ModelConfig(
            num_layers=36,
            hidden_size=2560,
            num_heads=40,
            max_positions=2560,
            attention=AttentionConfig(
                kind="pivot", window_block=128, window_blocks=6, num_pivots=768
            ),
        ),
        sequence=SequenceConfig(length=2561, text_budget=57, codes_per_side=(50,)),
        image_tokenizer=ImageTokenizerConfig(
            kind="vqgan", image_size=800, downsampling_layers=4, hidden_size=128
        ),
        tokenizer_training=TokenizerTrainingConfig(
            batch_size=64,
            lr=1e-4,
            reconstruction="l1",
            adversarial=AdversarialConfig(weight=0.8, start_step=50_000),
        ),
        training=TrainingConfig(global_batch_size=2048, micro_batch_size=2),
    )


def base_4b() -> RunConfig:
    """The paper's model: 48 layers of 2,560 (P-GPT-1), trained as in P-OPT-1..3."""
    return RunConfig(
        preset="base_4b",
        model=ModelConfig(num_layers=48, hidden_size=2560, num_heads=40),
        training=TrainingConfig(global_batch_size=6144, micro_batch_size=4),
    )


def large_8b3() -> RunConfig:
    """CogView-large, 8.3 billion parameters (P-GPT-2; our shape)."""
    return RunConfig(
        preset="large_8b3",
        model=ModelConfig(
            num_layers=40,
            hidden_size=4096,
            num_heads=64,
            norm=NormConfig(relax_scope="all"),
        ),
        parallel=ParallelConfig(tensor=2, sequence=True),
        training=TrainingConfig(global_batch_size=6144, micro_batch_size=2),
    )


def released() -> RunConfig:
    """The switches that follow the released code where it differs from the paper."""
    paper = base_4b()
    return replace(
        paper,
        preset="released",
        model=replace(
            paper.model,
            norm=NormConfig(relax_rule="tensor_max_over_8", relax_scope="all"),
            attention=AttentionConfig(relax_alpha=1.0),
            embedding_gradient_scale=1.0,
        ),
        image_tokenizer=replace(
            paper.image_tokenizer, gumbel=GumbelConfig(squared=True, scale_noise=True)
        ),
        training=replace(paper.training, text_weight=5.0),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    f.__name__: f
    for f in (tiny, tiny_vqgan, photos_64, base_363m, fashion_3b, base_4b, large_8b3, released)
}


def preset(name: str) -> RunConfig:
    """The preset called ``name``.

    Raises:
        ConfigError: naming the presets there are.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset = {name!r}: must be one of {', '.join(PRESETS)}")
    return PRESETS[name]()
