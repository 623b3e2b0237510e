"""``clipfast doctor`` prints what a machine offers to clipfast, and what is wrong with it."""
