"""Block-sparse attention as Pallas kernels for TPUs.

A kernel walks, head by head, over pairs of blocks: one whose result is summed up on chip, and one
that is read for it. The pairs lie in scalar memory, where they tell the pipeline what to fetch.

Letters besides the package's: g heads of all samples, t visits, i and j rows of two blocks.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import device
from pallas_kernels.problem import LOG2E, Gradients, Inputs, Problem
from pallas_kernels.transpose import transpose_lists

LANES = 128
# Rows of a tile, for each dtype that the kernels take.
TILE_ROWS = {jnp.dtype("float32"): 8, jnp.dtype("bfloat16"): 16}
# Blocks of these sizes fit, in float32 too, in the 16 MiB of vector memory that a kernel may use.
MAX_BLOCK, MAX_DIM = 512, 256
# Bytes of a pair, and of all pairs of a call. TPUs have 1 MiB of scalar memory from v4 on.
PAIR_BYTES, MAX_SCALARS = 8, 3 * 2**18
INTERPRETER = pltpu.InterpretParams(detect_races=True)


class Walk(NamedTuple):
  """Pairs of blocks of each head, in the order in which they are visited.

  own: block whose result is summed up, ascending, so that its visits are in a row.
  other: block that is read, or -1. A block with an empty list is visited once, to write its zeros.
  steps: visits of the head that has most; the others stay at their last block and read nothing.
  """

  own: Int[Array, "g t"]
  other: Int[Array, "g t"]
  steps: Int[Array, ""]


class Buffer(NamedTuple):
  """Keys and values padded to whole blocks; span: number of the first one, and past the last."""

  k: Float[Array, "g s d"]
  v: Float[Array, "g s d"]
  length: Int[Array, "g"]
  span: tuple[int, int]


class Operand(NamedTuple):
  """An array that a kernel reads or writes in blocks.

  x: heads in front, then tokens, or blocks of tokens.
  rows: size of a block on the second axis; None if that is one of blocks.
  block: number of the block, from those of `own` and `other`.
  """

  x: jax.Array | jax.ShapeDtypeStruct
  rows: int | None
  block: Callable[[jax.Array, jax.Array], jax.Array]


def unsupported(problem: Problem, inputs: Inputs) -> str | None:
  """Why this backend cannot take a call, or None."""
  if not problem.interpret and device.platform() != "tpu":
    return "it runs on TPUs."
  if not all(x.size for x in inputs[:5] if x is not None):
    return "it takes no empty arrays."
  dtype, dim = inputs.q.dtype, inputs.q.shape[3]
  if dtype not in TILE_ROWS:
    return f"it takes float32 and bfloat16; the inputs are {dtype}."
  if dim > MAX_DIM:
    return f"it takes head dimensions up to {MAX_DIM}; this one is {dim}."
  for name, block in (("block_q", problem.block_q), ("block_k", problem.block_k)):
    if block % TILE_ROWS[dtype] or block > MAX_BLOCK:
      return (
        f"In {dtype} it takes blocks of a multiple of {TILE_ROWS[dtype]} tokens, up to "
        f"{MAX_BLOCK}; {name} is {block}."
      )
  nq, most = inputs.index.shape[2:]
  size = PAIR_BYTES * (nq * most + max(nq, inputs.key_blocks(problem.block_k)))
  if size > MAX_SCALARS:
    return f"The lists of a head take {size} bytes of scalar memory; {MAX_SCALARS} is the most."
  return None


def forward(
  problem: Problem, inputs: Inputs
) -> tuple[Float[Array, "b s h d"], Float[Array, "b h s"]]:
  """Attention in the dtype of `q`, and base-2 log-sum-exp of the scores (-inf without keys)."""
  b, s, h, _ = inputs.q.shape
  q = _by_head(inputs.q, problem.block_q)
  # A column of numbers takes tiles of full width.
  columns = jax.ShapeDtypeStruct((*q.shape[:2], LANES), jnp.float32)
  out, lse = _for_queries(
    problem, inputs, _forward_kernel, [q], [q, columns], [q, columns, columns]
  )
  return _by_token(out, inputs.q), lse[:, :s, 0].reshape(b, h, s)


def backward(
  problem: Problem,
  inputs: Inputs,
  out: Float[Array, "b s h d"],
  lse: Float[Array, "b h s"],
  dout: Float[Array, "b s h d"],
) -> Gradients:
  """Cotangents from that of the output; scores are computed again (spec section 5)."""
  b, s, h, _ = inputs.q.shape
  q, g = (_by_head(x, problem.block_q) for x in (inputs.q, dout))
  delta = (out.astype(jnp.float32) * dout).sum(axis=3).swapaxes(1, 2)
  # A row without keys has no finite log-sum-exp, and no weight that it could scale.
  stats = [x.reshape(b * h, s) for x in (jnp.where(jnp.isfinite(lse), lse, 0), delta)]
  stats = [jnp.pad(x, ((0, 0), (0, q.shape[1] - s))) for x in stats]
  columns = [jnp.broadcast_to(x[..., None], (*x.shape, LANES)) for x in stats]
  (dq,) = _for_queries(problem, inputs, _dq_kernel, [q, g, *columns], [q], [q])

  lists, count = transpose_lists(inputs.index, inputs.count, inputs.key_blocks(problem.block_k))
  queries = [Operand(x, problem.block_q, _other) for x in (q, g)]
  queries += [Operand(x.reshape(b * h, -1, 1, problem.block_q), None, _other) for x in stats]

  def of_keys(buffer, like, wanted=True):
    """Cotangents of a buffer's keys and values, from the queries that attend to them."""
    if not wanted:
      return [jnp.zeros_like(like)] * 2
    blocks = slice(*buffer.span)
    keys = [Operand(x, problem.block_k, _own) for x in (buffer.k, buffer.v)]
    grads = _launch(
      problem,
      functools.partial(_dkv_kernel, problem),
      _walk(lists[:, :, blocks], count[:, :, blocks], inputs.index[0, 0].size),
      [buffer.length],
      [*keys, *queries],
      keys,
      [(problem.block_k, q.shape[2])] * 2,
    )
    return [_by_token(x, like) for x in grads]

  *past, now = _buffers(problem, inputs)
  older = of_keys(past[0], inputs.past_k, problem.past_gradient) if past else [None] * 2
  return Gradients(_by_token(dq, inputs.q), *of_keys(now, inputs.k), *older)


