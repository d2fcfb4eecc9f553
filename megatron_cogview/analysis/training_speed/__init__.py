"""Speed of a training step: where its time goes, and against plain PyTorch and megatron-core."""
