"""Linear attention over frames that left the window (spec sections 4.3 and 4.4).

The memory holds running means over all absorbed tokens: of the outer product of rotated key and
value, and of the key under the feature map. Its size does not depend on how many were absorbed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hfjax.models import rope
from hfjax.models.geometry import Variant

EPS = 1e-6


class LinearMemory(NamedTuple):
  """State of the linear attention of one layer, or of all of them with a leading axis; float32."""

  kv: Float[Array, "b h d d"]
  k: Float[Array, "b h d"]


def feature_map(x: Array) -> Array:
  """ReLU."""
  return jax.nn.relu(x)


def init_memory(shape: tuple[int, ...], head_dim: int) -> LinearMemory:
  """Empty memory with leading axes `shape`, such as `(layers, batch, heads)`."""
  return LinearMemory(
    jnp.zeros((*shape, head_dim, head_dim), jnp.float32), jnp.zeros((*shape, head_dim), jnp.float32)
  )


def absorb(
  memory: LinearMemory,
  absorbed: Int[Array, "b"],
  k: Float[Array, "b f n h d"],
  v: Float[Array, "b f n h d"],
  rotation: rope.Rotation,
  leaves: Bool[Array, "b f"],
  variant: Variant,
) -> LinearMemory:
  """Folds the frames marked in `leaves` into the running means, all tokens alike.

  absorbed: frames the memory already holds.
  k: keys as the window holds them; `rotation` turns all their `f n` tokens.
  """
  b, f, n, h, d = k.shape
  flat = (b, f * n, h, d)
  k, v = (x.astype(jnp.float32).reshape(flat) for x in (k, v))
  weight = jnp.repeat(leaves.astype(jnp.float32), n, axis=1)
  arriving = leaves.sum(axis=1)
  # Weights add up to one over the arriving tokens, so sums below are their means.
  weight = weight / jnp.maximum(arriving * n, 1)[:, None]
  mapped = feature_map(k)
  turned = rope.rotate(mapped if variant.map_memory_keys else k, rotation)
  highest = jax.lax.Precision.HIGHEST  # a mean over the whole past deserves full products on GPUs
  kv = jnp.einsum("bs,bshd,bshe->bhde", weight, turned, v, precision=highest)
  km = jnp.einsum("bs,bshd->bhd", weight, mapped, precision=highest)
  # Counted in frames, whole numbers, so that a stream of days loses nothing.
  share = arriving / jnp.maximum(arriving + absorbed, 1)
  return LinearMemory(
    memory.kv + share[:, None, None, None] * (kv - memory.kv),
    memory.k + share[:, None, None] * (km - memory.k),
  )


def recall(
  memory: LinearMemory,
  q: Float[Array, "b s h d"],
  rotation: rope.Rotation,
  variant: Variant,
) -> Float[Array, "b s h d"]:
  """Reads the memory with unrotated queries; float32. Zero-filled memories read as zero."""
  q = q.astype(jnp.float32)
  mapped = feature_map(q)
  turned = rope.rotate(mapped if variant.map_memory_query else q, rotation)
  numerator = jnp.einsum("bshd,bhde->bshe", turned, memory.kv)
  denominator = jnp.einsum("bshd,bhd->bsh", mapped, memory.k)
  return numerator / (denominator + EPS)[..., None]
