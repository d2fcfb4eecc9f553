"""What a device can do at most: the denominator of model FLOPs utilisation."""

from typing import Literal

_MAKERS = ("NVIDIA ", "Tesla ")

# TFLOP/s of dense matrix products in 16 bits with 32-bit sums, by the makers' data sheets; the
# larger figures printed there are for sparse matrices.  Keys are the whole names that drivers give:
# a part of a GPU (MIG), or a variant with another number of units, has a name that is not here.
_DENSE_TFLOPS: dict[str, float] = {
    "A10": 125,
    "A30": 165,
    "A100-PCIE-40GB": 312,
    "A100 80GB PCIe": 312,
    "A100-SXM4-40GB": 312,
    "A100-SXM4-80GB": 312,
    "A800-SXM4-80GB": 312,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100 80GB HBM3": 989,
    "H800": 989,
    "H200": 989,
    "GH200 120GB": 989,
    "GH200 480GB": 989,
    "B200": 2250,
}
_WITHOUT_BF16: dict[str, float] = {
    "V100-PCIE-16GB": 112,
    "V100-PCIE-32GB": 112,
    "V100-SXM2-16GB": 125,
    "V100-SXM2-32GB": 125,
    "V100-SXM3-32GB": 125,
}


def peak_flops(device: str, dtype: Literal["bf16", "fp16"]) -> float | None:
    """Specified dense operations a second of a device, by the name its driver gives.

    None for a device that is not known, or does not have the format: a guess would make every
    figure derived from it worthless.
    """
    name = device
    for maker in _MAKERS:
        name = name.removeprefix(maker)
    found = _DENSE_TFLOPS.get(name)
    if found is None and dtype == "fp16":
        found = _WITHOUT_BF16.get(name)
    return None if found is None else found * 1e12
