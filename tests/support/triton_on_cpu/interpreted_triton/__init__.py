"""Triton on a machine without a GPU: its interpreter, repaired where it is wrong or slow.

vLLM's Model Runner V2 needs Triton, and Triton as published has no backend for CPUs, so on a CPU vLLM takes V1. With the
directory above this one on PYTHONPATH, and TRITON_INTERPRET=1, there is a backend: ``compiler`` and ``driver`` are what Triton
looks for. They compile nothing; kernels run in Triton's interpreter. ``tests.support.runners`` sets that up. Keep the directory
off the path of other processes: vLLM takes its presence for a Triton that compiles.

What a kernel does here and on a GPU is the same, except:

- programs of a grid run one after the other, so no race shows; num_warps, num_stages and allowed TF32 mean nothing;
- float8 becomes float32 correctly, apart from infinities and NaN; float32 becomes float8 wrongly (1.9 becomes 1);
- the variable of Python's own ``range`` is an int without ``.to()``, that of ``tl.range`` is a tensor as in a compiled kernel;
- tl.max, tl.argmax and the like pass over NaN, fail where there is nothing else, and always take the first of equal elements;
- tl.reduce and tl.associative_scan with a function of the kernel's own go element by element, 0.05 ms each;
- tl.atomic_xchg on floats, atomics on bfloat16, inline assembly and libdevice are refused.
"""
