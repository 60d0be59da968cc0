"""The training engine, its configuration, log and resumable state.

Imports tasks and everything below it.
"""
