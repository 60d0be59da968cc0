"""Puts the operators into other people's graphs: reads a graph, finds the filter step in it, proves it, rewrites it.
May import the operators and what they share; neither dispatch nor backends, and nothing of dfformer."""
