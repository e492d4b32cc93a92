"""The public function: checks its arguments, then calls a backend."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import xla
from pallas_kernels.block_map import num_blocks

BACKENDS: dict[str, Callable] = {"xla": xla.attention}


def block_sparse_attention(
  q: Float[Array, "b s h d"],
  k: Float[Array, "b s h d"],
  v: Float[Array, "b s h d"],
  block_index: Int[Array, "b h q k"],
  block_count: Int[Array, "b h q"] | None = None,
  *,
  scale: float | None = None,
  length: Int[Array, "b"] | None = None,
  past_k: Float[Array, "b s h d"] | None = None,
  past_v: Float[Array, "b s h d"] | None = None,
  past_length: Int[Array, "b"] | None = None,
  block_q: int = 64,
  block_k: int = 64,
  backend: str = "auto",
) -> Float[Array, "b s h d"]:
  """Softmax attention of each query block to its listed key blocks only.

  Queries and keys may have any length; the last block of either may be ragged.

  block_index: key blocks of each query block. With past keys, blocks 0 to ceil(capacity /
    block_k) - 1 are those of the past buffer, whatever its valid length; current ones follow.
    The entries that count must be distinct.
  block_count: how many entries count, from the front; broadcastable to `[b h q]`; all by default.
  scale: factor of the scores; d^-1/2 by default.
  length, past_length: valid tokens at the front of `k` and of `past_k`; all by default. A row
    whose listed blocks hold no valid key comes out as zero.
  backend: a name in `BACKENDS`, or "auto".

  Returns the dtype of `q`. Raises ValueError on shapes that do not fit together.
  """
  if q.ndim != 4:
    raise ValueError(f"q has shape {q.shape}; give [batch, length, heads, dim].")
  if block_q < 1 or block_k < 1:
    raise ValueError(f"Blocks are {block_q} queries and {block_k} keys; give at least 1 each.")
  b, s, h, d = q.shape
  blocks = num_blocks(k.shape[1], block_k)
  if (past_k is None) != (past_v is None) or (past_length is not None and past_k is None):
    raise ValueError("Past keys, values and their length go together; give past_k and past_v.")
  buffers = [("k", k), ("v", v)]
  if past_k is not None and past_v is not None:
    blocks += num_blocks(past_k.shape[1], block_k)
    buffers += [("past_k", past_k), ("past_v", past_v)]
    if past_k.shape[1] != past_v.shape[1]:
      raise ValueError(
        f"past_k holds {past_k.shape[1]} tokens and past_v {past_v.shape[1]}; they must be equal."
      )
  if k.shape[1] != v.shape[1]:
    raise ValueError(f"k holds {k.shape[1]} tokens and v {v.shape[1]}; they must be equal.")
  for name, x in buffers:
    if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (b, h, d):
      raise ValueError(
        f"q has shape {q.shape} and {name} {x.shape}; batch, heads and head dimension "
        "must agree ([batch, length, heads, dim])."
      )
  want = (b, h, num_blocks(s, block_q))
  if block_index.ndim != 4 or block_index.shape[:3] != want:
    raise ValueError(
      f"block_index has shape {block_index.shape}; {s} queries in blocks of {block_q} "
      f"need {want} lists."
    )
  if not jnp.issubdtype(block_index.dtype, jnp.integer) or not block_index.shape[3]:
    raise ValueError(
      f"block_index is {block_index.dtype} {list(block_index.shape)}; give integers, one or more "
      "in a list."
    )
  for name, n in (("length", length), ("past_length", past_length)):
    if n is not None and (jnp.shape(n) != (b,) or not jnp.issubdtype(n.dtype, jnp.integer)):
      raise ValueError(f"{name} is {n.dtype} {list(jnp.shape(n))}; give integers of shape [{b}].")
  if block_index.shape[3] > blocks:
    raise ValueError(
      f"block_index lists {block_index.shape[3]} blocks of keys, and there are only {blocks}."
    )
  if block_count is None:
    block_count = jnp.full(want, block_index.shape[3], jnp.int32)
  else:
    block_count = jnp.broadcast_to(block_count, want)
  if backend != "auto" and backend not in BACKENDS:
    raise ValueError(f"Unknown backend {backend!r}; choose auto or one of {', '.join(BACKENDS)}.")
  call = BACKENDS["xla" if backend == "auto" else backend]
  return call(
    q,
    k,
    v,
    block_index,
    block_count,
    scale=d**-0.5 if scale is None else scale,
    length=length,
    past_k=past_k,
    past_v=past_v,
    past_length=past_length,
    block_q=block_q,
    block_k=block_k,
  )
