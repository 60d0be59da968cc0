"""Devices, extras, profiling, atomic files and the eager baseline: helpers that belong to no other folder.

Imports dfformer_kernels only.
"""
