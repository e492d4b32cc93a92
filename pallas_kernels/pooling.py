"""Means of blocks, their scores, and the choice among them, in plain JAX (spec section 5).

Nothing here is differentiated.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def num_blocks(tokens: int, block: int) -> int:
  """Blocks that cover `tokens`; the last may be ragged. ValueError if a block is empty."""
  if block < 1:
    raise ValueError(f"The block is {block} tokens; it needs at least 1.")
  return -(-tokens // block)


def kept_counts(ratio: float, *tokens: Sequence[int], block: int = 64) -> np.ndarray:
  """Kept key blocks for each state of one or more key buffers, int32.

  tokens: for each buffer, its numbers of valid tokens; entry i of all buffers belongs together.
  The count is the ratio of all blocks, truncated in float64, and at least one.
  """
  blocks = [sum(num_blocks(t, block) for t in state) for state in zip(*tokens, strict=True)]
  return np.array([min(max(1, int(ratio * n)), max(1, n)) for n in blocks], np.int32)


def center_keys(
  k: Float[Array, "b s h d"], center: str = "none", length: Int[Array, "b"] | None = None
) -> Float[Array, "b s h d"]:
  """Keys as the block map scores them: "none" as they are, "heads" less each token's mean over
  heads, "sequence" less each head's mean over the first `length` tokens. That changes no choice
  among blocks that are all centred by one mean; of two buffers, centre both by the same.

  Raises ValueError on another `center`.
  """
  if center == "none":
    return k
  x = k.astype(jnp.float32)
  if center == "heads":
    mean = x.mean(axis=2, keepdims=True)
  elif center == "sequence":
    valid = _valid(k.shape[0], k.shape[1], length)[..., None, None]
    mean = jnp.where(valid, x, 0).sum(1, keepdims=True) / jnp.maximum(
      valid.sum(1, keepdims=True), 1
    )
  else:
    raise ValueError(f"Unknown centring {center!r}; choose none, heads or sequence.")
  return (x - mean).astype(k.dtype)


def block_means(
  x: Float[Array, "b s h d"], block: int = 64, length: Int[Array, "b"] | None = None
) -> Float[Array, "b h n d"]:
  """Mean of each block over its valid tokens, the first `length`; zero where there are none.

  Summed in float32, rounded to the dtype of `x`.
  """
  b, s, h, d = x.shape
  n = num_blocks(s, block)
  valid = _valid(b, s, length)
  pad = n * block - s
  valid = jnp.pad(valid, ((0, 0), (0, pad))).reshape(b, n, block)
  x = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(b, n, block, h, d)
  total = jnp.where(valid[..., None, None], x.astype(jnp.float32), 0).sum(axis=2)
  mean = total / jnp.maximum(valid.sum(axis=2), 1)[..., None, None]
  return mean.transpose(0, 2, 1, 3).astype(x.dtype)


def choose_blocks(
  q_means: Float[Array, "b h q d"],
  k_means: Float[Array, "b h n d"],
  most: int,
  count: Int[Array, "b"] | None = None,
  valid: Bool[Array, "b n"] | None = None,
) -> tuple[Int[Array, "b h q k"], Int[Array, "b h q"]]:
  """Lists the key blocks that score best for each query block, best first.

  most: length of the lists (static), at least every `count`.
  count: listed blocks that count, per sample; `most` unless given, at least one.
  valid: key blocks that hold a valid token; others are never among the first `count`, as long as
    `count` does not exceed the number of valid blocks.

  Returns (block_index, block_count), int32. Equal scores go to the lower block number.
  Raises ValueError if `most` exceeds the number of key blocks.
  """
  b, h, nq, _ = q_means.shape
  n = k_means.shape[2]
  if not 1 <= most <= n:
    raise ValueError(f"{most} key blocks were to be kept out of {n}; keep from 1 to {n}.")
  scores = jnp.einsum("bhqd,bhnd->bhqn", q_means, k_means, preferred_element_type=jnp.float32)
  scores = jax.lax.stop_gradient(scores)
  if valid is not None:
    # A score may overflow, and is still that of a block with valid keys.
    scores = jnp.maximum(scores, jnp.finfo(scores.dtype).min)
    scores = jnp.where(valid[:, None, None, :], scores, -jnp.inf)
  index = jax.lax.top_k(scores, most)[1].astype(jnp.int32)
  count = jnp.full((b,), most, jnp.int32) if count is None else jnp.clip(count, 1, most)
  return index, jnp.broadcast_to(count[:, None, None].astype(jnp.int32), (b, h, nq))


def _valid(b: int, s: int, length: Int[Array, "b"] | None) -> Bool[Array, "b s"]:
  if length is None:
    return jnp.ones((b, s), bool)
  return jnp.arange(s)[None] < jnp.asarray(length)[:, None]
