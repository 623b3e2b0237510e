"""The models of other libraries after ``apply_to_...``: what they run on, and how far they are from the originals.

``shrunk`` builds small models of OpenCLIP and timm, and ``hf_models`` of transformers; both compare a patched model
with the original. ``table`` writes ``docs/tables/adopt.md``: ``python -m clipfast.bench.adoption``.
"""
