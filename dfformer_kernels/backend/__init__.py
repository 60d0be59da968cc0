"""The backends that run the filter step, one file or folder for each; only `dfformer_kernels.dispatch` chooses one.

They import what they share, problem, reference and disk_cache, but neither dispatch, autotune nor ops.
"""
