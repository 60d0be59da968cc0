"""Optimises models for serving: folds, packs and fuses modules.

Imports models and utils.
"""
