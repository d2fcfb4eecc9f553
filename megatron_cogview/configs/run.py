"""RunConfig: everything a run depends on, with the checks that span several parts."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_cogview.configs.data import DataConfig
from megatron_cogview.configs.errors import refuse
from megatron_cogview.configs.from_json import build
from megatron_cogview.configs.generation import GenerationConfig
from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig
from megatron_cogview.configs.layout import DIVISION, Layout, require_legal
from megatron_cogview.configs.model import ModelConfig
from megatron_cogview.configs.optimizer import OptimizerConfig
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.precision import PrecisionConfig
from megatron_cogview.configs.sequence import SequenceConfig
from megatron_cogview.configs.survival import SurvivalConfig
from megatron_cogview.configs.tokenizer_training import TokenizerTrainingConfig
from megatron_cogview.configs.training import TrainingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The whole of a run; every task takes the parts it needs."""

    preset: str
    """Name of the preset it started from."""
    model: ModelConfig
    """The GPT."""
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    """Template of a training sequence."""
    image_tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    """Shape of the image tokenizer."""
    tokenizer_training: TokenizerTrainingConfig = field(default_factory=TokenizerTrainingConfig)
    """Training of the image tokenizer."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over processes."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Number formats."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Adam and schedule."""
    data: DataConfig = field(default_factory=DataConfig)
    """Token shards."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Training loop."""
    survival: SurvivalConfig = field(default_factory=SurvivalConfig)
    """What is done when something goes wrong."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """Sampling."""
    profile: bool = False
    """Write a trace of ``training.profile_steps`` steps into the run folder."""

    def __post_init__(self) -> None:
        if self.sequence.model_length > self.model.max_positions:
            raise refuse(
                "sequence.length",
                self.sequence.length,
                f"gives {self.sequence.model_length} inputs, more than model.max_positions = "
                f"{self.model.max_positions}",
            )
        if self.image_tokenizer.num_codes != self.model.vocab.num_image_codes:
            raise refuse(
                "image_tokenizer.num_codes",
                self.image_tokenizer.num_codes,
                f"must equal model.vocab.num_image_codes = {self.model.vocab.num_image_codes}",
            )
        if self.image_tokenizer.codes_per_side != self.sequence.codes_per_side[-1]:
            raise refuse(
                "sequence.codes_per_side",
                self.sequence.codes_per_side,
                f"the last grid must be the image tokenizer's, "
                f"{self.image_tokenizer.codes_per_side} codes a side",
            )

        warmup = self.tokenizer_training.codebook_warmup_steps
        if warmup and self.image_tokenizer.codebook_init != "data":
            raise refuse(
                "tokenizer_training.codebook_warmup_steps",
                warmup,
                "needs image_tokenizer.codebook_init = 'data'",
            )

    def check_layout(self, world_size: int) -> None:
        """Refuse a parallel layout that this model cannot be split into.

        Raises:
            ConfigError: naming field, value, reason and the nearest legal values.
        """
        require_legal(Layout.of(self, world_size))

    def check_division(self) -> None:
        """Refuse a layout that does not divide heads, widths and layers evenly.

        Raises:
            ConfigError: naming field, value, reason and the nearest legal values.
        """
        require_legal(Layout.of(self, self.parallel.model_ranks), DIVISION)

    def to_json(self) -> str:
        """All values, readable and in a fixed order."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """JSON values: what a reader of :meth:`to_json` gets back."""
        value: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return value

    @classmethod
    def from_json(cls, text: str) -> "RunConfig":
        """The inverse of :meth:`to_json`; unknown or missing names are errors."""
        value = json.loads(text)
        config = build(cls, value, "")
        assert isinstance(config, cls)
        return config

    def save(self, path: Path) -> None:
        """Write the resolved configuration."""
        path.write_text(self.to_json(), encoding="utf-8")
