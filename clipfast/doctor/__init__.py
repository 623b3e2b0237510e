"""``clipfast doctor`` prints what a machine offers to clipfast, and what is wrong with it.

Each module but ``command`` and ``findings`` looks at one part of the machine. What a look needs is imported when it is
taken, so that a missing package is a finding, not an error.
"""
