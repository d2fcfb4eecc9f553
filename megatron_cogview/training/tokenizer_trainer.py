"""The image tokenizer's training loop, on one process or several.

Order and draws follow from (seed, step) and no sum depends on the number of processes: neither does
a run, and a resumed run is the uninterrupted one.  Knows nothing of how processes are started.
"""

import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cogview.configs.errors import DataError, refuse
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.data.raw import PairSource
from megatron_cogview.data.sources import open_pictures
from megatron_cogview.storage.atomic import locked_directory, write_text
from megatron_cogview.storage.digest import sha256_bytes, sha256_file
from megatron_cogview.tokenization.exactness import repeatable
from megatron_cogview.tokenization.image import (
    VQTokenizer,
    load_image_tokenizer,
    save_image_tokenizer,
)
from megatron_cogview.tokenization.pixels import OURS
from megatron_cogview.training import picture_stream
from megatron_cogview.training.metrics import MetricsLog
from megatron_cogview.training.picture_stream import Pictures
from megatron_cogview.training.tokenizer_report import judge, perplexity, write_report
from megatron_cogview.training.tokenizer_state import Progress, resume, save_checkpoint
from megatron_cogview.training.tokenizer_update import TokenizerUpdate, uses_bf16
from megatron_cogview.training.world import World

logger = logging.getLogger(__name__)

FINAL_FILE = "image_tokenizer.safetensors"
_SHOWN = ("loss", "psnr", "codes_in_use", "pictures_per_second", "lr")
# Settings that change what is stored or shown, not what is learned.
_NOT_IDENTITY = {"data", "output", "log_every", "save_every", "validate_every"}
_NOT_IDENTITY |= {"validation_pictures", "perceptual_weights", "precision"}


def train_tokenizer(config: RunConfig, world: World) -> Path:
    """Train, judge and save an image tokenizer; resume or return if that was begun or done.

    Returns:
        Path of the finished file.

    Raises:
        ConfigError: no data folder is named, or more processes than pictures in a batch.
        DataError: no usable pictures, unusable weights of the perceptual loss, or the output folder
            belongs to another run.
        CheckpointError: the folder's checkpoints cannot be read.
    """
    training = config.tokenizer_training
    if not training.data:
        why = "name folders of tars, or tables of pictures"
        raise refuse("tokenizer_training.data", training.data, why)
    if training.batch_size < world.size:
        raise refuse(
            "tokenizer_training.batch_size",
            training.batch_size,
            f"must be at least the number of processes, {world.size}",
        )
    output = Path(training.output)
    sources = [open_pictures(Path(folder)) for folder in training.data]
    with ExitStack() as stack:
        data_digest = ""
        if world.rank == 0:
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked_directory(output))
            data_digest = picture_stream.digest_of(sources)
            _claim(output, _identity(config, data_digest, world), config)
        data_digest, finished = world.from_rank_0((data_digest, _is_finished(output)))
        if finished:
            logger.info("%s: already trained from this configuration and data", output / FINAL_FILE)
            return output / FINAL_FILE
        pictures = _pictures(config, sources, data_digest, world)
        _Run(config, pictures, world).train()
        if world.rank == 0:
            # Other processes keep their mapping of an unlinked file.
            shutil.rmtree(output / "cache", ignore_errors=True)
        world.from_rank_0(None)
    return output / FINAL_FILE


