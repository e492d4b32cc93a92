"""Random calls of block-sparse attention, and what they come to in float64."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.problem import Inputs, Problem

SCALE = 0.3


def draw(dtype="float32", b=2, h=2, d=16, s=20, past=21, n=27, block_q=8, block_k=16,
         length=(27, 9), past_length=(21, 5), seed=0, backend="xla", interpret=False):  # fmt: skip
  """A problem, its inputs and a cotangent; lists of random blocks, and of 0 to all of them."""
  r = np.random.default_rng(seed)
  tensor = lambda rows: jnp.asarray(r.normal(size=(b, rows, h, d)), dtype)
  queries, older = -(-s // block_q), -(-past // block_k)
  blocks = older + -(-n // block_k)
  index = r.permuted(np.broadcast_to(np.arange(blocks), (b, h, queries, blocks)), axis=-1)
  count = r.integers(0, blocks + 1, (b, h, queries))
  count[0, 0, :2], count[-1, -1, :2] = (1, blocks)[:queries], (1, 0)[:queries]
  index[-1, -1, 0, 0] = blocks - 1  # this block lies behind the valid keys of many a case
  # What lies behind the count is not read: no such blocks exist.
  index = np.where(np.arange(blocks) < count[..., None], index, r.choice([-7, 999]))
  kv = (tensor(past), tensor(past)) if past else (None, None)
  ints = lambda x: jnp.asarray(x, jnp.int32)
  inputs = Inputs(
    tensor(s), tensor(n), tensor(n), *kv, ints(index), ints(count), ints(length[:b]),
    ints(past_length[:b]) if past else None,
  )  # fmt: skip
  return Problem(SCALE, block_q, block_k, backend, interpret=interpret), inputs, tensor(s)


def oracle(problem, inputs, dout):
  """Output, base-2 log-sum-exp and cotangents of dense masked attention, in float64."""
  q, k, v, past_k, past_v = (None if x is None else np.float64(x) for x in inputs[:5])
  b, s, h, _ = q.shape
  capacity = inputs.capacity
  if capacity:
    k, v = np.concatenate([past_k, k], axis=1), np.concatenate([past_v, v], axis=1)
  seen = np.zeros((b, h, s, k.shape[1]), bool)
  for n, head, i in np.ndindex(b, h, s):
    row = n, head, i // problem.block_q
    for block in np.asarray(inputs.index[row])[: int(inputs.count[row])]:
      at, first, valid = block * problem.block_k, 0, inputs.past_length
      if block >= inputs.past_blocks(problem.block_k):
        at -= inputs.past_blocks(problem.block_k) * problem.block_k
        first, valid = capacity, inputs.length
      seen[n, head, i, first + at : first + min(at + problem.block_k, int(valid[n]))] = True
  scores = np.einsum("bihd,bjhd->bhij", q, k) * problem.scale
  p = np.where(seen, np.exp(scores), 0)
  total = p.sum(-1, keepdims=True)
  p /= np.where(total > 0, total, 1)
  with np.errstate(divide="ignore"):
    lse = np.log2(total[..., 0])
  dout = np.float64(dout)
  out = np.einsum("bhij,bjhd->bihd", p, v)
  dp = np.einsum("bihd,bjhd->bhij", dout, v)
  ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * problem.scale
  dq = np.einsum("bhij,bjhd->bihd", ds, k)
  dk, dv = np.einsum("bhij,bihd->bjhd", ds, q), np.einsum("bhij,bihd->bjhd", p, dout)
  past = (dk[:, :capacity], dv[:, :capacity]) if capacity else (None, None)
  return out, lse, (dq, dk[:, capacity:], dv[:, capacity:], *past)
