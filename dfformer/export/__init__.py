"""Exports models as files for other runtimes, with transforms as matrix products.

Imports models, inference, utils and dfformer_kernels.
"""
