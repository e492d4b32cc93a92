"""Lists of query blocks per key block, from lists of key blocks per query block."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def listed(
  index: Int[Array, "b h q k"], count: Int[Array, "b h q"], blocks: int
) -> Bool[Array, "b h q n"]:
  """Which of `blocks` key blocks each query block attends to."""
  counts = jnp.arange(index.shape[-1]) < count[..., None]
  # Entries that do not count go to a column of their own.
  index = jnp.where(counts, index, blocks)
  b, h, q = jnp.indices(index.shape[:3], sparse=True)
  seen = jnp.zeros((*index.shape[:3], blocks + 1), bool)
  seen = seen.at[b[..., None], h[..., None], q[..., None], index].set(True)
  return seen[..., :blocks]


def transpose_lists(
  index: Int[Array, "b h q k"], count: Int[Array, "b h q"], blocks: int
) -> tuple[Int[Array, "b h n q"], Int[Array, "b h n"]]:
  """Query blocks that attend to each key block, in ascending order, and how many.

  blocks: number of key blocks. Entries past the count are 0.
  """
  seen = listed(index, count, blocks).swapaxes(2, 3)  # [b h n q]
  place = jnp.cumsum(seen, axis=-1, dtype=jnp.int32)
  total = place[..., -1]
  nq = seen.shape[-1]
  # Each listed query block goes to its place; the others go where nothing is read.
  place = jnp.where(seen, place - 1, nq)
  b, h, n = (x[..., None] for x in jnp.indices(seen.shape[:3], sparse=True))
  lists = jnp.zeros((*seen.shape[:3], nq + 1), jnp.int32)
  lists = lists.at[b, h, n, place].set(jnp.arange(nq, dtype=jnp.int32))
  return lists[..., :nq], total
