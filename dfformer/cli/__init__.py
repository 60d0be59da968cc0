"""The command line: one module a command that has no folder of its own.

May import everything.
"""