def _forward_kernel(problem, spans, scalars, q, *refs):
  """Online softmax over the listed keys of a block of queries."""
  listed, (out, lse, acc, top, total) = refs[:-5], refs[-5:]
  _, other, first, last = _visit(scalars)

  @pl.when(first)
  def start():
    acc[...] = jnp.zeros_like(acc)
    top[...] = jnp.full_like(top, -jnp.inf)
    total[...] = jnp.zeros_like(total)

  def add(k, v, at, length):
    scores = _scores(problem, q, k, 1, at, length)
    before = top[:, :1]
    now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
    shift = jnp.where(now == -jnp.inf, 0, now)
    p = jnp.exp2(scores - shift)
    fade = jnp.exp2(before - shift)
    acc[...] = fade * acc[...] + _dot(p.astype(v.dtype), v[...])
    top[...] = jnp.broadcast_to(now, top.shape)
    total[...] = fade * total[...] + p.sum(axis=1, keepdims=True)

  _read(problem, spans, scalars, other, listed, add)

  @pl.when(last)
  def finish():
    some = jnp.where(total[:, :1] > 0, total[:, :1], 1)
    out[...] = (acc[...] / some).astype(out.dtype)
    lse[...] = top[...] + jnp.log2(total[...])


def _dq_kernel(problem, spans, scalars, q, dout, lse, delta, *refs):
  """Cotangent of a block of queries, from their listed keys."""
  listed, (dq, acc) = refs[:-2], refs[-2:]
  _, other, first, last = _visit(scalars)

  @pl.when(first)
  def start():
    acc[...] = jnp.zeros_like(acc)

  def add(k, v, at, length):
    p = jnp.exp2(_scores(problem, q, k, 1, at, length) - lse[:, :1])
    ds = p * (_dot(dout[...], v[...], 1) - delta[:, :1])
    acc[...] += _dot(ds.astype(k.dtype), k[...])

  _read(problem, spans, scalars, other, listed, add)

  @pl.when(last)
  def finish():
    dq[...] = (problem.scale * acc[...]).astype(dq.dtype)


