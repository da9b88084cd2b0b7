"""bfloat16 in Triton's interpreter, computed as a GPU does: in float32, rounded once to nearest, ties to even.

NumPy has no bfloat16. The interpreter keeps the bits in uint16 arrays, which is right for moving values about, and then
computes on these as if they were integers: 1 + 1 is 0x3f80 + 0x3f80, a negative number is larger than any positive one,
tl.dot and tl.sum give nonsense, all without an error. Its conversion from float32 truncates. Here the bits stay in
memory, and every operation that looks at the numbers widens them first and narrows its result.
"""

import functools

import numpy as np

# Operations on numbers rather than on bits. Each takes handles and gives one, whose type is that of its last operand.
ARITHMETIC = ("binary_op", "unary_op", "create_clampf", "create_fma", "create_dot", "create_erf", "create_rsqrt")
# What the interpreter reduces with NumPy. All else it reduces by calling the kernel's own function, made of the above.
REDUCTIONS = ("min_max", "sum")
SCANS = ("cumsum", "cumprod")


def widened(bits):
    """Numbers whose bfloat16 bits these are, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrowed(numbers, *, toward_zero=False):
    """Bits of the bfloat16 nearest to each float32, of the even one where two are; toward zero they are cut off."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    upper = bits >> np.uint32(16)
    # Half of the last place, less one where that is even already: a carry goes into the exponent, and up to infinity.
    rounded = upper if toward_zero else (bits + (np.uint32(0x7FFF) + (upper & np.uint32(1)))) >> np.uint32(16)
    # The upper half of a NaN could be that of infinity.
    return np.where(np.isnan(numbers), np.uint32(0x7FC0), rounded).astype(np.uint16)


def repair(interpreter):
    """Make the interpreter compute with bfloat16."""
    language, handle = interpreter.tl, interpreter.TensorHandle
    builder = interpreter.InterpreterBuilder
    convert, convert_rounded = builder.cast_impl, builder.create_fp_to_fp
    toward_zero = interpreter._ir.ROUNDING_MODE.RTZ

    def is_bfloat16(value):
        return isinstance(value, handle) and value.dtype is language.bfloat16

    def wide(value):
        return handle(widened(value.data), language.float32) if is_bfloat16(value) else value

    def narrow(value, **rounding):
        return handle(narrowed(value.data, **rounding), language.bfloat16)

    def in_float32(operation):
        @functools.wraps(operation)
        def compute(self, *operands):
            if not any(map(is_bfloat16, operands)):
                return operation(self, *operands)
            last = [operand for operand in operands if isinstance(operand, handle)][-1]
            result = operation(self, *map(wide, operands))
            return narrow(result) if is_bfloat16(last) and result.dtype == language.float32 else result

        return compute

    def reduced_in_float32(reduction):
        @functools.wraps(reduction)
        def reduce(self, values, **operators):
            semantic = interpreter.interpreter_semantic
            values = values[0] if isinstance(values, tuple) else values
            if values.dtype != language.bfloat16:
                return reduction(self, values, **operators)
            result = reduction(self, semantic.cast(values, language.float32), **operators)

            def back(part):
                return semantic.cast(part, language.bfloat16) if part.dtype == language.float32 else part

            return type(result)(map(back, result)) if isinstance(result, (tuple, list)) else back(result)

        return reduce

    def cast_impl(self, source, target):
        if target.scalar == language.bfloat16:
            return source if is_bfloat16(source) else narrow(convert(self, source, language.float32))
        return convert(self, wide(source), target)

    def create_fp_to_fp(self, source, target, rounding):
        if target.scalar == language.bfloat16 and rounding == toward_zero:
            return narrow(convert(self, source, language.float32), toward_zero=True)
        return convert_rounded(self, source, target, rounding)

    for name in ARITHMETIC:
        setattr(builder, name, in_float32(getattr(builder, name)))
    for name in REDUCTIONS:
        setattr(interpreter.ReduceOps, name, reduced_in_float32(getattr(interpreter.ReduceOps, name)))
    for name in SCANS:
        setattr(interpreter.ScanOps, name, reduced_in_float32(getattr(interpreter.ScanOps, name)))
    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
