"""``clipfast doctor`` reports the hardware and software of a machine, and the problems that clipfast would have
there.
"""
