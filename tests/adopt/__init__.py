"""Tests of adopted models: those of OpenCLIP, timm and transformers, which ``clipfast.apply_to_...`` patches."""

from clipfast.bench.adoption import hf_models, shrunk

__all__ = ["hf_models", "shrunk"]
