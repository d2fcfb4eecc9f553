"""The image tokenizer's training loop, on one process or several.

Losses are sums over the global batch divided by its size, the codebook learns from sums over all
processes, and order and draws follow from (seed, step): a run does not depend on the number of
processes, and a resumed run is the uninterrupted one.  Knows nothing of how processes are started.
"""

import dataclasses
import json
import logging
import math
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from megatron_cogview.configs.errors import DataError, refuse
from megatron_cogview.configs.optimizer import OptimizerConfig
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.storage.atomic import locked_directory, write_text
from megatron_cogview.storage.digest import sha256_bytes, sha256_file
from megatron_cogview.tokenization.image import load_image_tokenizer, save_image_tokenizer
from megatron_cogview.tokenization.quantizer import flatten_latents
from megatron_cogview.tokenization.vqvae import VQVAE, to_float
from megatron_cogview.training import picture_stream
from megatron_cogview.training.metrics import MetricsLog
from megatron_cogview.training.picture_stream import Pictures, PictureTars
from megatron_cogview.training.schedule import learning_rate
from megatron_cogview.training.tokenizer_report import judge, perplexity
from megatron_cogview.training.tokenizer_state import load_newest, save_checkpoint

logger = logging.getLogger(__name__)

FINAL_FILE = "image_tokenizer.safetensors"
# Settings that change what is stored or shown, not what is learned.
_NOT_IDENTITY = ("data", "output", "log_every", "save_every")
# Encoder outputs per code from which a data-derived codebook is drawn, and a bound on the batches.
_VECTORS_PER_CODE = 4
_MOST_START_BATCHES = 16


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    device: torch.device
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """Carries gradients and codebook sums; None for a single process."""
    waiting_group: dist.ProcessGroup | None = None
    """A gloo group with a long timeout, for the hours in which rank 0 may decode pictures."""


def train_tokenizer(config: RunConfig, world: World) -> Path:
    """Train, judge and save an image tokenizer; resume or return if that was begun or done.

    Returns:
        Path of the finished file.

    Raises:
        ConfigError: no data folder is named, or more processes than pictures in a batch.
        DataError: no usable pictures, or the output folder belongs to another run.
        CheckpointError: the folder's checkpoints cannot be read.
    """
    training = config.tokenizer_training
    if not training.data:
        raise refuse("tokenizer_training.data", training.data, "name a folder of WebDataset tars")
    if training.batch_size < world.size:
        raise refuse(
            "tokenizer_training.batch_size",
            training.batch_size,
            f"must be at least the number of processes, {world.size}",
        )
    output = Path(training.output)
    source = PictureTars(Path(training.data))
    with ExitStack() as stack:
        data_digest = ""
        if world.rank == 0:
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked_directory(output))
            data_digest = picture_stream.digest_of(source.shards())
            _claim(output, config, data_digest)
        data_digest, finished = _from_rank_0(world, (data_digest, _is_finished(output)))
        if finished:
            logger.info("%s: already trained from this configuration and data", output / FINAL_FILE)
            return output / FINAL_FILE
        pictures = _pictures(config, source, data_digest, world)
        _Run(config, pictures, world).train()
        if world.rank == 0:
            # Other processes keep their mapping of an unlinked file.
            shutil.rmtree(output / "cache", ignore_errors=True)
        _from_rank_0(world, None)
    return output / FINAL_FILE


