"""What happens inside a model: metrics, figures, and ``dfformer show``.

Imports tasks, data, models and utils; the tasks draw with dense_figures, which imports utils only.
"""
