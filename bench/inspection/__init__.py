"""``clipfast inspect``: compile every kernel for GPUs that this machine may lack, and report the resources it takes.

``shipped`` lists the calls and keeps their committed resources, ``offline`` records launches and compiles them,
``sass`` reads the machine code, and ``report`` prints the findings. ``model`` predicts the time of a launch on an H100,
and ``forecast`` the time of an op or a training step. ``command`` is the command line.
"""
