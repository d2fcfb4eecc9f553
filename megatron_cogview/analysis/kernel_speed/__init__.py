"""Speed and memory of the kernels against their peers, on one device."""
