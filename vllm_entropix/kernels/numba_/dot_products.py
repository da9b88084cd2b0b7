"""Queries of several heads times keys that they share, the sums held in registers.

Written as vector instructions for LLVM, because no loop comes out so: its vectoriser keeps the sums in memory, and reads and
writes each of them for every dimension.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

from vllm_entropix.kernels.numba_.compiled import compiled

# Positions multiplied at a time: as many as the CPU backend's caches keep together at least.
TILE = 16
# Heads multiplied at a time, the last ones of a group fewer. Sums of four take half of 16 registers of eight numbers, which
# leaves room for keys and queries.
_TOGETHER = (4, 2, 1)
# Dimensions multiplied at a time. With the tiles of a usual block these are 4 KiB of keys, read one after the other.
DEPTH = 16
# Keys are fetched this many multiplications ahead.
_AHEAD = 8
_LINE_BYTES = 64

_INTEGER = ir.IntType(32)
_INTEGERS = ir.VectorType(_INTEGER, TILE)
_HALVES = ir.VectorType(ir.IntType(16), TILE)
_FLOATS = ir.VectorType(ir.FloatType(), TILE)
# A product and the sum that it goes into may be one instruction, rounded once.
_FUSED = ("contract",)


def _filled(value: int) -> Any:
    return ir.Constant(_INTEGERS, [value] * TILE)


def _vector_at(builder: Any, pointer: Any, kind: Any) -> Any:
    """The vector that begins at a pointer to its first element."""
    return builder.bitcast(pointer, kind.as_pointer())


def _element(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """A pointer into a flat array."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _keys(builder: Any, pointer: Any, kind: Any) -> list[Any]:
    """Keys of a tile as float32 ``[TILE]``: of one dimension, or of two where they lie in pairs (uint32)."""
    if kind == types.float32:
        return [builder.load(_vector_at(builder, pointer, _FLOATS), align=4)]
    if kind == types.uint16:
        halves = builder.load(_vector_at(builder, pointer, _HALVES), align=2)
        return [builder.bitcast(builder.shl(builder.zext(halves, _INTEGERS), _filled(16)), _FLOATS)]
    pairs = builder.load(_vector_at(builder, pointer, _INTEGERS), align=4)
    parts = builder.shl(pairs, _filled(16)), builder.and_(pairs, _filled(0xFFFF0000))
    return [builder.bitcast(part, _FLOATS) for part in parts]


def _repeated(builder: Any, number: Any) -> Any:
    """A number as ``[TILE]``."""
    nothing = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(_INTEGER, 0))
    return builder.shuffle_vector(first, nothing, _filled(0))


@intrinsic  # type: ignore[untyped-decorator]
def _add(
    _: Any,
    scores: Any,
    score: Any,
    next_head: Any,
    queries: Any,
    query: Any,
    head_dim: Any,
    heads: Any,
    keys: Any,
    key: Any,
    next_keys: Any,
    steps: Any,
) -> Any:
    """Multiply a tile's keys.

    To ``scores[score + h · next_head + i]`` it adds the products of ``queries[query + h · head_dim + d]`` and
    ``keys[key + d · next_keys + i]``, summed over ``d < steps``, for ``h < heads`` and ``i < TILE``. All arrays are flat. Keys
    that are uint32 hold two dimensions each.
    """
    whole = types.intp
    signature = types.void(scores, whole, whole, queries, whole, whole, whole, keys, whole, whole, whole)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        next_head, head_dim, heads, next_keys, steps = (arguments[index] for index in (2, 5, 6, 9, 10))
        score, query, key = (
            _element(context, builder, signature.args[index], arguments[index], arguments[index + 1]) for index in (0, 3, 7)
        )
        kind = signature.args[7].dtype

        def add_heads(first: Any, number: int) -> None:
            """Products of heads ``first`` to ``first + number - 1`` together."""
            members = [builder.add(first, ir.Constant(heads.type, member)) for member in range(number)]
            targets = [_vector_at(builder, builder.gep(score, [builder.mul(next_head, head)]), _FLOATS) for head in members]
            sums = [cgutils.alloca_once_value(builder, builder.load(target, align=4)) for target in targets]
            with cgutils.for_range(builder, steps) as loop:
                keys = _keys(builder, builder.gep(key, [builder.mul(loop.index, next_keys)]), kind)
                start = builder.mul(loop.index, ir.Constant(heads.type, len(keys)))
                for dimension, of_tile in enumerate(keys):
                    d = builder.add(start, ir.Constant(heads.type, dimension))
                    for head, total in zip(members, sums, strict=True):
                        pointer = builder.gep(query, [builder.add(builder.mul(head_dim, head), d)])
                        product = builder.fmul(_repeated(builder, builder.load(pointer)), of_tile, flags=_FUSED)
                        builder.store(builder.fadd(builder.load(total), product, flags=_FUSED), total)
            for target, total in zip(targets, sums, strict=True):
                builder.store(builder.load(total), target, align=4)

        done = ir.Constant(heads.type, 0)
        for number in _TOGETHER:
            size = ir.Constant(heads.type, number)
            times = builder.udiv(builder.sub(heads, done), size)
            with cgutils.for_range(builder, times) as loop:
                add_heads(builder.add(done, builder.mul(loop.index, size)), number)
            done = builder.add(done, builder.mul(times, size))
        return context.get_dummy_value()

    return signature, generate


