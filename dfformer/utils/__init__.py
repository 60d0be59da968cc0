"""Devices, extras, profiling, atomic files and the authors' formulation: helpers that belong to no other folder.

Imports dfformer_kernels; only profile and eager_baseline import models too.
"""
