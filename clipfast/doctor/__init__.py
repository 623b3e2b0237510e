"""``clipfast doctor``: report a machine's hardware and software, and the problems that clipfast would have there."""