class _Run:
    """Model, optimizer and data of one training."""

    def __init__(self, config: RunConfig, pictures: Pictures, world: World) -> None:
        self.config, self.pictures, self.world = config, pictures, world
        self.tokenizer, self.training = config.image_tokenizer, config.tokenizer_training
        self.output = Path(self.training.output)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.training.seed)
            model = VQVAE(self.tokenizer, seed=self.training.seed)
        self.model = model.to(world.device)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=self.training.lr)
        self.code_counts = torch.zeros(self.tokenizer.num_codes, device=world.device)

    def train(self) -> None:
        """Run the steps that are left, then judge and write the final files."""
        training = self.training
        checkpoints = self.output / "checkpoints"
        start, seconds_before = load_newest(checkpoints, self.model, self.optimizer)
        if start == 0 and self.tokenizer.codebook_init == "data":
            self._draw_codebook()
        began = time.monotonic()
        main = self.world.rank == 0
        deterministic = torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=True
        )
        log = MetricsLog(self.output, start, training.steps, main, "image tokenizer")
        with deterministic, log:
            logged, logged_at = start, began
            for step in range(start, training.steps):
                losses, rate = self._step(step)
                log.advance()
                done = step + 1
                if done % training.log_every == 0 or done == training.steps:
                    values = self._metrics(losses, rate)
                    now = time.monotonic()
                    speed = (done - logged) * training.batch_size / max(now - logged_at, 1e-9)
                    log.write(done, {**values, "pictures_per_second": speed})
                    logged, logged_at = done, now
                if main and (done % training.save_every == 0 or done == training.steps):
                    spent = seconds_before + time.monotonic() - began
                    save_checkpoint(
                        checkpoints, self.model, self.optimizer, step=done, seconds=spent
                    )
        if main:
            self._finish(seconds_before + time.monotonic() - began)

    def _batch(self, step: int, part: tuple[int, int]) -> Tensor:
        """Part (rank, number of processes) of a step's pictures, fp32 ``[B, 3, S, S]``."""
        training = self.training
        pixels = picture_stream.training_batch(
            self.pictures,
            step,
            batch_size=training.batch_size,
            seed=training.seed,
            flip=training.flip,
            part=part,
        )
        return to_float(torch.from_numpy(pixels).to(self.world.device))

    @torch.no_grad()
    def _draw_codebook(self) -> None:
        """Codebook from the encoder outputs of the first batches."""
        per_batch = self.training.batch_size * self.tokenizer.codes_per_side**2
        batches = math.ceil(_VECTORS_PER_CODE * self.tokenizer.num_codes / per_batch)
        # Every process goes through whole batches, part by part: the draw is over positions, so the
        # vectors must stand in the order that a single process has.
        size = self.world.size
        parts = [(rank, size) for rank in range(size)]
        vectors = [
            flatten_latents(self.model.enc_b(self._batch(step, part)))
            for step in range(min(batches, _MOST_START_BATCHES))
            for part in parts
        ]
        quantizer = self.model.quantize_t
        quantizer.initialise_from(torch.cat(vectors))
        if self.world.group is not None:
            for buffer in quantizer.buffers():
                dist.broadcast(buffer, src=0, group=self.world.group)

    def _step(self, step: int) -> tuple[Tensor, float]:
        """One update; gives this process's share of [squared error, commitment] and the rate."""
        training, group = self.training, self.world.group
        rate = learning_rate(_schedule(self.config), step, training.steps)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        pictures_BCSS = self._batch(step, (self.world.rank, self.world.size))
        result = self.model(pictures_BCSS)
        share = len(pictures_BCSS) / training.batch_size
        error = functional.mse_loss(result.reconstruction_BCSS, pictures_BCSS) * share
        commitment = result.commitment * share
        self.optimizer.zero_grad(set_to_none=True)
        (error + self.tokenizer.commitment * commitment).backward()
        if group is not None:
            _sum_gradients(self.model, group)
        self.optimizer.step()
        codes_N = result.codes_BHW.flatten()
        self.model.quantize_t.update(
            flatten_latents(result.latents_BDHW.detach()), codes_N, step=step, group=group
        )
        self.code_counts += torch.bincount(codes_N, minlength=len(self.code_counts))
        return torch.stack([error.detach(), commitment.detach()]), rate

    def _metrics(self, losses: Tensor, rate: float) -> dict[str, float]:
        """Numbers of the last step, and code use since the last call, over all processes."""
        packed = torch.cat([losses, self.code_counts])
        if self.world.group is not None:
            dist.all_reduce(packed, group=self.world.group)
        self.code_counts.zero_()
        error, commitment = packed[:2].tolist()
        counts = packed[2:]
        return {
            "loss": error + self.tokenizer.commitment * commitment,
            "reconstruction_loss": error,
            "commitment_loss": commitment,
            # Pixels span 2 here, so the peak's square is 4.
            "psnr": 10.0 * math.log10(4.0 / max(error, 1e-10)),
            "codes_in_use": float((counts > 0).sum()),
            "perplexity": perplexity(counts),
            "lr": rate,
        }

    def _finish(self, seconds: float) -> None:
        """Final file, verdict on held-out pictures, and last of all ``summary.json``."""
        path = self.output / FINAL_FILE
        save_image_tokenizer(self.model, self.tokenizer, path)
        tokenizer = load_image_tokenizer(path, str(self.world.device))
        summary = {
            **judge(tokenizer, self.pictures, self.output),
            "seconds": seconds,
            "steps": self.training.steps,
            "training_pictures": len(self.pictures.train_rows),
            "validation_pictures": len(self.pictures.validation_rows),
            "rejected": self.pictures.rejected,
            "fingerprint": tokenizer.fingerprint,
        }
        write_text(self.output / "summary.json", json.dumps(summary, indent=1) + "\n")
        logger.info(
            "%s: PSNR %.2f dB on %d held-out pictures, %d of %d codes used",
            path,
            summary["psnr"],
            summary["pictures_judged"],
            summary["codes_used"],
            self.tokenizer.num_codes,
        )


