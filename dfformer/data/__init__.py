"""Images, masks and boxes from files, and synthetic ones: what tasks read.

Imports utils; never models.
"""
