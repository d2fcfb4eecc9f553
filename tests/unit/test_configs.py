"""Presets have the stated sizes, JSON gives back what it got, refusals say what is wrong."""

import ast
import dataclasses
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_cogview.configs.data import DataConfig
from megatron_cogview.configs.errors import ConfigError, refuse
from megatron_cogview.configs.generation import GenerationConfig
from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig
from megatron_cogview.configs.model import AttentionConfig, ModelConfig, NormConfig
from megatron_cogview.configs.optimizer import OptimizerConfig
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.precision import PrecisionConfig
from megatron_cogview.configs.presets import PRESETS, base_4b, fashion_3b, preset, tiny
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.configs.sequence import SequenceConfig
from megatron_cogview.configs.tokenizer_training import TokenizerTrainingConfig
from megatron_cogview.configs.training import TrainingConfig
from megatron_cogview.configs.vocab import COMMAND_TOKENS, PADDING_MULTIPLE, VocabConfig

PARAMETERS = {
    "tiny": 937_728,
    "tiny_vqgan": 937_728,
    "photos_64": 19_507_712,
    "base_363m": 363_292_672,
    "fashion_3b": 2_988_702_720,
    "base_4b": 3_929_175_040,
    "large_8b3": 8_299_388_928,
    "released": 3_929_175_040,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name: str) -> None:
    assert preset(name).model.num_params() == PARAMETERS[name]
    assert preset(name).preset == name


def test_tuples_from_json_are_checked_item_by_item() -> None:
    value = tiny().to_dict()
    value["sequence"]["codes_per_side"] = ["8"]
    with pytest.raises(
        ConfigError, match=r"sequence\.codes_per_side\[0\] = '8': must be of type int"
    ):
        RunConfig.from_json(json.dumps(value))
    value["sequence"]["codes_per_side"] = 8
    with pytest.raises(ConfigError, match=r"sequence\.codes_per_side = 8: must be a list"):
        RunConfig.from_json(json.dumps(value))


def test_the_demos_tokenizers_are_interchangeable() -> None:
    """Same pictures, grid and codes: everything after the tokenizer uses ``tiny``."""
    one, other = tiny(), preset("tiny_vqgan")
    assert other.image_tokenizer.kind == "vqgan"
    assert other.tokenizer_training.adversarial.weight > 0
    assert (
        replace(
            other,
            preset="tiny",
            image_tokenizer=one.image_tokenizer,
            tokenizer_training=one.tokenizer_training,
        )
        == one
    )
    for name in ("image_size", "codes_per_side", "num_codes"):
        assert getattr(one.image_tokenizer, name) == getattr(other.image_tokenizer, name)


def test_released_preset_sets_the_tokenizers_switches() -> None:
    """(g - dist) / tau of the squared distance; all else of the tokenizer is the paper's."""
    released, paper = preset("released").image_tokenizer, base_4b().image_tokenizer
    assert released.gumbel.scale_noise
    assert released.gumbel.squared
    assert replace(released, gumbel=paper.gumbel) == paper
    assert not (paper.gumbel.scale_noise or paper.gumbel.squared)


def test_pre_norm_has_half_the_norms() -> None:
    sandwich = base_4b().model
    pre = replace(sandwich, norm=NormConfig(placement="pre"))
    assert sandwich.num_params() - pre.num_params() == 48 * 2 * 2 * 2560


def test_original_vocabulary() -> None:
    vocab = VocabConfig()
    assert (vocab.first_text_id, vocab.first_command_id) == (8192, 58_192)
    assert (vocab.size, vocab.padded_size) == (58_219, 58_368)
    assert len(COMMAND_TOKENS) == len(set(COMMAND_TOKENS)) == 27
    ids = [vocab.command_id(token) for token in COMMAND_TOKENS]
    assert ids == list(range(58_192, 58_219))


@pytest.mark.parametrize("text_ids", [1, 485, 486, 1509, 50_000])
def test_padding_is_the_next_multiple(text_ids: int) -> None:
    vocab = VocabConfig(num_image_codes=512, num_text_ids=text_ids)
    assert vocab.padded_size % PADDING_MULTIPLE == 0
    assert 0 <= vocab.padded_size - vocab.size < PADDING_MULTIPLE


