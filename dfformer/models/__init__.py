"""Layers, models, their registration with timm, checkpoints, and the drop-in for copies of the layer.

Imports dfformer_kernels and utils, but nothing else of dfformer.
"""
