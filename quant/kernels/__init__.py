"""Decoding packed weights and multiplying by them: Numba's kernels for the CPU, Triton's for NVIDIA GPUs."""