@pytest.mark.parametrize("name", PRESETS)
def test_sequences_fill_the_model(name: str) -> None:
    config = preset(name)
    sequence = config.sequence
    # [ROI1] text [BASE] [BOI1] image [EOI1]
    assert 4 + sequence.text_budget + sequence.num_image_tokens == sequence.length
    assert sequence.model_length == sequence.length - 1 <= config.model.max_positions


def test_fashion_shape() -> None:
    config = fashion_3b()
    a = config.model.attention
    assert (a.kind, a.window_block, a.window_blocks, a.num_pivots) == ("pivot", 128, 6, 768)
    assert (config.sequence.length, config.sequence.model_length) == (2561, 2560)
    assert config.sequence.text_budget == 57


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str, tmp_path: Path) -> None:
    config = preset(name)
    assert RunConfig.from_json(config.to_json()) == config
    config.save(tmp_path / "config.json")
    assert RunConfig.from_json((tmp_path / "config.json").read_text(encoding="utf-8")) == config


def test_json_round_trip_of_changed_values() -> None:
    config = replace(
        tiny(),
        data=DataConfig(shards=("图像/tokens",), verify_crc=False),
        parallel=ParallelConfig(tensor=2, sequence=True),
    )
    again = RunConfig.from_json(config.to_json())
    assert again == config != tiny()
    assert isinstance(again.sequence.codes_per_side, tuple)


def test_json_refuses_unknown_fields() -> None:
    value = json.loads(tiny().to_json())
    value["model"]["norm"]["placment"] = "sandwich"
    with pytest.raises(ConfigError, match=r"model\.norm.*placment"):
        RunConfig.from_json(json.dumps(value))
    with pytest.raises(ConfigError, match="expected an object"):
        RunConfig.from_json('{"preset": "tiny", "model": 3}')


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny().training.steps = 1  # type: ignore[misc]


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError) as error:
        preset("base_5b")
    assert "'base_5b'" in str(error.value)
    assert all(name in str(error.value) for name in PRESETS)


def test_every_field_is_documented() -> None:
    """Help texts come from the string under each field; a field without one has no help."""
    folder = Path(refuse.__code__.co_filename).parent
    fields = 0
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef):
                continue
            for field, following in itertools.pairwise([*node.body, None]):
                if isinstance(field, ast.AnnAssign):
                    fields += 1
                    assert isinstance(following, ast.Expr), f"{path.name}:{field.lineno}"
                    assert isinstance(following.value, ast.Constant), f"{path.name}:{field.lineno}"
    assert fields > 80


def shape(**changes: Any) -> ModelConfig:
    return ModelConfig(**{"num_layers": 2, "hidden_size": 8, "num_heads": 2, **changes})


