"""The folder of a run, as training writes it and as status and evaluation read it."""
