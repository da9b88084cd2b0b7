"""Repairs of ``triton.runtime.interpreter``: what it gets wrong, and what makes it slower than it has to be."""

import builtins
import dataclasses

import numpy as np

from interpreted_triton import bfloat16


def repair(interpreter):
    """Change what needs it in the interpreter's module; called once, when that has been imported."""
    repair_comparisons(interpreter)
    bfloat16.repair(interpreter)
    repair_float_arguments(interpreter)
    patch_language_once(interpreter)
    leave_arguments_where_they_are(interpreter)
    skip_unused_work(interpreter)


def repair_comparisons(interpreter):
    """Symptom: a mask is refused by tl.load or tl.store because its array is one of numbers.

    A comparison's array is of bools, but its handle is given the type of what was compared. Whatever goes by that type
    afterwards, such as making a block out of a scalar comparison, turns the bools into numbers. A handle gets the type
    that its array has.
    """
    builder, binary_op = interpreter.InterpreterBuilder, interpreter.InterpreterBuilder.binary_op

    def typed_binary_op(self, lhs, rhs, op):
        result = binary_op(self, lhs, rhs, op)
        if result.data.dtype == np.bool_:
            result.dtype = interpreter.tl.int1
        return result

    builder.binary_op = typed_binary_op


def repair_float_arguments(interpreter):
    """Symptom: a bfloat16 or float16 tensor times a kernel's argument is rounded to 16 bits; on a GPU it is float32.

    A compiled kernel gets a Python float as a float32 scalar, which widens what it is combined with. The interpreter hands
    it on as it is, and numbers written in a kernel widen nothing.
    """
    convert = interpreter._implicit_cvt

    def convert_floats_too(argument):
        if isinstance(argument, float):
            return interpreter.interpreter_semantic.scalar_constant(argument, interpreter.tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = convert_floats_too


def tensors_in_range(interpreter):
    """Symptom: ``'int' object has no attribute 'to'`` in ``for i in tl.range(n): i.to(tl.int64)``.

    The loop variable of a compiled kernel is a scalar tensor, as wide as the bounds; the interpreter's is Python's own.
    """
    semantic, tensor, int64 = interpreter.interpreter_semantic, interpreter.tl.tensor, interpreter.tl.int64

    def loop(arg1, arg2=None, step=None, **hints):
        start, end = (0, arg1) if arg2 is None else (arg1, arg2)
        step = 1 if step is None else step
        wide = any(isinstance(bound, tensor) and bound.dtype == int64 for bound in (start, end, step))
        for i in builtins.range(start, end, step):
            yield semantic.scalar_constant(i, int64) if wide else semantic.to_tensor(i)

    return loop


def patch_language_once(interpreter):
    """Symptom: every launch takes milliseconds before its kernel starts.

    Around each launch the interpreter replaces all of triton.language by its own versions and puts the old ones back, in
    calls of one kernel from another as well. Nothing here is ever compiled, so they can stay.
    """
    patch_language = interpreter._patch_lang
    language = interpreter.tl

    class EveryModule:
        """A kernel, as far as the interpreter looks for modules to patch."""

        __globals__ = {"tl": language, "core": language.core}  # noqa: RUF012

    class Kept:
        @staticmethod
        def restore():
            pass

    patched = False

    def patch_once(kernel):
        nonlocal patched
        if not patched:
            patched = True
            patch_language(EveryModule)
            # Here, because each patching puts Python's range there.
            language.range = language.core.range = tensors_in_range(interpreter)
        return Kept

    interpreter._patch_lang = patch_once


def leave_arguments_where_they_are(interpreter):
    """Symptom: a launch takes longer the larger the KV cache is.

    The storages of all tensors are copied to the host before a launch and back after it. On a CPU they are there.
    """
    executor = interpreter.GridExecutor
    copy_in, copy_back = executor._init_args_hst, executor._restore_args_dev

    def on_host(value):
        if isinstance(value, tuple):
            return all(map(on_host, value))
        tensor = getattr(value, "base", value)  # of a descriptor, or of a tensor under another type
        return getattr(tensor, "is_cpu", True)

    def init_args(self, args, kwargs):
        return (args, kwargs) if on_host((*args, *kwargs.values())) else copy_in(self, args, kwargs)

    def restore_args(self, args, args_on_host, kwargs, kwargs_on_host):
        if args_on_host is not args:
            copy_back(self, args, args_on_host, kwargs, kwargs_on_host)

    executor._init_args_hst, executor._restore_args_dev = init_args, restore_args


def skip_unused_work(interpreter):
    """Symptom: half of a kernel's time goes into checks whose result nobody reads, and into building the same dict.

    Integer sums and products are computed a second time in int64 to assert that they didn't overflow, but the assertion
    itself is only made in Triton's debug mode. The NumPy type of a Triton type is looked up in a dict built each time.
    """
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)

    look_up, known = interpreter._get_np_dtype, {}

    def numpy_type(triton_type):
        scalar = triton_type.scalar
        if scalar.name not in known:
            known[scalar.name] = look_up(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = numpy_type
