"""The step of any plane on a GPU: cuFFT's transforms with Triton kernels between them.

Imports problem, reference and backend.filter_kernels; Triton only when it is used.
"""
