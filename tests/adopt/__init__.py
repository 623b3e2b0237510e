"""Models of other libraries, small, patched and compared."""

from clipfast.bench.adoption import hf_models, shrunk

__all__ = ["hf_models", "shrunk"]
