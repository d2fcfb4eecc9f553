"""Build every preset without memory for its weights, and send shapes through it."""

from dataclasses import replace
from typing import Any

import torch

from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.precision import PrecisionConfig
from megatron_cogview.configs.presets import PRESETS


def dry_run(arguments: dict[str, Any]) -> dict[str, Any]:
    """Parameters and logits' shape of each preset, on the meta device."""
    from megatron_cogview.model.cogview import build_model
    from megatron_cogview.parallel.topology import initialize

    initialize(ParallelConfig())
    results = {}
    for name, preset in PRESETS.items():
        config = replace(
            preset(), parallel=ParallelConfig(), precision=PrecisionConfig(dtype="fp32")
        )
        length = config.sequence.model_length
        with torch.device("meta"):
            model = build_model(config)[0].eval()
            tokens_BS = torch.zeros(2, length, dtype=torch.int64)
            key_B2 = torch.zeros(2, 2, dtype=torch.int64)
            logits = model(tokens_BS, tokens_BS, pivot_key_B2=key_B2)
        results[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "devices": sorted({p.device.type for p in model.parameters()}),
            "logits": list(logits.shape),
        }
    return results
