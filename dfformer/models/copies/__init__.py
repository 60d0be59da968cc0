"""Copies of the dynamic filter in other people's code: traced as graphs, compared with ours, and given our step."""
