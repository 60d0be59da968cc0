"""The operators: public functions, custom ops, fakes and autograd, each defined once for all backends.

Imports problem, dispatch and reference; never a backend.
"""
