"""checkpoint.export: weights to one file and back, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_cogview.checkpoint import commit
from megatron_cogview.checkpoint.boxes import Box
from megatron_cogview.checkpoint.export import (
    TABLE,
    export_weights,
    import_weights,
    stored_shapes,
)
from megatron_cogview.checkpoint.index import FILE, MASTER, OPTIMIZER, write_index
from megatron_cogview.checkpoint.reader import CheckpointReader
from megatron_cogview.checkpoint.scalars import write_common
from megatron_cogview.checkpoint.snapshot import Piece, Snapshot
from megatron_cogview.configs.errors import CheckpointError
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.testing.oracle import random_weights
from megatron_cogview.testing.toy_run import VOCAB, toy_config

ROOT = Path(__file__).resolve().parents[2]
FINGERPRINTS = {"text": "t", "image": "i"}


def checkpoint(root: Path, config: RunConfig, half: bool = False) -> Path:
    """Random weights in parts, with something of an optimizer."""
    pieces: list[Piece] = []
    for key, shape in stored_shapes(config.model).items():
        box = Box((0,) * len(shape), shape)
        data = torch.randn(shape)
        if key == TABLE:
            data[VOCAB.size :] = 0
        pieces.append(Piece("optimizer.state.exp_avg." + key, shape, box, data * 2, True))
        if half:
            pieces.append(Piece(f"{OPTIMIZER}.{MASTER}.{key}", shape, box, data, True))
        pieces.append(Piece(key, shape, box, data.bfloat16() if half else data, True))
    folder, snapshot = commit.prepare(root, 7), Snapshot(with_cuda=False)
    snapshot.take(pieces)
    written = snapshot.write(folder, 0)
    write_index(folder / FILE, written.entries, {})
    write_common(folder, {"adam_step": 7})
    state = {"run": config.to_dict(), "fingerprints": FINGERPRINTS, "progress": {}}
    return commit.commit(folder, 7, state, written.files)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return toy_config(tmp_path / "tokens", tmp_path / "run")


@pytest.mark.parametrize("half", [False, True])
def test_round_trip_bit_for_bit(half: bool, config: RunConfig, tmp_path: Path) -> None:
    source, output = checkpoint(tmp_path / "run", config, half), tmp_path / "model.safetensors"
    export_weights(source, output)
    back = import_weights(output, tmp_path / "imported")
    manifest = commit.verify(back)
    assert manifest["step"] == 7
    assert manifest["state"]["run"] == config.to_dict()
    assert manifest["state"]["fingerprints"] == FINGERPRINTS
    assert manifest["state"]["weights_only"] is True
    old, new = CheckpointReader(source), CheckpointReader(back)
    assert set(new.index) == set(stored_shapes(config.model))
    for key in new.index:
        assert torch.equal(
            new.whole(key), old.whole(f"{OPTIMIZER}.{MASTER}.{key}" if half else key)
        )
    again = tmp_path / "again.safetensors"
    export_weights(back, again)
    # The order of the metadata is the library's whim; tensors and values are the same.
    with safe_open(again, framework="pt") as a, safe_open(output, framework="pt") as b:
        assert a.metadata() == b.metadata() and set(a.keys()) == set(b.keys())
        assert all(torch.equal(a.get_tensor(name), b.get_tensor(name)) for name in set(a.keys()))


def test_what_the_file_holds(config: RunConfig, tmp_path: Path) -> None:
    output = tmp_path / "model.safetensors"
    export_weights(checkpoint(tmp_path / "run", config), output)
    with safe_open(output, framework="pt") as file:
        names = set(file.keys())
        metadata = file.metadata()
        table = file.get_tensor(TABLE)
    assert table.shape == (VOCAB.size, config.model.hidden_size)
    assert metadata["step"] == "7" and json.loads(metadata["fingerprints"]) == FINGERPRINTS
    assert RunConfig.from_json(metadata["config"]) == config
    # The names of the model's own parameters, but for the norms that checkpoints name otherwise.
    renamed = {"self_attn_bda.norm": "post_attn_layernorm", "mlp_bda.norm": "post_mlp_layernorm"}
    wanted = set()
    for name in random_weights(config.model, 0):
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        wanted.add(name)
    assert names == wanted


def test_nothing_is_overwritten(config: RunConfig, tmp_path: Path) -> None:
    source, output = checkpoint(tmp_path / "run", config), tmp_path / "model.safetensors"
    export_weights(source, output)
    before = output.read_bytes()
    with pytest.raises(CheckpointError, match="already exists"):
        export_weights(source, output)
    with pytest.raises(CheckpointError, match="already exists"):
        import_weights(output, tmp_path / "run")
    assert output.read_bytes() == before
    commit.verify(source)


def test_a_damaged_checkpoint_is_not_exported(config: RunConfig, tmp_path: Path) -> None:
    source, output = checkpoint(tmp_path / "run", config), tmp_path / "model.safetensors"
    file = source / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256"):
        export_weights(source, output)
    assert not output.exists()


def _without(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    del tensors["decoder.layers.1.mlp.linear_fc1.bias"]


def _more(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors["decoder.layers.2.mlp.linear_fc1.bias"] = torch.zeros(1)


def _padded(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors[TABLE] = torch.zeros(VOCAB.padded_size, 32)


def _foreign(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["format"] = "pt"


def _no_config(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["config"] = "{}"


def _no_step(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["step"] = "-1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, r"linear_fc1\.bias has shape none: it is missing"),
        (_more, "no such tensor"),
        (_padded, r"has shape \[1024, 32\]"),
        (_foreign, "format is 'pt'"),
        (_no_config, "configuration cannot be used"),
        (_no_step, "metadata is damaged"),
    ],
)
def test_other_files_are_refused(
    change: Any, message: str, config: RunConfig, tmp_path: Path
) -> None:
    output = tmp_path / "model.safetensors"
    export_weights(checkpoint(tmp_path / "run", config), output)
    with safe_open(output, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, tmp_path / "changed.safetensors", metadata)
    with pytest.raises(CheckpointError, match=message):
        import_weights(tmp_path / "changed.safetensors", tmp_path / "imported")
    assert not (tmp_path / "imported").exists()
    output.write_bytes(output.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        import_weights(output, tmp_path / "imported")


def test_the_tool(config: RunConfig, tmp_path: Path) -> None:
    source, output = checkpoint(tmp_path / "run", config), tmp_path / "model.safetensors"
    tool = [sys.executable, "tools/convert_checkpoint.py"]
    for arguments, code in (
        (["export", "--checkpoint", source, "--output", output], 0),
        (["export", "--checkpoint", source, "--output", output], 1),
        (["import", "--weights", output, "--output", tmp_path / "imported"], 0),
    ):
        done = subprocess.run(
            [*tool, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == code, done.stderr
        assert not code or (done.stderr.startswith("error: ") and done.stderr.count("\n") == 1)
    commit.verify(tmp_path / "imported" / "step_00000007")
