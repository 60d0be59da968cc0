"""The backends that run the filter step, one file or folder for each; only `dfformer_kernels.dispatch` chooses one.

Each imports problem, reference, device, disk_cache, warn_once and, of this folder, filter_kernels and torch_fft.
"""
