"""How much of a tensor interpreted kernels read."""

from unittest import mock

from triton.runtime import interpreter


class Reads:
    """Counts how many numbers of a tensor the kernels load while it is open."""

    def __init__(self, tensor):
        self.begin, self.end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        self.count = 0

    def __enter__(self):
        load = interpreter.InterpreterBuilder.create_masked_load

        def counted(builder, pointers, mask, *rest):
            inside = (pointers.data >= self.begin) & (pointers.data < self.end) & mask.data
            self.count += int(inside.sum())
            return load(builder, pointers, mask, *rest)

        self.patch = mock.patch.object(interpreter.InterpreterBuilder, "create_masked_load", counted)
        self.patch.__enter__()
        return self

    def __exit__(self, *error):
        self.patch.__exit__(*error)
