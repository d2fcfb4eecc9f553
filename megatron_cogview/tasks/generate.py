"""``generate``: wire tokenizers, checkpoint and decoder together."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_cogview.configs.errors import CheckpointError, ConfigError, DataError, refuse
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.generation.pictures import png, sheet, write_pictures
from megatron_cogview.generation.prompts import Prompt, read_prompts
from megatron_cogview.parallel import topology
from megatron_cogview.parallel.topology import Topology
from megatron_cogview.storage.atomic import write_bytes, write_text
from megatron_cogview.tokenization.image import load_image_tokenizer
from megatron_cogview.tokenization.text import TextTokenizer

logger = logging.getLogger(__name__)


def run(config: RunConfig) -> None:
    """Draw every prompt: ``OUTPUT/ID.png``, ``grid.png`` and ``samples.json``.

    Raises:
        ConfigError: a path that is not set, or an unsuitable layout.
        DataError: unusable prompts or tokenizers.
        CheckpointError: no checkpoint, or one of another model or other tokenizers.
    """
    settings = config.generation
    for name in ("checkpoint", "text_tokenizer", "image_tokenizer", "prompts"):
        if not getattr(settings, name):
            raise ConfigError(f"generation.{name}: not set; see --help")
    if config.sequence.template != "text_to_image":
        raise ConfigError(
            f"sequence.template = {config.sequence.template!r}: generate draws from captions, "
            "template 'text_to_image'"
        )
    for name, most in (("pipeline", 1), ("sequence", False), ("virtual_pipeline", 1)):
        if getattr(config.parallel, name) != most:
            value = getattr(config.parallel, name)
            raise refuse(f"parallel.{name}", value, "generation runs on the tensor axis alone")
    text_tokenizer = TextTokenizer(Path(settings.text_tokenizer))
    text_tokenizer.check_fits(config.model.vocab)
    prompts = read_prompts(Path(settings.prompts))
    texts = encode_prompts(prompts, text_tokenizer, config)
    with topology.running(config.parallel) as groups:
        config.check_division()
        if groups.data_size > 1:
            raise refuse(
                "parallel.tensor",
                config.parallel.tensor,
                f"{groups.world_size} processes were started; generation uses exactly this many",
            )
        image_tokenizer = load_image_tokenizer(
            Path(settings.image_tokenizer), device=str(groups.device)
        )
        fingerprints = {"text": text_tokenizer.fingerprint, "image": image_tokenizer.fingerprint}
        model, step = load_model(config, groups, fingerprints)
        from megatron_cogview.generation.text_to_image import generate_codes

        codes_NHW = generate_codes(model, config, groups, texts)
        if groups.is_main:
            pictures = image_tokenizer.decode(codes_NHW).numpy()
            _write(config, prompts, codes_NHW, pictures, step)


def encode_prompts(
    prompts: list[Prompt], tokenizer: TextTokenizer, config: RunConfig
) -> list[list[int]]:
    """Text ids of the prompts, by the policy of ``sequence.text_policy``.

    Raises:
        DataError: a caption over the budget under policy ``reject``.
    """
    budget, texts = config.sequence.text_budget, []
    for prompt, ids in zip(
        prompts, tokenizer.encode_batch([p.caption for p in prompts]), strict=True
    ):
        if len(ids) > budget and config.sequence.text_policy == "reject":
            raise DataError(
                f"prompt {prompt.id!r}: {len(ids)} text ids, and sequence.text_budget = {budget}; "
                "shorten it or pass --sequence.text-policy truncate"
            )
        if len(ids) > budget:
            logger.warning("prompt %r: cut from %d to %d text ids", prompt.id, len(ids), budget)
        texts.append(ids[:budget])
    return texts


def load_model(
    config: RunConfig, groups: Topology, fingerprints: dict[str, str]
) -> tuple[torch.nn.Module, int]:
    """The trained model in evaluation mode under this run's layout, and its training step."""
    from megatron_cogview.checkpoint import commit, sharded
    from megatron_cogview.checkpoint.identity import check_belongs
    from megatron_cogview.model.cogview import build_model
    from megatron_cogview.model.precision import in_precision, resolve_dtype
    from megatron_cogview.parallel.seeding import seed_initialization

    root = Path(config.generation.checkpoint)
    found = commit.newest_valid(root)
    if found is None:
        raise CheckpointError(f"{root}: no checkpoint; name the checkpoints folder of a run")
    directory, manifest = found
    check_belongs(directory, manifest["state"], config, fingerprints)
    seed_initialization(config.training.seed, groups)
    chunks = build_model(config)
    sharded.load_model(chunks, groups, directory)
    dtype = resolve_dtype(config.precision)
    model = in_precision(chunks[0].config, chunks[0].to(groups.device), dtype)
    logger.info("loaded %s", directory)
    return model.eval(), int(manifest["step"])


def _write(
    config: RunConfig,
    prompts: list[Prompt],
    codes_NHW: torch.Tensor,
    pictures_NHWC: NDArray[np.uint8],
    step: int,
) -> None:
    folder = Path(config.generation.output)
    folder.mkdir(parents=True, exist_ok=True)
    files = write_pictures(folder, [p.id for p in prompts], pictures_NHWC)
    write_bytes(folder / "grid.png", png(sheet(pictures_NHWC)))
    record = {
        "settings": dataclasses.asdict(config.generation),
        "preset": config.preset,
        "training_step": step,
        "samples": [
            {"id": p.id, "caption": p.caption, "file": file, "codes": codes.flatten().tolist()}
            for p, file, codes in zip(prompts, files, codes_NHW, strict=True)
        ],
    }
    write_text(folder / "samples.json", json.dumps(record, ensure_ascii=False) + "\n")
    logger.info("%d pictures in %s, all of them in %s", len(files), folder, folder / "grid.png")
