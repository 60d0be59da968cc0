"""The command line: the table of commands, and a module for each command that has no folder of its own.

May import everything.
"""
