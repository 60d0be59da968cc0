"""The tasks' data: images, masks and boxes, from files or synthetic.

Imports utils, but never models.
"""
