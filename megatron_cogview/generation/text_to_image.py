"""Pictures from captions (P-SEQ-1 read from left to right).

Shapes: N pictures, B of one batch, H x W codes of a picture.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megatron_cogview.configs.run import RunConfig
from megatron_cogview.generation.decoder import decode
from megatron_cogview.generation.sampling import draw, uniforms
from megatron_cogview.parallel.topology import Topology
from megatron_cogview.tokenization.layout import SequenceLayout


def generate_codes(
    model: torch.nn.Module,
    config: RunConfig,
    topology: Topology,
    texts: Sequence[Sequence[int]],
) -> Tensor:
    """Image codes for tokenised captions.

    Captions of equal length share a batch, so nothing is padded and a picture's codes depend on
    its caption, its number and the seed only: exactly so in fp32 with per-token PB-relax.  In half
    precision other batch sizes round differently, and ``tensor_max_over_8`` mixes batch mates.

    Args:
        model: whole transformer, or a tensor-parallel part of it, in evaluation mode, without
            pipeline or sequence parallelism.
        config: the run; its template must end in a picture.
        topology: process groups; every rank returns the same codes.
        texts: tokenizer-local text ids of each caption.

    Returns:
        int64 ``[N, H, W]`` on the CPU.

    """
    layout = SequenceLayout(config.sequence, config.model.vocab)
    side = config.sequence.codes_per_side[-1]
    codes_NT = torch.empty((len(texts), side * side), dtype=torch.int64)
    with tqdm(
        total=len(texts), desc="generate", unit="picture", disable=not topology.is_main
    ) as bar:
        for numbers in equal_length_batches(texts, config.generation.batch_size):
            chosen = [texts[i] for i in numbers]
            codes_NT[numbers] = _batch(model, layout, config, topology, numbers, chosen).cpu()
            bar.update(len(numbers))
    return codes_NT.view(-1, side, side)


def equal_length_batches(texts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Numbers of texts that have the same length, at most ``size`` together."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        by_length[len(text)].append(number)
    for length in sorted(by_length):
        numbers = by_length[length]
        for at in range(0, len(numbers), size):
            yield numbers[at : at + size]


def _batch(
    model: torch.nn.Module,
    layout: SequenceLayout,
    config: RunConfig,
    topology: Topology,
    numbers: list[int],
    texts: Sequence[Sequence[int]],
) -> Tensor:
    prompts, counts = zip(*(layout.prompt(text) for text in texts), strict=True)
    prompt_BP = np.stack(prompts)
    samples_B = np.asarray(numbers, dtype=np.int64)
    text_region_B = np.full_like(samples_B, prompt_BP.shape[1])
    device = topology.device
    settings = config.generation
    num_codes = config.model.vocab.num_image_codes

    def choose(logits_BV: Tensor, step: int) -> Tensor:
        # Image codes are the first ids of the vocabulary; nothing else may follow [BOI*].
        u_B = torch.from_numpy(uniforms(settings.seed, samples_B, step)).to(device)
        return draw(logits_BV[:, :num_codes], u_B, settings.temperature, settings.top_k)

    return decode(
        model,
        torch.from_numpy(prompt_BP).to(device),
        torch.from_numpy(np.asarray(layout.positions(prompt_BP))).to(device),
        torch.from_numpy(np.stack([samples_B, text_region_B], 1)).to(device),
        counts[0],
        choose,
    )