# What is built, the field that the message must name, the value it must show.
REFUSALS: list[tuple[Callable[[], object], str, object]] = [
    (lambda: shape(num_layers=0), "model.num_layers", 0),
    (lambda: shape(max_positions=-1), "model.max_positions", -1),
    (lambda: shape(hidden_size=9), "model.hidden_size", 9),
    (lambda: shape(hidden_dropout=1.0), "model.hidden_dropout", 1.0),
    (lambda: shape(attention_dropout=-0.1), "model.attention_dropout", -0.1),
    (lambda: AttentionConfig(relax_alpha=0.5), "model.attention.relax_alpha", 0.5),
    (lambda: AttentionConfig(window_block=0), "model.attention.window_block", 0),
    (lambda: AttentionConfig(window_blocks=0), "model.attention.window_blocks", 0),
    (lambda: AttentionConfig(num_pivots=-1), "model.attention.num_pivots", -1),
    (lambda: VocabConfig(num_image_codes=65_537), "model.vocab.num_image_codes", 65_537),
    (lambda: VocabConfig(num_text_ids=0), "model.vocab.num_text_ids", 0),
    (lambda: SequenceConfig(text_budget=65), "sequence.text_budget", 65),
    (lambda: SequenceConfig(codes_per_side=(16, 32)), "sequence.codes_per_side", (16, 32)),
    (lambda: SequenceConfig(codes_per_side=(0,)), "sequence.codes_per_side", (0,)),
    (
        lambda: SequenceConfig(template="super_resolution", codes_per_side=(32,)),
        "sequence.codes_per_side",
        (32,),
    ),
    (lambda: ParallelConfig(tensor=0), "parallel.tensor", 0),
    (lambda: ParallelConfig(sequence=True), "parallel.sequence", True),
    (lambda: ParallelConfig(virtual_pipeline=2), "parallel.virtual_pipeline", 2),
    (lambda: ParallelConfig(recompute=True), "parallel.recompute", True),  # type: ignore[arg-type]
    (lambda: ParallelConfig(tensor=2).data(3), "processes", 3),
    (lambda: PrecisionConfig(min_loss_scale=0.0), "precision.min_loss_scale", 0.0),
    (lambda: OptimizerConfig(lr=0.0), "optimizer.lr", 0.0),
    (lambda: OptimizerConfig(warmup_fraction=1.5), "optimizer.warmup_fraction", 1.5),
    (lambda: OptimizerConfig(min_lr_ratio=-1.0), "optimizer.min_lr_ratio", -1.0),
    (lambda: OptimizerConfig(beta2=1.0), "optimizer.beta2", 1.0),
    (lambda: OptimizerConfig(clip_grad=-1.0), "optimizer.clip_grad", -1.0),
    (lambda: DataConfig(validation_fraction=1.0), "data.validation_fraction", 1.0),
    (lambda: TrainingConfig(steps=0), "training.steps", 0),
    (lambda: TrainingConfig(keep_checkpoints=1), "training.keep_checkpoints", 1),
    (lambda: TrainingConfig(text_weight=-1.0), "training.text_weight", -1.0),
    (
        lambda: TrainingConfig(text_weight=0.0, image_weight=0.0),
        "training.image_weight",
        (0.0, 0.0),
    ),
    (
        lambda: TrainingConfig(global_batch_size=10, micro_batch_size=4).num_micro_batches(1),
        "training.global_batch_size",
        10,
    ),
    (lambda: GenerationConfig(temperature=-0.1), "generation.temperature", -0.1),
    (lambda: GenerationConfig(top_k=-1), "generation.top_k", -1),
    (lambda: GenerationConfig(batch_size=0), "generation.batch_size", 0),
    (lambda: ImageTokenizerConfig(num_codes=0), "image_tokenizer.num_codes", 0),
    (lambda: ImageTokenizerConfig(image_size=100), "image_tokenizer.image_size", 100),
    (lambda: ImageTokenizerConfig(ema_decay=1.0), "image_tokenizer.ema_decay", 1.0),
    (lambda: TokenizerTrainingConfig(lr=-1.0), "tokenizer_training.lr", -1.0),
    (lambda: TokenizerTrainingConfig(steps=0), "tokenizer_training.steps", 0),
    (
        lambda: TokenizerTrainingConfig(random_crop=-0.1),
        "tokenizer_training.random_crop",
        -0.1,
    ),
    (
        lambda: TokenizerTrainingConfig(perceptual_weight=1.0),
        "tokenizer_training.perceptual_weights",
        "",
    ),
    (
        lambda: TokenizerTrainingConfig(validate_every=0),
        "tokenizer_training.validate_every",
        0,
    ),
    (
        lambda: TokenizerTrainingConfig(validation_fraction=0.0),
        "tokenizer_training.validation_fraction",
        0.0,
    ),
    (
        lambda: replace(tiny(), sequence=replace(tiny().sequence, length=98)),
        "sequence.length",
        98,
    ),
    (
        lambda: replace(tiny(), image_tokenizer=replace(tiny().image_tokenizer, num_codes=512)),
        "image_tokenizer.num_codes",
        512,
    ),
    (
        lambda: replace(tiny(), sequence=replace(tiny().sequence, codes_per_side=(4,))),
        "sequence.codes_per_side",
        (4,),
    ),
]


@pytest.mark.parametrize(("build", "field", "value"), REFUSALS, ids=[r[1] for r in REFUSALS])
def test_refusals_name_field_and_value(
    build: Callable[[], object], field: str, value: object
) -> None:
    with pytest.raises(ConfigError) as error:
        build()
    assert field in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_accept_their_own_layout(name: str) -> None:
    config = preset(name)
    config.check_layout(config.parallel.model_ranks)
