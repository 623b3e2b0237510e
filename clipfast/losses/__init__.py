"""The losses as modules, under OpenCLIP's names, and gradients of large batches in small parts."""
