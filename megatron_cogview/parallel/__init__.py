"""Process groups: a thin layer over ``megatron.core.parallel_state``, and its CPU backend."""
