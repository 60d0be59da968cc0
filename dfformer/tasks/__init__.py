"""The tasks: classification, segmentation, detection and restoration, with their evaluation and prediction.

Imports data, models, utils and analysis.dense_figures; from train only types, which cost nothing when it runs.
"""