def _schedule(config: RunConfig) -> OptimizerConfig:
    training = config.tokenizer_training
    fraction = min(training.warmup_steps, training.steps) / training.steps
    return OptimizerConfig(lr=training.lr, warmup_fraction=fraction, min_lr_ratio=0.1)


def _sum_gradients(model: VQVAE, group: dist.ProcessGroup) -> None:
    """One reduction for all; each process's loss is already divided by the global batch size."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


def _identity(config: RunConfig, data_digest: str) -> dict[str, Any]:
    """All that decides the result, apart from the number of processes."""
    training = dataclasses.asdict(config.tokenizer_training)
    kept = {name: value for name, value in training.items() if name not in _NOT_IDENTITY}
    return {
        **{
            f"image_tokenizer.{k}": v for k, v in dataclasses.asdict(config.image_tokenizer).items()
        },
        **{f"tokenizer_training.{k}": v for k, v in kept.items()},
        "content of tokenizer_training.data": data_digest,
    }


def _claim(output: Path, config: RunConfig, data_digest: str) -> None:
    """Mark the folder as this run's, or refuse a folder that is another's."""
    path, identity = output / "run.json", _identity(config, data_digest)
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise DataError(f"{path}: not JSON; choose another tokenizer_training.output") from None
        differing = sorted(
            name
            for name in identity.keys() | before.keys()
            if identity.get(name) != before.get(name)
        )
        if differing:
            changes = "; ".join(f"{n}: {before.get(n)!r} -> {identity.get(n)!r}" for n in differing)
            raise DataError(
                f"{output}: holds another run ({changes}); choose another "
                "tokenizer_training.output, or delete that folder to train anew"
            )
    write_text(path, json.dumps(identity, indent=1) + "\n")
    write_text(output / "config.json", config.to_json())


def _is_finished(output: Path) -> bool:
    """Whether the final file is there and is the one the summary was written for."""
    try:
        summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        return bool(summary["fingerprint"] == sha256_file(output / FINAL_FILE))
    except (OSError, ValueError, KeyError):
        return False


def _pictures(config: RunConfig, source: PictureTars, data_digest: str, world: World) -> Pictures:
    """Decode once, on rank 0; with several processes the others map its file."""
    size = config.image_tokenizer.image_size
    key = sha256_bytes(f"{data_digest} {size}".encode())[:16]
    stem = Path(config.tokenizer_training.output) / "cache" / f"pictures-{key}"
    several = world.size > 1
    found = None
    if world.rank == 0:
        found = picture_stream.decode_all(source, size, stem, always_file=several)
    _from_rank_0(world, None)
    pixels, ids, rejected = found or picture_stream.open_cache(stem, size)
    if rejected and world.rank == 0:
        logger.warning("%s: skipped %s", source.folder, rejected)
    train_rows, held_out = picture_stream.split(ids, config.tokenizer_training.validation_fraction)
    return Pictures(pixels, ids, train_rows, held_out, rejected)


def _from_rank_0(world: World, value: Any) -> Any:
    """The value that rank 0 has; everyone waits for it."""
    if world.waiting_group is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=world.waiting_group)
    return box[0]
