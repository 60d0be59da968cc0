"""The one-kernel step on NVIDIA GPUs: its layout on a chip, compilation with NVRTC, and launches.

Imports problem, device, disk_cache and backend.filter_kernels.
"""
