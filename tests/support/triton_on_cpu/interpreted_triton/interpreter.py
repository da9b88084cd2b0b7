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
    call_builtins_at_once(interpreter)
    describe_shapes_once(interpreter)
    combine_equal_types_at_once(interpreter)


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


def call_builtins_at_once(interpreter):
    """Symptom: each operation of a kernel copies its named arguments.

    The interpreter leaves the caller's semantic out of the copy and hands in its own. Putting its own in their place does.
    """
    semantic = interpreter.interpreter_semantic

    def patch_attribute(owner, name, member, builder, scope):
        del builder

        def called(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return member(*args, **kwargs)

        scope.set_attr(owner, name, called)

    interpreter._patch_attr = patch_attribute


def describe_shapes_once(interpreter):
    """Symptom: much of a kernel's time goes into tuples of the same few shapes, and of their sizes as constants.

    Each result of an operation makes its shape anew, with the type of the tuple, and the name of its own type as a text.
    """
    core = interpreter.tl.core
    block_type, tensor = core.block_type, core.tensor
    described, scalar = {}, (core.tuple([]), core.constexpr(1))
    # By the identity of what tensors are given for a shape, which stays.
    kept = {}

    def make_block_type(self, element_ty, shape):
        known = kept.get(id(shape))
        if known is None:
            sizes = tuple(core._unwrap_shape(shape))
            if sizes not in described:
                make(self, element_ty, shape)
                constants = core.tuple([core.constexpr(size) for size in sizes])
                described[sizes] = kept[id(constants)] = self.shape, self.numel, constants
            known = described[sizes]
        self.element_ty, (self.shape, self.numel, self.constants) = element_ty, known

    def with_element_type(self, scalar_ty):
        other = block_type.__new__(block_type)
        other.element_ty, other.shape, other.numel, other.constants = scalar_ty, self.shape, self.numel, self.constants
        return other

    def make_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = (type.constants, core.constexpr(type.numel)) if type.is_block() else scalar

    def set_name(self, name):
        """It is a text of what is known."""

    make = block_type.__init__
    block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>", set_name)
    block_type.__init__, block_type.with_element_ty, tensor.__init__ = make_block_type, with_element_type, make_tensor


def combine_equal_types_at_once(interpreter):
    """Symptom: much of a kernel's time goes into finding out what two numbers of one type become, which is that type.

    Blocks of one shape are compared size by size, in objects that are made for it; a number written in a kernel is made a
    constant each time, and the constant a block.
    """
    core, semantic = interpreter.tl.core, type(interpreter.interpreter_semantic)
    tensor, check, broadcast = core.tensor, semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    numbers = {id(dtype) for dtype in (core.int32, core.int64, core.uint32, core.uint64, core.float32)}
    offsets, constants = {id(core.int32), id(core.int64)}, {}

    def is_one_shape(left, right):
        if left.is_block():
            return right.is_block() and left.shape is right.shape
        return not right.is_block()

    def broadcast_unequal(self, lhs, rhs):
        return (lhs, rhs) if is_one_shape(lhs.type, rhs.type) else broadcast(self, lhs, rhs)

    def check_unequal(self, lhs, rhs, *arguments, **named):
        if type(lhs) is not tensor:
            return check(self, lhs, rhs, *arguments, **named)
        is_number = id(lhs.dtype) in numbers
        if type(rhs) is tensor:
            # Offsets of pointers, which alone are added to something else.
            is_place = lhs.dtype.is_ptr() and arguments[:1] == (True,) and id(rhs.dtype) in offsets
            if is_place or (is_number and rhs.dtype is lhs.dtype):
                return broadcast_unequal(self, lhs, rhs)
        elif type(rhs) is int and is_number:
            # Of an integer the types' rules are the same for each block, and so is what they make of it.
            key = rhs, id(lhs.dtype), lhs.type.is_block() and id(lhs.type.shape), arguments, *named.items()
            if key not in constants:
                _, constants[key] = check(self, lhs, rhs, *arguments, **named)
                constants[key].handle.data.flags.writeable = False
            return lhs, constants[key]
        return check(self, lhs, rhs, *arguments, **named)

    semantic.broadcast_impl_value, semantic.binary_op_type_checking_impl = broadcast_unequal, check_unequal
