"""Checkpoints: sharded tensors of any layout, in directories that are either whole or absent."""
