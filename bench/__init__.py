"""Throughput and resources of the kernels, measured or, where there is no GPU, read off what the compiler made."""
