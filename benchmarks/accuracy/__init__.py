"""The parts of bench_accuracy: images that come with packages, models of equal depth and width, their common recipe,
and the pictures. Imports dfformer, timm and the benchmarks' common."""