class _Run:
    """Networks and data of one training."""

    def __init__(self, config: RunConfig, pictures: Pictures, world: World) -> None:
        self.config, self.pictures, self.world = config, pictures, world
        self.tokenizer, self.training = config.image_tokenizer, config.tokenizer_training
        self.output = Path(self.training.output)
        self.checkpoints = self.output / "checkpoints"
        self.seconds_before, self.began = 0.0, time.monotonic()
        self.update = TokenizerUpdate(config, world)
        self.code_counts = torch.zeros(self.tokenizer.num_codes, device=world.device)

    def train(self) -> None:
        """Run the steps that are left, then judge and write the final files."""
        training = self.training
        before = resume(self.checkpoints, self.update.parts, self.world)
        start = 0
        if before is not None:
            start, self.seconds_before = before.step, before.seconds
            self.code_counts += before.code_counts.to(self.world.device)
        main = self.world.rank == 0
        log = MetricsLog(self.output, start, training.steps, main, "image tokenizer", _SHOWN)
        with repeatable(self.world.device), log:
            logged, logged_at = start, self.began
            for step in range(start, training.steps):
                losses = self._step(step)
                log.advance()
                done = step + 1
                values: dict[str, float] = {}
                if done % training.log_every == 0 or done == training.steps:
                    values = self._metrics(losses, step)
                    now = time.monotonic()
                    speed = (done - logged) * training.batch_size / max(now - logged_at, 1e-9)
                    values["pictures_per_second"] = speed
                    logged, logged_at = done, now
                if main and self._is_validated(done):
                    values |= self._validate(done, log)
                if values:
                    log.write(done, values)
                if done % training.save_every == 0 or done == training.steps:
                    self._save(done)
        if main:
            self._finish()

    @property
    def _seconds(self) -> float:
        """Time spent, earlier lives included."""
        return self.seconds_before + time.monotonic() - self.began

    def _save(self, done: int) -> None:
        """Write a checkpoint; every process adds its uses of the codes."""
        counts = self.code_counts.clone()
        self.world.sum([counts])
        if self.world.rank == 0:
            progress = Progress(done, self._seconds, counts)
            save_checkpoint(self.checkpoints, self.update.parts, progress)

    def _is_validated(self, done: int) -> bool:
        """There is nothing to judge before there is a codebook."""
        training = self.training
        due = done % training.validate_every == 0 or done == training.steps
        return due and done > training.codebook_warmup_steps

    def _batch(self, step: int, part: tuple[int, int]) -> Tensor:
        """Part (rank, number of processes) of a step's pictures, fp32 ``[B, 3, S, S]``."""
        training = self.training
        pixels = picture_stream.training_batch(
            self.pictures,
            step,
            image_size=self.tokenizer.image_size,
            batch_size=training.batch_size,
            seed=training.seed,
            flip=training.flip,
            part=part,
        )
        return OURS.to_float(torch.from_numpy(pixels).to(self.world.device))

    def _step(self, step: int) -> dict[str, Tensor]:
        """One update; gives this process's shares of the losses."""
        drawn = self.tokenizer.codebook_init == "data"
        if drawn and step == self.training.codebook_warmup_steps:
            self.update.draw_codebook(step, self._batch)
        pictures_BCSS = self._batch(step, (self.world.rank, self.world.size))
        losses, codes_N = self.update(step, pictures_BCSS)
        self.code_counts += torch.bincount(codes_N, minlength=len(self.code_counts))
        return losses

    def _metrics(self, losses: dict[str, Tensor], step: int) -> dict[str, float]:
        """Numbers of this step, and code use since the last call, over all processes."""
        packed = torch.cat([torch.stack(list(losses.values())), self.code_counts])
        self.world.sum([packed])
        self.code_counts.zero_()
        values = dict(zip(losses, packed[: len(losses)].tolist(), strict=True))
        counts = packed[len(losses) :]
        return {
            **values,
            "psnr": -10.0 * math.log10(max(values["l2"], 1e-10)),
            "codes_in_use": float((counts > 0).sum()),
            "perplexity": perplexity(counts),
            "lr": self.update.rate(step),
        }

    def _validate(self, done: int, log: MetricsLog) -> dict[str, float]:
        """Held-out pictures through the network as it stands."""
        tokenizer = VQTokenizer(self.update.model, self.tokenizer, fingerprint="")
        shown = self.pictures.validation_VSSC[: self.training.validation_pictures]
        numbers, sheet = judge(tokenizer, shown)
        log.picture(done, "reconstructions", sheet)
        return {f"validation_{name}": float(value) for name, value in numbers.items()}

    def _finish(self) -> None:
        """Final file, verdict on held-out pictures, and last of all ``summary.json``."""
        path = self.output / FINAL_FILE
        save_image_tokenizer(self.update.model, self.tokenizer, path)
        tokenizer = load_image_tokenizer(path, str(self.world.device))
        summary = {
            **write_report(tokenizer, self.pictures, self.output),
            "seconds": self._seconds,
            "steps": self.training.steps,
            "training_pictures": len(self.pictures.train_rows),
            "validation_pictures": len(self.pictures.pixels_NLLC) - len(self.pictures.train_rows),
            "rejected": self.pictures.rejected,
            "fingerprint": tokenizer.fingerprint,
        }
        write_text(self.output / "summary.json", json.dumps(summary, indent=1) + "\n")
        logger.info(
            "%s: PSNR %.2f dB, SSIM %.3f on %d held-out pictures, %d of %d codes used",
            path,
            summary["psnr"],
            summary["ssim"],
            summary["pictures_judged"],
            summary["codes_used"],
            self.tokenizer.num_codes,
        )


def _identity(config: RunConfig, data_digest: str, world: World) -> dict[str, Any]:
    """All that decides the result, apart from the number of processes; JSON values."""
    training = dataclasses.asdict(config.tokenizer_training)
    kept = {name: value for name, value in training.items() if name not in _NOT_IDENTITY}
    weights = training["perceptual_weights"]
    identity = {
        **{
            f"image_tokenizer.{k}": v for k, v in dataclasses.asdict(config.image_tokenizer).items()
        },
        **{f"tokenizer_training.{k}": v for k, v in kept.items()},
        "content of tokenizer_training.data": data_digest,
        "content of tokenizer_training.perceptual_weights": _digest_of_file(weights),
        "bf16": uses_bf16(config.tokenizer_training, world.device),
    }
    value: dict[str, Any] = json.loads(json.dumps(identity))
    return value


def _digest_of_file(path: str) -> str:
    """Empty for no file; a missing one is refused where it is read."""
    return sha256_file(Path(path)) if path and Path(path).is_file() else ""


def _claim(output: Path, identity: dict[str, Any], config: RunConfig) -> None:
    """Mark the folder as this run's, or refuse a folder that is another's."""
    path = output / "run.json"
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


def _pictures(
    config: RunConfig, sources: Sequence[PairSource], data_digest: str, world: World
) -> Pictures:
    """Decode once, on rank 0; with several processes the others map its file."""
    training, size = config.tokenizer_training, config.image_tokenizer.image_size
    sizes = picture_stream.Sizes(size, round(size * (1.0 + training.random_crop)))
    fraction = training.validation_fraction
    key = sha256_bytes(f"{data_digest} {sizes} {fraction}".encode())[:16]
    stem = Path(training.output) / "cache" / f"pictures-{key}"
    found = None
    if world.rank == 0:
        several = world.size > 1
        found = picture_stream.load(sources, sizes, fraction, stem, always_file=several)
        if found.rejected:
            logger.warning("%s: skipped %s", ", ".join(training.data), found.rejected)
    world.from_rank_0(None)
    return found or picture_stream.open_cache(stem, sizes, fraction)
