"""A model's weights as one safetensors file, and such a file as a checkpoint.

Needs neither process groups nor a model: weights go from file to file.  Layers, which checkpoints
keep stacked, have a tensor each in the file, as in the model's own state dict; the padding of the
vocabulary is left out, and is zeros on the way back.
"""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_cogview.checkpoint import commit
from megatron_cogview.checkpoint.boxes import Box
from megatron_cogview.checkpoint.index import FILE as INDEX
from megatron_cogview.checkpoint.index import MASTER, OPTIMIZER, write_index
from megatron_cogview.checkpoint.reader import CheckpointReader
from megatron_cogview.checkpoint.scalars import write_common
from megatron_cogview.checkpoint.snapshot import Piece, Snapshot
from megatron_cogview.configs.errors import CheckpointError, ConfigError
from megatron_cogview.configs.model import ModelConfig
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.storage.atomic import fsync_directory

FORMAT = "megatron_cogview.weights.1"
LAYERS = "decoder.layers."
TABLE = "embedding.word_embeddings.weight"
WEIGHTS_ONLY = "weights_only"
"""Field of a manifest's state: there is nothing to go on training with."""


def stored_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Key and shape of every weight in a checkpoint."""
    h, layers = model.hidden_size, model.num_layers
    norms = ["input_layernorm", "pre_mlp_layernorm"]
    if model.norm.placement == "sandwich":
        norms += ["post_attn_layernorm", "post_mlp_layernorm"]
    shapes: dict[str, tuple[int, ...]] = {
        TABLE: (model.vocab.padded_size, h),
        "embedding.position_embeddings.weight": (model.max_positions, h),
        "decoder.final_layernorm.weight": (h,),
        "decoder.final_layernorm.bias": (h,),
    }
    matrices = {
        "self_attention.linear_qkv": (3 * h, h),
        "self_attention.linear_proj": (h, h),
        "mlp.linear_fc1": (4 * h, h),
        "mlp.linear_fc2": (h, 4 * h),
    }
    for name in norms:
        shapes[f"{LAYERS}{name}.weight"] = shapes[f"{LAYERS}{name}.bias"] = (layers, h)
    for name, (rows, columns) in matrices.items():
        shapes[f"{LAYERS}{name}.weight"] = (layers, rows, columns)
        shapes[f"{LAYERS}{name}.bias"] = (layers, rows)
    return shapes


def export_weights(checkpoint: Path, output: Path) -> dict[str, str]:
    """Write the weights of a checkpoint into one file; fp32 copies where there are any.

    Args:
        checkpoint: one ``step_*`` folder.
        output: safetensors file to make.

    Returns:
        The file's metadata: configuration, fingerprints of the tokenizers, step.

    Raises:
        CheckpointError: the checkpoint is damaged or of another make, or the file is there already.
    """
    if os.path.lexists(output):
        raise CheckpointError(f"{output}: already exists; name another file or remove it")
    manifest = commit.verify(checkpoint)
    config = _config(checkpoint, manifest["state"].get("run"))
    fingerprints = manifest["state"].get("fingerprints")
    if not isinstance(fingerprints, dict):
        raise CheckpointError(f"{checkpoint}: does not say which tokenizers it was made with")
    reader, tensors = CheckpointReader(checkpoint), {}
    for key, shape in stored_shapes(config.model).items():
        master = f"{OPTIMIZER}.{MASTER}.{key}"
        source = master if master in reader.index else key
        if source not in reader.index or reader.index[source].shape != shape:
            raise CheckpointError(f"{checkpoint}: {key} is not there, or not of shape {shape}")
        whole = reader.whole(source)
        if key.startswith(LAYERS):
            tensors.update(
                {_of_layer(key, number): part for number, part in enumerate(whole.unbind())}
            )
        else:
            tensors[key] = whole[: config.model.vocab.size].clone() if key == TABLE else whole
    metadata = {
        "format": FORMAT,
        "step": str(manifest["step"]),
        "config": config.to_json(),
        "fingerprints": json.dumps(fingerprints),
        "vocabulary": f"{config.model.vocab.size} of {config.model.vocab.padded_size} rows",
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    _save(tensors, output, metadata)
    return metadata


def import_weights(source: Path, root: Path) -> Path:
    """Make a checkpoint of a file of :func:`export_weights`: weights alone, to generate with.

    Args:
        source: the safetensors file.
        root: folder of checkpoints to make.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: the file is of another make or incomplete, or the folder is in use.
    """
    if os.path.lexists(root) and (not root.is_dir() or any(root.iterdir())):
        raise CheckpointError(f"{root}: already exists and is not empty; name another folder")
    try:
        with safe_open(source, framework="pt") as file:
            about, config, step = _about(source, file.metadata() or {})
            shapes = stored_shapes(config.model)
            _check_tensors(source, file, config.model, shapes)
            pieces = _pieces(file, shapes)
            folder = commit.prepare(root, step)
            snapshot = Snapshot(with_cuda=False)
            snapshot.take(list(pieces))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{source}: not a readable safetensors file ({error})") from error
    written = snapshot.write(folder, 0)
    write_index(folder / INDEX, written.entries, {})
    write_common(folder, {})
    return commit.commit(folder, step, about, written.files)


def _save(tensors: dict[str, torch.Tensor], output: Path, metadata: dict[str, str]) -> None:
    """All of the file or nothing; the library writes to a name only."""
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(8)}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.rename(temporary, output)
    except SafetensorError as error:
        raise OSError(f"{output}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(output.parent)


def _of_layer(key: str, number: int) -> str:
    return f"{LAYERS}{number}.{key.removeprefix(LAYERS)}"


def _config(where: Path, value: Any) -> RunConfig:
    try:
        return RunConfig.from_json(value if isinstance(value, str) else json.dumps(value))
    except (ConfigError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{where}: its configuration cannot be used: {error}") from error


def _about(source: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], RunConfig, int]:
    """State of the manifest, configuration and step."""
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{source}: its format is {metadata.get('format')!r}, not {FORMAT!r}; only files that "
            "were exported by this package can be imported"
        )
    config = _config(source, metadata.get("config", ""))
    try:
        step, fingerprints = int(metadata["step"]), json.loads(metadata["fingerprints"])
        if not 0 <= step < commit.MOST_STEPS or not isinstance(fingerprints, dict):
            raise ValueError("a step or fingerprints that are none")
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: its metadata is damaged ({error})") from error
    about = {"run": config.to_dict(), "fingerprints": fingerprints, WEIGHTS_ONLY: True}
    return about, config, step


def _check_tensors(
    source: Path, file: Any, model: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a file that lacks a tensor, or has another or one of another shape."""
    wanted: dict[str, list[int]] = {}
    for key, shape in shapes.items():
        if key.startswith(LAYERS):
            wanted |= {_of_layer(key, number): list(shape[1:]) for number in range(shape[0])}
        else:
            wanted[key] = [model.vocab.size, shape[1]] if key == TABLE else list(shape)
    found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for name in sorted(set(wanted) | set(found)):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"{source}: {name} has shape {found.get(name, 'none: it is missing')}; the "
                f"configuration in the file asks for {wanted.get(name, 'no such tensor')}"
            )


def _pieces(file: Any, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Piece]:
    """The file's tensors under a checkpoint's keys, a layer at a time."""
    for key, shape in shapes.items():
        if key.startswith(LAYERS):
            for number in range(shape[0]):
                box = Box((number, *(0 for _ in shape[1:])), (1, *shape[1:]))
                yield Piece(key, shape, box, file.get_tensor(_of_layer(key, number))[None], True)
            continue
        data = file.get_tensor(key)
        if key == TABLE:
            data = torch.cat([data, data.new_zeros(shape[0] - len(data), shape[1])])
        yield Piece(key, shape, Box((0,) * len(shape), shape), data, True)
