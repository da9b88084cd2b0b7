"""All that only a GPU can tell, in one command that needs no network: ``python -m benchmarks.gpu --help``.

Each measurement is a process of its own with a limit of its own, and writes what it finds at once, as lines of JSON: what is
there stays there, whatever happens to the next. Models are made on the spot, with random weights.
"""
