"""Models of other libraries, small, patched and compared."""

from clipfast.bench.adoption import shrunk

__all__ = ["shrunk"]
