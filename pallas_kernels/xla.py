"""Block-sparse attention in plain JAX: runs anywhere, and is the oracle of other backends.

Memory is bounded by going through the query blocks one after the other, forward and backward.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.problem import LOG2E, Gradients, Inputs, Problem


def unsupported(problem: Problem, inputs: Inputs) -> str | None:
  """Why this backend cannot take a call: it takes all."""
  del problem, inputs
  return None


def forward(
  problem: Problem, inputs: Inputs
) -> tuple[Float[Array, "b s h d"], Float[Array, "b h s"]]:
  """Attention in the dtype of `q`, and base-2 log-sum-exp of the scores (-inf without keys)."""
  keys, values, valid = _all_blocks(problem, inputs)
  queries, _ = _blocks(inputs.q, None, problem.block_q)

  def one(args):
    """One query block of every sample and head."""
    q, index, count = args  # [b h i d], [b h k], [b h]
    k, v, seen = _listed(keys, values, valid, index, count)
    scores = _scores(problem, q, k, seen)
    top = scores.max(axis=(-2, -1), keepdims=True)
    p = jnp.exp2(scores - jnp.where(jnp.isfinite(top), top, 0))
    total = p.sum(axis=(-2, -1))
    out = jnp.einsum("bhikj,bhkjd->bhid", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = (out / jnp.where(total > 0, total, 1)[..., None]).astype(q.dtype)
    return out, top[..., 0, 0] + jnp.log2(total)

  out, lse = jax.lax.map(one, _by_query_block(queries, inputs.index, inputs.count))
  return _join(out, inputs.q.shape[1]), _join(lse[..., None], inputs.q.shape[1])[..., 0].swapaxes(
    1, 2
  )


def backward(
  problem: Problem,
  inputs: Inputs,
  out: Float[Array, "b s h d"],
  lse: Float[Array, "b h s"],
  dout: Float[Array, "b s h d"],
) -> Gradients:
  """Cotangents from that of the output; scores are computed again (spec section 5)."""
  keys, values, valid = _all_blocks(problem, inputs)
  queries, douts = (_blocks(x, None, problem.block_q)[0] for x in (inputs.q, dout))
  delta = jnp.einsum("bshd,bshd->bsh", out, dout, preferred_element_type=jnp.float32)
  rows = [
    _blocks(x[..., None], None, problem.block_q)[0][..., 0] for x in (delta, lse.swapaxes(1, 2))
  ]
  f32 = {"preferred_element_type": jnp.float32}

  def one(carry, args):
    dkeys, dvalues = carry
    (q, index, count), g, delta, lse = args
    k, v, seen = _listed(keys, values, valid, index, count)
    lse = jnp.where(jnp.isfinite(lse), lse, 0)[..., None, None]
    p = jnp.exp2(_scores(problem, q, k, seen) - lse)
    dp = jnp.einsum("bhid,bhkjd->bhikj", g, v, **f32)
    ds = (p * (dp - delta[..., None, None])).astype(k.dtype)
    dq = problem.scale * jnp.einsum("bhikj,bhkjd->bhid", ds, k, **f32)
    dk = problem.scale * jnp.einsum("bhikj,bhid->bhkjd", ds, q, **f32)
    dv = jnp.einsum("bhikj,bhid->bhkjd", p.astype(g.dtype), g, **f32)
    add = jax.vmap(jax.vmap(lambda total, i, part: total.at[i].add(part)))
    return (add(dkeys, index, dk), add(dvalues, index, dv)), dq

  zeros = jnp.zeros_like(keys, jnp.float32)
  args = _by_query_block(queries, inputs.index, inputs.count)
  rest = (x.transpose(2, 0, 1, *range(3, x.ndim)) for x in (douts, *rows))
  (dkeys, dvalues), dq = jax.lax.scan(one, (zeros, zeros), (args, *rest))
  dq = _join(dq, inputs.q.shape[1]).astype(inputs.q.dtype)
  return Gradients(dq, *_split(problem, inputs, dkeys, dvalues))


def _split(problem, inputs, dkeys, dvalues):
  """Blocks of both buffers' gradients as arrays of the inputs' shapes: k, v, past_k, past_v."""
  older = inputs.past_blocks(problem.block_k)

  def tokens(x, like):
    b, h, n, j, d = x.shape
    return x.transpose(0, 2, 3, 1, 4).reshape(b, n * j, h, d)[:, : like.shape[1]].astype(like.dtype)

  now = tokens(dkeys[:, :, older:], inputs.k), tokens(dvalues[:, :, older:], inputs.v)
  if inputs.past_k is None:
    return *now, None, None
  past = (
    tokens(dkeys[:, :, :older], inputs.past_k),
    tokens(dvalues[:, :, :older], inputs.past_v),
  )
  return *now, *(past if problem.past_gradient else map(jnp.zeros_like, past))


def _scores(problem, q, k, seen):
  """Scores in base 2 `[b h i k j]`; -inf where a key does not count."""
  scores = jnp.einsum("bhid,bhkjd->bhikj", q, k, preferred_element_type=jnp.float32)
  return jnp.where(seen[:, :, None], scores * (problem.scale * LOG2E), -jnp.inf)


def _listed(keys, values, valid, index, count):
  """Listed blocks `[b h k j d]` of keys and values, and which of their keys count `[b h k j]`."""
  counts = jnp.arange(index.shape[-1]) < count[..., None]
  # What other blocks hold must not be read, as it may be no number.
  index = jnp.where(counts, index, index[..., :1])
  some = counts.any(axis=-1)[..., None, None, None]
  k, v = (
    jnp.where(some, jax.vmap(jax.vmap(lambda x, i: x[i]))(x, index), 0) for x in (keys, values)
  )
  return k, v, jax.vmap(lambda x, i: x[i])(valid, index) & counts[..., None]


def _all_blocks(problem, inputs):
  """Keys and values of both buffers in blocks `[b h n j d]`, and which keys are valid `[b n j]`."""
  keys, valid = _blocks(inputs.k, inputs.length, problem.block_k)
  values, _ = _blocks(inputs.v, None, problem.block_k)
  if inputs.past_k is None:
    return keys, values, valid
  past_keys, past_valid = _blocks(inputs.past_k, inputs.past_length, problem.block_k)
  past_values, _ = _blocks(inputs.past_v, None, problem.block_k)
  return (
    jnp.concatenate([past_keys, keys], axis=2),
    jnp.concatenate([past_values, values], axis=2),
    jnp.concatenate([past_valid, valid], axis=1),
  )


def _by_query_block(queries, index, count):
  """Arrays with query blocks in front."""
  return queries.transpose(2, 0, 1, 3, 4), index.transpose(2, 0, 1, 3), count.transpose(2, 0, 1)


def _join(x: Float[Array, "q b h i d"], tokens: int) -> Float[Array, "b s h d"]:
  nq, b, h, i, d = x.shape
  return x.transpose(1, 0, 3, 2, 4).reshape(b, nq * i, h, d)[:, :tokens]


def _blocks(
  x: Float[Array, "b s h d"], length: Int[Array, "b"] | None, block: int
) -> tuple[Float[Array, "b h n j d"], Bool[Array, "b n j"]]:
  """Cuts tokens into blocks, the last one padded, and marks the valid ones."""
  b, s, h, d = x.shape
  n = -(-s // block)
  valid = jnp.arange(n * block)[None] < (s if length is None else length[:, None])
  x = jnp.pad(x, ((0, 0), (0, n * block - s), (0, 0), (0, 0)))
  return (
    x.reshape(b, n, block, h, d).transpose(0, 3, 1, 2, 4),
    jnp.broadcast_to(valid, (b, n * block)).reshape(b, n, block),
  )
