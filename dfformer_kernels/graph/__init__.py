"""Puts the operators into other people's programs: reads a graph, finds the filter step, checks it and rewrites it.

Imports ops, reference and tolerance, but neither dispatch nor a backend. dfformer imports toolkit only.
"""
