"""Which key blocks each query block attends to (spec section 5).

Blocks of queries and keys are pooled to their means, scored against each other, and the key blocks
that score best are listed for each query block. Nothing here is differentiated.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import triton_map
from pallas_kernels.batching import fold_batch
from pallas_kernels.pooling import block_means, center_keys, choose_blocks, kept_counts, num_blocks


def block_map(
  q: Float[Array, "b s h d"],
  k: Float[Array, "b s h d"],
  ratio: float,
  *,
  past_means: Float[Array, "b h n d"] | None = None,
  states: Sequence[int] | None = None,
  state: Int[Array, "b"] | None = None,
  center: str = "none",
  block_q: int = 64,
  block_k: int = 64,
  backend: str = "auto",
) -> tuple[Int[Array, "b h q k"], Int[Array, "b h q"]]:
  """Lists of key blocks for `block_sparse_attention`, and how many of each count.

  ratio: share of the blocks that hold a valid key to be kept, rounded down, at least one block.
  past_means: means of the blocks of a past buffer (`block_means`), which come before those of `k`;
    centred as `k` will be.
  states: numbers of valid tokens that the past buffer, or `k` where there is none, can have; known
    on the host, so that counts are exact. state: which of them each sample has, from 0 on
    (the nearest there is of numbers beyond). All tokens are valid by default.
  center: see `center_keys`.
  backend: "auto" takes Triton kernels where they can serve the call, "xla" never.

  The blocks of a list that count are in no order to rely on. Equal scores go to the lower block
  number. Raises ValueError on sizes that do not fit together.
  """
  _check(q, k, ratio, past_means, backend)
  if past_means is None:
    room = k.shape[1]
  else:
    room = past_means.shape[2] * block_k
  states = [room] if states is None else list(states)
  if not states or min(states) < 0 or max(states) > room:
    raise ValueError(f"The keys have room for {room} tokens; {states} of them were to be valid.")
  if state is None:
    if len(states) > 1:
      raise ValueError(f"There are {len(states)} states; say which one each sample is in.")
    state = jnp.zeros((q.shape[0],), jnp.int32)
  state = jnp.asarray(state)
  if state.shape != q.shape[:1] or not jnp.issubdtype(state.dtype, jnp.integer):
    raise ValueError(
      f"state is {state.dtype} {list(state.shape)}; give integers of shape [{q.shape[0]}]."
    )
  past_blocks = None if past_means is None else past_means.shape[2]
  blocks = num_blocks(k.shape[1], block_k) + (past_blocks or 0)
  # The kernels know of no valid length but that of the past.
  kernels = (
    backend == "auto"
    and (past_blocks is not None or states == [k.shape[1]])
    and block_q == block_k
    and triton_map.unsupported(q, block_q, blocks) is None
  )
  return _map(
    q, k, past_means, state, float(ratio), tuple(states), center, block_q, block_k, kernels
  )


# Outside of jit too a call is compiled once for its shapes, not operation by operation.
@functools.partial(jax.jit, static_argnums=range(4, 10), inline=True)
def _map(q, k, past_means, state, ratio, states, center, block_q, block_k, kernels):
  """`block_map` of checked arguments; kernels: by those of Triton."""
  # Choices have no gradient, and what makes a batch of vmap's axis would hide that.
  q, k, past_means = jax.lax.stop_gradient((q, k, past_means))
  state = jnp.clip(state, 0, len(states) - 1)
  length = jnp.asarray(states, jnp.int32)[state]
  current = [] if past_means is None else [[k.shape[1]] * len(states)]
  table = kept_counts(ratio, states, *current, block=block_k)
  most, count = int(table.max()), jnp.asarray(table)[state]
  k = center_keys(k, center, length if past_means is None else None)
  if kernels:
    q_means, k_means = fold_batch(lambda *x: triton_map.block_means(x, block_q))(q, k)
    past = () if past_means is None else (past_means, -(-length // block_k))
    choose = lambda q, k, count, *past: triton_map.choose_blocks(q, k, most, count, *past)
    index = fold_batch(choose)(q_means, k_means, count, *past)
    return index, jnp.broadcast_to(count[:, None, None], index.shape[:3])
  q_means = block_means(q, block_q)
  if past_means is None:
    k_means = block_means(k, block_k, length)
    valid = _holds_valid(k_means, length, block_k)
  else:
    means = block_means(k, block_k)
    k_means = jnp.concatenate([past_means, means], axis=2)
    ones = jnp.ones((q.shape[0], means.shape[2]), bool)
    valid = jnp.concatenate([_holds_valid(past_means, length, block_k), ones], axis=1)
  return choose_blocks(q_means, k_means, most, count, valid)


def _check(q, k, ratio, past_means, backend):
  """Raises ValueError on arrays that do not fit together, another ratio or backend."""
  for name, x in (("q", q), ("k", k)):
    if x.ndim != 4 or not x.size:
      raise ValueError(f"{name} has shape {x.shape}; give [batch, length, heads, dim], not empty.")
  if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
    raise ValueError(
      f"q has shape {q.shape} and k {k.shape}; batch, heads and head dimension must agree."
    )
  if past_means is not None:
    b, _, h, d = q.shape
    if past_means.ndim != 4 or (*past_means.shape[:2], past_means.shape[3]) != (b, h, d):
      raise ValueError(
        f"past_means has shape {past_means.shape}; give [{b}, {h}, blocks, {d}], of block_means."
      )
  if not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
    raise ValueError(f"The ratio is {ratio}; give a number from 0 to 1.")
  if backend not in ("auto", "xla"):
    raise ValueError(f"The block map's backend is {backend!r}; choose auto or xla.")


def _holds_valid(means, length, block):
  return jnp.arange(means.shape[2])[None] * block < length[:, None]