def _dkv_kernel(problem, scalars, k, v, q, dout, lse, delta, dk, dv, k_acc, v_acc):
  """Cotangents of a block of keys and values, from the queries that attend to it.

  Weights are `[j i]` here, keys first, so that none is to be transposed for a product.
  """
  own, other, first, last = _visit(scalars)

  @pl.when(first)
  def start():
    k_acc[...] = jnp.zeros_like(k_acc)
    v_acc[...] = jnp.zeros_like(v_acc)

  @pl.when(other >= 0)
  def add():
    length = scalars[2][pl.program_id(0)]
    p = jnp.exp2(_scores(problem, k, q, 0, own * problem.block_k, length) - lse[...])
    ds = p * (_dot(v[...], dout[...], 1) - delta[...])
    v_acc[...] += _dot(p.astype(dout.dtype), dout[...])
    k_acc[...] += _dot(ds.astype(q.dtype), q[...])

  @pl.when(last)
  def finish():
    dk[...] = (problem.scale * k_acc[...]).astype(dk.dtype)
    dv[...] = v_acc[...].astype(dv.dtype)


def _visit(scalars):
  """Blocks of this step, and whether it is the first and the last one of its `own` block."""
  own, other = scalars[:2]
  step, end = pl.program_id(1), pl.num_programs(1) - 1
  at = pl.program_id(0) * (own.shape[0] // pl.num_programs(0))
  block = own[at + step]
  first = (step == 0) | (own[at + jnp.maximum(step - 1, 0)] != block)
  last = (step == end) | (own[at + jnp.minimum(step + 1, end)] != block)
  return block, other[at + step], first, last


def _read(problem, spans, scalars, block, refs, add):
  """Calls `add` on the keys and values of a block, where it starts and where valid keys end."""
  for span, length, k, v in zip(spans, scalars[2:], refs[::2], refs[1::2], strict=True):
    at = (block - span[0]) * problem.block_k
    in_span = pl.when((span[0] <= block) & (block < span[1]))
    in_span(functools.partial(add, k, v, at, length[pl.program_id(0)]))


def _scores(problem, x, y, axis, at, length):
  """Scores in base 2 of two blocks; -inf where a key, along `axis` and from `at`, is not valid."""
  scores = _dot(x[...], y[...], 1) * (problem.scale * LOG2E)
  key = at + jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis)
  return jnp.where(key < length, scores, -jnp.inf)


def _dot(x: Float[Array, "i j"], y: Float[Array, "j d"], axis: int = 0) -> Float[Array, "i d"]:
  """Product over the last axis of `x` and `axis` of `y`, summed in float32."""
  # Unless told so, a TPU rounds float32 to bfloat16; of bfloat16 it takes no other precision.
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(
    x, y, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
  )


def _launch(
  problem: Problem,
  kernel: functools.partial,
  walk: Walk,
  lengths: Sequence[Int[Array, "g"]],
  ins: Sequence[Operand],
  outs: Sequence[Operand],
  sums: Sequence[tuple[int, int]],
) -> list[jax.Array]:
  """Runs a kernel along a walk, for as many heads at a time as scalar memory has room for.

  The kernel is given references: a tuple (own, other, *lengths), then blocks of `ins` and `outs`,
  then float32 arrays of the shapes `sums` that last from step to step.
  """
  heads, visits = walk.own.shape
  room = max(1, MAX_SCALARS // (PAIR_BYTES * visits))
  at_once = max(n for n in range(1, min(heads, room) + 1) if heads % n == 0)

  def spec(operand):
    def index(g, step, scalars):
      # Scalars lie in one dimension: two are padded to tiles, up to half as much again.
      own, other = (x[g * visits + step] for x in scalars[:2])
      return g, operand.block(own, other), *(0,) * (operand.x.ndim - 2)

    return pl.BlockSpec((None, operand.rows, *operand.x.shape[2:]), index)

  def run(args):
    own, other, lengths, arrays = args
    # Under shard_map results vary as the inputs do.
    varying = {"manual_axis_type": jax.typeof(own).manual_axis_type}
    return pl.pallas_call(
      kernel,
      out_shape=[
        jax.ShapeDtypeStruct((at_once, *o.x.shape[1:]), o.x.dtype, **varying) for o in outs
      ],
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(at_once, walk.steps),
        in_specs=[spec(o) for o in ins],
        out_specs=[spec(o) for o in outs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in sums],
      ),
      compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
      interpret=INTERPRETER if problem.interpret else False,
      name="block_sparse" + kernel.func.__name__,
    )((own.reshape(-1), other.reshape(-1), *lengths), *arrays)

  args = walk.own, walk.other, list(lengths), [o.x for o in ins]
  got = jax.lax.map(run, jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), args))
  return [x.reshape(heads, *x.shape[2:]) for x in got]


