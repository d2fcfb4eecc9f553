"""Numerical operations, each beside a plain reference.  Knows tensors and shapes, not models."""
