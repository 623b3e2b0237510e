"""What models of other libraries run on after ``apply_to_...``, and how far their results then are from their own.

``shrunk`` builds small models of each kind, and compares a patched one with the original. ``table`` writes
``docs/adopt-table.md``: ``python -m clipfast.bench.adoption``.
"""