def _own(own, other):
  return own


def _other(own, other):
  return jnp.maximum(other, 0)


def _within(span, own, other):
  """Block of a buffer; if another buffer is read, one at an end of this one."""
  return jnp.clip(other, span[0], span[1] - 1) - span[0]


def _for_queries(problem, inputs, kernel, ins, outs, sums) -> list[jax.Array]:
  """Runs a kernel for each block of queries over its listed keys.

  ins, outs, sums: arrays by head and query; of `sums`, only the sizes count.
  """
  buffers = _buffers(problem, inputs)
  own = functools.partial(Operand, rows=problem.block_q, block=_own)
  keys = [
    Operand(x, problem.block_k, functools.partial(_within, buffer.span))
    for buffer in buffers
    for x in (buffer.k, buffer.v)
  ]
  counts = jnp.arange(inputs.index.shape[3]) < inputs.count[..., None]
  # In ascending order one buffer is read after the other.
  lists = jnp.sort(jnp.where(counts, inputs.index, jnp.iinfo(jnp.int32).max))
  return _launch(
    problem,
    functools.partial(kernel, problem, [x.span for x in buffers]),
    _walk(lists, inputs.count, lists[0, 0].size),
    [x.length for x in buffers],
    [*map(own, ins), *keys],
    [*map(own, outs)],
    [(problem.block_q, x.shape[2]) for x in sums],
  )


def _walk(lists: Int[Array, "b h r c"], count: Int[Array, "b h r"], pairs: int) -> Walk:
  """Pairs of each block with the first `count` of its list.

  pairs: how many there can be in a head.
  """
  lists, count = (x.reshape(-1, *x.shape[2:]) for x in (lists, count))
  visits = jnp.maximum(count, 1)
  ends = jnp.cumsum(visits, axis=1)
  step = jnp.arange(lists.shape[1] + pairs, dtype=jnp.int32)
  own = (step[:, None] >= ends[:, None, :-1]).sum(axis=2, dtype=jnp.int32)
  of_own = functools.partial(jnp.take_along_axis, indices=own, axis=1)
  place = step - of_own(ends - visits)
  at = own * lists.shape[2] + jnp.minimum(place, lists.shape[2] - 1)
  other = jnp.take_along_axis(lists.reshape(len(lists), -1), at, axis=1)
  return Walk(own, jnp.where(place < of_own(count), other, -1), ends[:, -1].max())


def _buffers(problem: Problem, inputs: Inputs) -> list[Buffer]:
  """The past buffer if there is one, and the current one."""
  older, n = inputs.past_blocks(problem.block_k), inputs.key_blocks(problem.block_k)

  def buffer(k, v, length, *span):
    k, v = (_by_head(x, problem.block_k) for x in (k, v))
    return Buffer(k, v, jnp.repeat(length, inputs.q.shape[2]), span)

  now = buffer(inputs.k, inputs.v, inputs.length, older, n)
  if inputs.past_k is None:
    return [now]
  return [buffer(inputs.past_k, inputs.past_v, inputs.past_length, 0, older), now]


def _by_head(x: Float[Array, "b s h d"], block: int) -> Float[Array, "g s d"]:
  """Heads in front; zeros to a whole number of blocks, and of lanes."""
  b, s, h, d = x.shape
  x = jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -s % block), (0, -d % LANES)))
  return x.reshape(b * h, *x.shape[2:])


def _by_token(x: Float[Array, "g s d"], like: Float[Array, "b s h d"]) -> Float[Array, "b s h d"]:
  """The inverse, in the shape of `like`."""
  b, s, h, d = like.shape
  return x[:, :s, :d].reshape(b, h, s, d).swapaxes(1, 2)
