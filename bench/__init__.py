"""Benchmarks of the kernels: their measured throughput and, without a GPU, the resources of the compiled kernels."""