@intrinsic  # type: ignore[untyped-decorator]
def _fetch(_: Any, keys: Any, index: Any) -> Any:
    """Begin to read the cache line of ``keys[index]``, which may lie beyond the end."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _element(context, builder, signature.args[0], *arguments)
        pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _INTEGER, _INTEGER, _INTEGER])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        # To read, to be kept in all caches, data.
        builder.call(function, [pointer, *(ir.Constant(_INTEGER, number) for number in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(keys, types.intp), generate


@compiled()
def add_products(
    scores: Any,
    score: int,
    next_head: int,
    queries: Any,
    head_dim: int,
    heads: int,
    keys: Any,
    following: Any,
    paired: bool,
    block_size: int,
    first: int,
    stop: int,
) -> None:
    """Add the products of some heads' queries with the keys of tiles ``first`` to ``stop - 1`` of a block to their scores.

    Args:
        scores: float32, flat.
        score: where in it the first head's scores of tile ``first`` begin.
        next_head: from one head's scores to the next one's.
        queries: float32 ``[heads, head_dim]``, flat.
        head_dim: dimensions.
        heads: how many heads.
        keys: the block's, of these heads, flat: float32, bfloat16 as uint16, or pairs of bfloat16 as uint32.
        following: those that will be needed next.
        paired: do they lie ``[block_size / TILE, head_dim / 2, TILE]`` in pairs, rather than ``[head_dim, block_size]``?
        block_size: positions of a block, a multiple of ``TILE``.
        first: where to begin.
        stop: where to end.
    """
    tiles = block_size // TILE
    per_step = 2 if paired else 1
    steps, depth = head_dim // per_step, DEPTH // per_step
    parts = (steps + depth - 1) // depth
    next_keys = TILE if paired else block_size
    # In the order in which the keys lie.
    for outer in range(tiles if paired else parts):
        for inner in range(parts if paired else tiles):
            tile, part = (outer, inner) if paired else (inner, outer)
            if tile < first or tile >= stop:
                continue
            ahead = (outer * (parts if paired else tiles) + inner + _AHEAD) * depth * TILE
            soon, ahead = (keys, ahead) if ahead < steps * block_size else (following, ahead - steps * block_size)
            for line in range(0, depth * TILE, _LINE_BYTES // keys.itemsize):
                _fetch(soon, ahead + line)
            step = part * depth
            key = tile * TILE * steps + step * TILE if paired else step * block_size + tile * TILE
            count = min(depth, steps - step)
            to, of = score + (tile - first) * TILE, step * per_step
            _add(scores, to, next_head, queries, of, head_dim, heads, keys, key, next_keys, count)
