"""Tests of the kernels; without a GPU Triton interprets them."""
