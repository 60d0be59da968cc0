"""The step of any plane on a GPU: cuFFT's transforms with Triton kernels between them.

Imports problem, reference, device, warn_once, backend.filter_kernels and torch_fft; Triton only when it is used.
"""
