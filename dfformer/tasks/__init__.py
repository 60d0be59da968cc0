"""The tasks: classification, segmentation, detection and restoration, with their evaluation and prediction.

Imports data, models, analysis.dense_figures and utils.
"""
