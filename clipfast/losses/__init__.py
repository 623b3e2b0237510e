"""The losses as modules under OpenCLIP's names, and exact gradients of large batches by micro-batches."""
