"""The parts of bench_op and bench_model: problems, the providers that compute them, and the rows of results. Imports
dfformer, dfformer_kernels, timm and the benchmarks' common."""
