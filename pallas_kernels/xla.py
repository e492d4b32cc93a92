"""Block-sparse attention in plain JAX: runs anywhere, and is the oracle of other backends.

Memory is bounded by mapping over query blocks; gradients recompute each block.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention(
  q: Float[Array, "b s h d"],
  k: Float[Array, "b s h d"],
  v: Float[Array, "b s h d"],
  block_index: Int[Array, "b h q k"],
  block_count: Int[Array, "b h q"],
  *,
  scale: float,
  length: Int[Array, "b"] | None,
  past_k: Float[Array, "b s h d"] | None,
  past_v: Float[Array, "b s h d"] | None,
  past_length: Int[Array, "b"] | None,
  block_q: int,
  block_k: int,
) -> Float[Array, "b s h d"]:
  """See `pallas_kernels.block_sparse_attention`."""
  kb, valid = _blocks(k, length, block_k)
  vb, _ = _blocks(v, length, block_k)
  if past_k is not None and past_v is not None:
    past_kb, past_valid = _blocks(past_k, past_length, block_k)
    past_vb, _ = _blocks(past_v, past_length, block_k)
    kb, vb = (jnp.concatenate(x, axis=2) for x in ((past_kb, kb), (past_vb, vb)))
    valid = jnp.concatenate([past_valid, valid], axis=1)
  qb, _ = _blocks(q, None, block_q)

  @jax.checkpoint
  def one(args):
    """One query block of every sample and head."""
    q, index, count = args  # [b h i d], [b h k], [b h]
    # [b h k j d]
    keys, values = (jax.vmap(jax.vmap(lambda x, i: x[i]))(x, index) for x in (kb, vb))
    counts = jnp.arange(index.shape[-1]) < count[..., None]
    seen = jax.vmap(lambda x, i: x[i])(valid, index) & counts[..., None]  # [b h k j]
    scores = jnp.einsum("bhid,bhkjd->bhikj", q, keys, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(seen[:, :, None], scores, -jnp.inf)
    top = jax.lax.stop_gradient(scores.max(axis=(-2, -1), keepdims=True))
    p = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
    total = p.sum(axis=(-2, -1))
    out = jnp.einsum(
      "bhikj,bhkjd->bhid", p.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    return (out / jnp.where(total > 0, total, 1)[..., None]).astype(q.dtype)

  args = (
    qb.transpose(2, 0, 1, 3, 4),
    block_index.transpose(2, 0, 1, 3),
    block_count.transpose(2, 0, 1),
  )
  out = jax.lax.map(one, args)  # [q b h i d]
  nq, b, h, i, d = out.shape
  return out.transpose(1, 0, 3, 2, 4).reshape(b, nq * i, h, d)[:, : q.shape[1]]


def _blocks(
  x: Float[Array, "b s h d"], length: Int[Array, "b"] | None, block: int
) -> tuple[Float[Array, "b h n j d"], Bool[Array, "b n j"]]:
  """Cuts tokens into blocks, the last one padded, and marks the valid ones."""
  b, s, h, d = x.shape
  n = -(-s // block)
  valid = jnp.arange(n * block)[None] < (s if length is None else jnp.asarray(length)[:, None])
  x = jnp.pad(x, ((0, 0), (0, n * block - s), (0, 0), (0, 0)))
  return (
    x.reshape(b, n, block, h, d).transpose(0, 3, 1, 2, 4),
    jnp.broadcast_to(valid, (b, n * block)).reshape(b, n, block),
  )
