"""Evaluation of models: zero-shot classification, retrieval, linear probes, robustness, bias, and other benchmarks."""
