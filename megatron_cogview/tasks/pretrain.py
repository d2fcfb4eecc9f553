"""``pretrain``: wire shards, engine and trainer together."""

import contextlib
import logging
from pathlib import Path

from megatron_cogview.configs.run import RunConfig
from megatron_cogview.data.loader import build_loader
from megatron_cogview.parallel import topology
from megatron_cogview.parallel.determinism import make_deterministic
from megatron_cogview.parallel.seeding import seed_initialization
from megatron_cogview.storage.atomic import locked_directory
from megatron_cogview.tokenization.layout import SequenceLayout
from megatron_cogview.training.signals import StopRequest, stopped

logger = logging.getLogger(__name__)


def run(config: RunConfig) -> int:
    """Train, from the run folder's newest checkpoint if it has one.

    Returns:
        The exit code: 0 at the end of the run, :func:`~megatron_cogview.training.signals.stopped`'s
        when somebody asked it to stop and it was saved.

    Raises:
        ConfigError: an impossible layout.
        DataError: missing or damaged shards, or another process trains in the same folder.
        CheckpointError: the run folder belongs to another run, or the last checkpoint could not be
            written.
        TrainingError: it went wrong again and again.
    """
    if config.training.deterministic:
        make_deterministic()
    # The watchdog must speak first: it knows who is late.
    patience_s = 5 * config.survival.hang_timeout_seconds or topology.FOREVER_S
    timeout_s = max(topology.GROUP_TIMEOUT_S, patience_s)
    with StopRequest() as stop, topology.running(config.parallel, timeout_s) as groups:
        config.check_layout(groups.world_size)
        layout = SequenceLayout(config.sequence, config.model.vocab)
        loader = build_loader(
            layout, config.training, config.data, groups.data_rank, groups.data_size
        )
        # megatron-core may be imported only now that the CPU backend is in place.
        from megatron_cogview.engines.megatron import MegatronEngine
        from megatron_cogview.model.watch import ActivationWatch
        from megatron_cogview.training.trainer import Trainer

        seed_initialization(config.training.seed, groups)
        engine = MegatronEngine(config, groups)
        folder = Path(config.training.output)
        with contextlib.ExitStack() as held:
            if groups.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked_directory(folder))
            logger.info(
                "%s: %d parameters, tensor %d x pipeline %d x data %d",
                config.preset,
                config.model.num_params(),
                groups.tensor_size,
                groups.pipeline_size,
                groups.data_size,
            )
            tokenizers = loader.dataset.sets[0].manifest["tokenizers"]
            fingerprints = {kind: tokenizers[kind]["fingerprint"] for kind in ("text", "image")}
            fingerprints["data"] = loader.dataset.fingerprint
            watch = ActivationWatch(engine.chunks, config)
            trainer = Trainer(config, groups, engine, loader, fingerprints, stop, watch)
            ended = trainer.run()
    return 0 if ended else stopped(stop, groups.is_main)
