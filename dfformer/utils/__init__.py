"""Devices, profiling, atomic files and the eager baseline: helpers without a subject of their own.

Imports dfformer_kernels only.
"""
