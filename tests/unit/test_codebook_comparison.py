"""The comparison of codebook trainings: same start, one curve each, and a resumable whole."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megatron_cogview.analysis import codebook_comparison
from megatron_cogview.analysis.codebook_comparison import METHODS, compare, setting, table
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.testing.picture_tars import write_tars
from megatron_cogview.tokenization.image import VQTokenizer
from megatron_cogview.tokenization.vq_model import VQModel
from megatron_cogview.training.tokenizer_trainer import train_tokenizer
from megatron_cogview.training.world import World

CPU = World(device=torch.device("cpu"))


def micro(data: Path) -> RunConfig:
    """The small setting at the size of a test; the grid must be that of its preset."""
    shared = setting("small")
    return dataclasses.replace(
        shared,
        image_tokenizer=dataclasses.replace(
            shared.image_tokenizer, image_size=64, hidden_size=4, code_dim=4
        ),
        tokenizer_training=dataclasses.replace(
            shared.tokenizer_training,
            data=(str(data),),
            steps=6,
            batch_size=4,
            warmup_steps=1,
            codebook_warmup_steps=2,
            validate_every=3,
            save_every=3,
            log_every=1,
        ),
    )


def test_all_methods_from_one_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_tars(tmp_path / "tars")
    output, shared = tmp_path / "out", micro(data)
    compare(shared, tuple(METHODS), output, CPU)
    results = json.loads((output / "comparison.json").read_text())
    assert list(results) == list(METHODS)
    for name, result in results.items():
        assert [step for step, _ in result["curve"]] == [3, 6]
        assert result["curve"][-1][1] == pytest.approx(result["l2"])
        assert 0 < result["missed"] < 10
        assert result["l2_without_codes"] > 0
        used = json.loads((output / name / "config.json").read_text())["image_tokenizer"]
        assert used["codebook"] == name.removesuffix("_revival")
        assert used["revive_dead_codes"] == name.endswith("_revival")
    # Up to the codebook's first step, all runs are one.
    first = [
        json.loads((output / name / "metrics.jsonl").read_text().split("\n")[1]) for name in METHODS
    ]
    assert len({row["loss"] for row in first}) == 1
    weights = [load_file(output / name / "image_tokenizer.safetensors") for name in METHODS]
    assert len({w["quantize_t.embed"].sum().item() for w in weights}) > 3
    assert Image.open(output / "figure2.png").size[0] > 500
    text = (output / "comparison.md").read_text()
    assert text == table(results)
    assert text.count("\n") == 2 + len(METHODS)
    assert "| 1.000 |" in text

    begun: list[str] = []

    def noted(config: RunConfig, world: World) -> Path:
        begun.append(config.image_tokenizer.codebook)
        return train_tokenizer(config, world)

    (output / "fixed" / "summary.json").unlink()
    monkeypatch.setattr(codebook_comparison, "train_tokenizer", noted)
    compare(shared, tuple(METHODS)[:4], output, CPU)
    assert begun == list(METHODS)[:4]
    again = json.loads((output / "comparison.json").read_text())
    assert again["fixed"]["curve"] == results["fixed"]["curve"]


def test_what_the_codebook_loses_is_counted(tmp_path: Path) -> None:
    """A codebook that holds the outputs themselves misses nothing; one of zeros, everything."""
    config = dataclasses.replace(
        setting("small").image_tokenizer, image_size=8, hidden_size=4, code_dim=4, num_codes=8
    )
    pictures = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8).numpy()
    tokenizer = VQTokenizer(VQModel(config), config, "f" * 64)
    latents = tokenizer.model.enc_b(tokenizer.pixels.to_float(torch.from_numpy(pictures)))
    embed = tokenizer.model.quantize_t.embed
    with torch.no_grad():
        embed.copy_(latents.permute(1, 0, 2, 3).flatten(1)[:, :8])
        perfect = codebook_comparison.quantisation(tokenizer, pictures)
        embed.zero_()
        nothing = codebook_comparison.quantisation(tokenizer, pictures)
    assert perfect["missed"] < 1e-6
    assert nothing["missed"] == pytest.approx(1.0)
    assert perfect["l2_without_codes"] == nothing["l2_without_codes"]


def test_the_full_setting_is_the_papers() -> None:
    config: Any = setting("full").image_tokenizer
    shape = (config.image_size, config.codes_per_side, config.hidden_size)
    assert (*shape, config.code_dim, config.num_codes) == (256, 32, 512, 256, 8192)
    assert (config.codebook_init, config.revive_dead_codes) == ("xavier", False)
