"""The ways to run the filter step: one file or folder a backend, chosen by `dfformer_kernels.dispatch` alone.

Backends import problem, reference and disk_cache; nothing else of this package.
"""
