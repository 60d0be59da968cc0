"""Copies of the dynamic filter in other people's code: traced as graphs, compared with ours, and given our step.

Imports models.filter_resize and dfformer_kernels; only models.drop_in imports it.
"""
