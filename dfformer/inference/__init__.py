"""Models made ready to serve: folded, packed and fused modules.

Imports models and utils.
"""
