"""The layouts that can be written, by the names that the command line gives them."""

OPEN_CLIP, HUGGING_FACE, CLIPFAST = "open_clip", "hf", "clipfast"
TARGETS = (OPEN_CLIP, HUGGING_FACE, CLIPFAST)
