"""A CUDA driver that runs nothing: Triton's own launcher, and everything around it, on a machine without a GPU.

``gpu.c``, ``cubin.c`` and ``driver.c`` are the driver, which ``build`` compiles with gcc at first use. It checks every
launch and every tensor map by the rules of the real one. ``driver`` loads it into this process. ``arguments`` compares
the arguments that the driver received with those of the kernels' calls. ``walk`` calls all ops, ``capture`` finds calls
that a CUDA graph cannot capture, and ``counts`` counts the kernels that a call would start. With ``gpu``, PyTorch
itself uses the stub as its GPU. ``python -m bench.stub`` is the command line.
"""
