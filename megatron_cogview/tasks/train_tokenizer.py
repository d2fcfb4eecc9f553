"""``train-tokenizer``: train the image tokenizer on folders of tars, on 1..N processes."""

from megatron_cogview.configs.run import RunConfig
from megatron_cogview.training.tokenizer_trainer import train_tokenizer
from megatron_cogview.training.world import joined


def run(config: RunConfig) -> None:
    """Train as ``config.image_tokenizer`` and ``config.tokenizer_training`` say.

    Raises:
        ConfigError, DataError, CheckpointError: see :func:`train_tokenizer`.
    """
    with joined() as world:
        train_tokenizer(config, world)
