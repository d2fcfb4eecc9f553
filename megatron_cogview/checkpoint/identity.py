"""Whether a checkpoint belongs to this model and these tokenizers."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cogview.configs.errors import CheckpointError
from megatron_cogview.configs.run import RunConfig

FREE = (
    "model.attention.backend",
    "model.attention_dropout",
    "model.hidden_dropout",
    "model.init_std",
    "model.norm.backend",
    "model.norm.relax_scope",
    "sequence.text_policy",
)
"""Fields that may differ: they change neither the shape of the weights nor what they mean.
PB-relax changes a LayerNorm's epsilon and nothing else."""


def check_belongs(
    directory: Path,
    state: Mapping[str, Any],
    config: RunConfig,
    fingerprints: Mapping[str, str],
    continued: Sequence[str] = (),
) -> None:
    """Refuse a checkpoint of another model, another sequence or other tokenizers.

    Args:
        directory: the checkpoint, for the message.
        state: what its manifest keeps: ``run`` and ``fingerprints``.
        config: the run that wants to load it.
        fingerprints: SHA-256 of the tokenizers in use, by ``text`` and ``image``, and of
            the shards by ``data``.
        continued: further fields that must not differ, as ``data.seed``.

    Raises:
        CheckpointError: naming the first difference with both values.
    """
    theirs_all, prints = state.get("run"), state.get("fingerprints")
    if not isinstance(theirs_all, dict) or not isinstance(prints, dict):
        raise CheckpointError(f"{directory}: its manifest names no run and no tokenizers")
    ours = config.to_dict()
    parts = dict.fromkeys(["model", "sequence", *(path.split(".")[0] for path in continued)])
    for part in parts:
        for path, mine, theirs in differences(part, ours[part], theirs_all.get(part)):
            matters = path not in FREE if part in ("model", "sequence") else path in continued
            if matters:
                raise CheckpointError(
                    f"{directory}: {path} is {theirs!r} in the checkpoint and {mine!r} here; "
                    f"pass --{path.replace('_', '-')} {theirs}, or name another folder"
                )
    for kind, mine in fingerprints.items():
        theirs = prints.get(kind)
        if theirs != mine and kind == "data":
            raise CheckpointError(
                f"{directory}: was trained on other shards (fingerprint {theirs}, here {mine}), so "
                "the order of the samples would change; pass --data.accept-changes if data was "
                "added on purpose, or name another folder"
            )
        if theirs != mine:
            raise CheckpointError(
                f"{directory}: the model was trained with the {kind} tokenizer {theirs}, and "
                f"this is {mine}; use the tokenizer its data was made with"
            )


def differences(path: str, mine: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """Leaves in which two JSON values differ."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in sorted(set(mine) | set(theirs)):
            yield from differences(f"{path}.{key}" if path else key, mine.get(key), theirs.get(key))
    elif mine != theirs:
        yield path, mine, theirs
