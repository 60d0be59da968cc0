"""What happens inside a model: metrics, figures, and ``dfformer show``.

Imports tasks, data, models and utils. The tasks draw with dense_figures, which imports figures and, through it, models.
"""
