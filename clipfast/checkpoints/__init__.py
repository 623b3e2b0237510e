"""Checkpoints: how weights are read, written, found by name, converted and described.

``checkpoint`` reads and writes files of weights, ``sharded`` and ``torch_dcp`` folders with a file for each process,
and ``of_run`` keeps the checkpoints of a run, which ``background`` writes beside training from copies in host memory.
``pretrained`` knows the published tags, ``hub`` fetches, and ``sources`` says what a name of a model stands for.
``layouts`` recognises what a file or folder is, ``open_clip_layout`` and ``hugging_face`` know the layouts of others,
``resolve`` completes what a checkpoint leaves open, and ``convert`` writes it anew.
"""

TARGETS = ("open_clip", "hf", "clipfast")  # the layouts that can be written
