"""What models are trained for: classification, segmentation, detection, restoration; their evaluation and prediction.

Imports data, models, inference, analysis.figures and utils.
"""
