"""Triton kernels for GPUs, each held to PyTorch's operations by a test. They import no other part.

Where Triton or a GPU is missing, the callers take PyTorch's own operations.
"""
