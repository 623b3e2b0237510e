"""``clipfast inspect``: compile every kernel for GPUs that need not be there, and report what the compiler made of it.

``shipped`` lists the calls and keeps their committed resources, ``offline`` records launches and compiles them,
``sass`` reads the machine code, and ``report`` prints the findings. ``model`` says how long a launch
takes on an H100, and ``forecast`` how long an op or a training step does. ``command`` is the command line.
"""
