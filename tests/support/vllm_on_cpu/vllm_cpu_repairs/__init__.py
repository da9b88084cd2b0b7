"""What vLLM refuses or gets wrong on a CPU, for tests of more than one worker; each part has its own switch.

``tests.support.runners`` gives the environments. Apart from the repairs of Triton's interpreter, because this directory is for
Model Runner V1 as well, and there vLLM has to find no Triton on a CPU.
"""
