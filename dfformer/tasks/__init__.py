"""The tasks: classification, segmentation, detection and restoration, with their evaluation and prediction.

Imports data, models, inference, analysis.figures and utils.
"""
