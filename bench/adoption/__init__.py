"""Models of other libraries after ``apply_to_...``: the kernels that they run on, and their differences from the
originals.

``shrunk`` builds small models of OpenCLIP and timm, and ``hf_models`` of transformers; both compare a patched model
with the original. ``table`` writes ``docs/tables/adopt.md``: ``python -m clipfast.bench.adoption``.
"""
