"""The training engine, its configuration, log and resumable state.

Imports tasks, data, models, utils and analysis.figures.
"""
