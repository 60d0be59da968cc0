"""Optimises models for serving: folds, packs and fuses modules.

Imports models, utils and dfformer_kernels.
"""
