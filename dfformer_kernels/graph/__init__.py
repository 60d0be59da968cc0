"""Puts the operators into other people's programs: reads a graph, finds the filter step, checks it and rewrites it.

It may import the operators and what they share, but neither dispatch nor backends, and nothing from dfformer.
"""
