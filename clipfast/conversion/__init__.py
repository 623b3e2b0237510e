"""Checkpoints from one layout into another, and what a checkpoint is."""
