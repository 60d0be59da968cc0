"""What happens inside a model: metrics, figures, and ``dfformer show``.

Imports models and utils.
"""
