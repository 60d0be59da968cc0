"""Models as files for other runtimes, and transforms as matrix products.

Imports models, inference and utils.
"""
