"""Checkpoints: how weights are read, written, found by name, converted and described.

``checkpoint`` reads and writes files of weights, ``sharded`` and ``torch_dcp`` folders with a file for each process,
and ``of_run`` keeps the checkpoints of a run, which ``background`` writes beside training from copies in host memory.
``pretrained`` lists the published tags, ``hub`` downloads files, and ``sources`` finds the weights for a name of a
model. ``layouts`` recognises the layout of a file or folder, ``open_clip_layout`` and ``hugging_face`` read those of
other packages, ``resolve`` determines settings that a checkpoint does not tell, and ``convert`` writes another layout.
"""

TARGETS = ("open_clip", "hf", "clipfast")  # the layouts of checkpoints that ``convert_checkpoint`` can write
