"""Where training data comes from."""

from dataclasses import dataclass

from megatron_cogview.configs.errors import refuse


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Token shards for the GPT."""

    shards: str = ""
    """Folder with ``manifest.json``, as written by ``tools/tokenize_dataset.py``."""
    validation_fraction: float = 0.01
    """Records kept out of training for the validation loss."""
    seed: int = 1234
    """Key of the shuffle; the split does not depend on it."""
    verify_crc: bool = True
    """Check each record's CRC32 when it is read."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.validation_fraction < 1.0:
            raise refuse("data.validation_fraction", self.validation_fraction, "must be in [0, 1)")
