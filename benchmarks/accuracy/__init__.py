"""The parts of bench_accuracy: images that come inside packages, models of equal depth and width, one recipe for all,
and what is drawn of it. Imports dfformer, timm and the benchmarks' common."""
