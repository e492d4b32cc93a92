"""What self-attention is given to look at: whole clips, causal training, or a stream's window.

A strategy is a small frozen object, called as `attend(q, k, v, past, shared)`. The network projects
and normalises q, k and v, calls it, and projects what comes back; it does not know which strategy
it serves.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from hfjax.models import memory as linear
from hfjax.models import rope
from hfjax.models.geometry import Geometry

Span = tuple[int, int]


class Attend(Protocol):
  """Strategy of self-attention."""

  def __call__(
    self,
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    past: Any,
    shared: Any,
  ) -> tuple[Float[Array, "b s h d"], "Recalled | None"]:
    """Attends with unrotated q, k and v.

    past: this layer's own inputs; shared: those common to all layers.
    Returns the local attention and, where there is a linear branch, what it recalls.
    """
    ...


class Recalled(NamedTuple):
  """Output of the linear branch before its projection."""

  y: Float[Array, "b s h d"]
  present: Bool[Array, "b"]  # whether the memory holds anything; else the branch adds nothing


def dense(
  q: Float[Array, "b s h d"],
  k: Float[Array, "b s h d"],
  v: Float[Array, "b s h d"],
  length: Int[Array, "b"] | None = None,
) -> Float[Array, "b s h d"]:
  """Softmax attention to the first `length` keys (all by default); softmax in float32.

  Half precision on a GPU goes to cuDNN where it takes the head width.
  """
  half = q.dtype in (jnp.bfloat16, jnp.float16)
  # cuDNN takes head widths of whole 16-byte rows, and up to 128 on every GPU.
  fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
  fused = half and fits and jax.default_backend() == "gpu"
  return jax.nn.dot_product_attention(
    q, k, v, key_value_seq_lengths=length, implementation="cudnn" if fused else "xla"
  )


@dataclasses.dataclass(frozen=True)
class ClipAttention:
  """Attention within one clip, cut into spans of query frames with their own key frames.

  plan: `(queries, keys)` pairs, spans of frames `[start, stop)`; queries cover the clip in order.
    None: every frame sees every frame.
  frames: frames of the clip, where there is a plan.

  `shared` is the rotation of the clip's tokens. A mask would cost memory quadratic in tokens; spans
  need none, and keep what is masked from being computed.
  """

  frames: int = 0
  plan: tuple[tuple[Span, tuple[Span, ...]], ...] | None = None

  def __call__(self, q, k, v, past, shared):
    del past
    q, k = rope.rotate(q, shared), rope.rotate(k, shared)
    if self.plan is None:
      return dense(q, k, v), None
    tokens = q.shape[1] // self.frames

    def take(x, span):
      return x[:, span[0] * tokens : span[1] * tokens]

    out = []
    for queries, keys in self.plan:
      kv = [jnp.concatenate([take(x, span) for span in keys], axis=1) for x in (k, v)]
      out.append(dense(take(q, queries), *kv))
    return jnp.concatenate(out, axis=1), None


class WindowPast(NamedTuple):
  """One layer's view of the stream before the current chunk."""

  k: Float[Array, "b s h d"]  # rotated keys, the valid ones in front
  v: Float[Array, "b s h d"]
  means: Float[Array, "b h n d"] | None  # pooled keys, where blocks are cut separately
  memory: linear.LinearMemory | None


class WindowShared(NamedTuple):
  """What all layers share while a chunk is denoised."""

  length: Int[Array, "b"]  # valid past frames
  absorbed: Int[Array, "b"]  # frames in the linear memory
  query: rope.Rotation  # of the current chunk's queries
  key: rope.Rotation  # of the current chunk's keys
  stored: rope.Rotation | None  # applied to keys before all else, where a variant keeps them so


@dataclasses.dataclass(frozen=True)
class WindowAttention:
  """Hybrid attention of a chunk: the window block-sparsely (or densely), the rest by its memory."""

  geometry: Geometry
  backend: str = "auto"  # of block-sparse attention

  def __call__(self, q, k, v, past: WindowPast, shared: WindowShared):
    g = self.geometry
    recalled = None
    if past.memory is not None:
      recalled = Recalled(
        linear.recall(past.memory, q, shared.query, g.semantics), shared.absorbed > 0
      )
    q = rope.rotate(q, shared.query)
    if shared.stored is not None:
      k = rope.rotate(k, shared.stored)
    k = rope.rotate(k, shared.key)
    length = shared.length * g.tokens
    if not g.sparse:
      total = length + q.shape[1]
      return dense(q, append(past.k, k, length), append(past.v, v, length), total), recalled
    return self._sparse(q, k, v, past, shared, length), recalled

  def _sparse(self, q, k, v, past, shared, length):
    g = self.geometry
    # Past keys are constants of the chunk.
    older: dict[str, Any] = {
      "past_k": past.k, "past_v": past.v, "past_length": length, "past_gradient": False
    }  # fmt: skip
    if past.means is None:  # blocks are cut over past and current keys in one row
      older = {"length": length + q.shape[1]}
      k, v = append(past.k, k, length), append(past.v, v, length)
    index, count = pallas_kernels.block_map(
      q,
      k,
      g.ratio,
      past_means=past.means,
      states=g.valid_keys(q.shape[1] // g.tokens),
      state=shared.length,
      center=g.semantics.center_blocks,
      block_q=g.block,
      block_k=g.block,
      backend="xla" if self.backend == "xla" else "auto",
    )
    return pallas_kernels.block_sparse_attention(
      q, k, v, index, count, block_q=g.block, block_k=g.block, backend=self.backend, **older
    )


def append(
  past: Float[Array, "b s h d"], x: Float[Array, "b s h d"], length: Int[Array, "b"]
) -> Float[Array, "b s h d"]:
  """Puts `x` right behind the first `length` tokens of `past`; what follows is not valid."""
  room = jnp.concatenate([past, jnp.zeros_like(x)], axis=1)
  return jax.vmap(lambda r, y, n: jax.lax.dynamic_update_slice_in_dim(r, y, n, axis=0))(
    room, x, length
  )
