"""The state of a stream, and what happens to it when a chunk begins.

All shapes are static, and every length is per batch element, so that streams of different age
share one batch. Letters: l layers, a window frames, n tokens of a frame.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels
from hfjax.models import layers, memory, rope
from hfjax.models.attention import WindowPast, WindowShared
from hfjax.models.geometry import Geometry
from hfjax.models.presets import WanConfig
from hfjax.streaming.config import StreamConfig


class StreamState(NamedTuple):
  """Everything a stream remembers between chunks.

  With guidance the batch is twice that of the samples: rows under the prompts, then as many under
  the negative prompts.
  """

  k: Float[Array, "l b a n h d"]  # window: sink frames in front, then the latest; not rotated
  v: Float[Array, "l b a n h d"]
  latents: Float[Array, "b a y x c"]  # clean latents of the window's frames
  memory: memory.LinearMemory | None  # of frames that left the window, stacked over layers
  absorbed: Int[Array, "b"]  # frames in the memory
  length: Int[Array, "b"]  # valid frames in the window
  position: Int[Array, "b"]  # frames committed so far
  chunk: Int[Array, "b"]  # chunks committed so far
  text: layers.TextKV  # cross-attention keys and values of the prompt, stacked over layers
  model: WanConfig  # what the state was made for; static, no array
  geometry: Geometry


class ChunkState(NamedTuple):
  """A stream with a chunk under way: what all forwards of the chunk read."""

  stream: StreamState  # after frames have left the window
  past: WindowPast  # stacked over layers
  shared: WindowShared


def init_state(config: StreamConfig, text: layers.TextKV) -> StreamState:
  """State of streams that have not begun, one for each sample of `text` (see `wan.text_keys`).

  text: with guidance, of the prompts and, behind them, of as many negative prompts.

  Raises ValueError if `text` does not fit the model.
  """
  m, g = config.model, config.geometry
  if not isinstance(text, layers.TextKV):
    raise ValueError(
      f"Text keys are a TextKV, not a {type(text).__name__}; make them with text_keys."
    )
  want = (
    m.layers,
    text.k.shape[1] if text.k.ndim == 5 else "batch",
    m.text_len,
    m.heads,
    m.head_dim,
  )
  if text.k.shape != want or text.v.shape != want:
    raise ValueError(
      f"Text keys have shape {text.k.shape}; this model needs {want}. Make them with "
      "text_keys and the same model."
    )
  b, dtype = text.k.shape[1], config.compute_dtype
  _check_rows(config, b)
  window = (m.layers, b, g.window, g.tokens, m.heads, m.head_dim)
  held = memory.init_memory((m.layers, b, m.heads), m.head_dim) if config.has_memory else None

  def count():  # separate buffers, so that each can be donated
    return jnp.zeros((b,), jnp.int32)

  return StreamState(
    k=jnp.zeros(window, dtype),
    v=jnp.zeros(window, dtype),
    latents=jnp.zeros((b, g.window, g.height, g.width, m.out_dim), jnp.float32),
    memory=held,
    absorbed=count(),
    length=count(),
    position=count(),
    chunk=count(),
    text=jax.tree.map(lambda x: jnp.array(x, dtype), text),
    model=m,
    geometry=g,
  )


def check_state(config: StreamConfig, state: StreamState):
  """Raises ValueError unless `state` is one of `config`'s, whatever its batch, and still there."""
  if not isinstance(state, StreamState):
    raise ValueError(f"A {type(state).__name__} was given for a state; make one with init_state.")
  differ = [
    f"{field.name} {getattr(theirs, field.name)} against {getattr(ours, field.name)}"
    for theirs, ours in ((state.model, config.model), (state.geometry, config.geometry))
    for field in dataclasses.fields(ours)
    if getattr(theirs, field.name) != getattr(ours, field.name)
  ]
  if state.k.dtype != config.compute_dtype:
    differ.append(f"dtype {state.k.dtype} against {config.dtype}")
  if differ:
    raise ValueError(
      f"This state was made for another configuration ({'; '.join(differ)}). Use the configuration "
      "it was made with, or start anew with init_state."
    )
  _check_rows(config, state.length.shape[0])
  if isinstance(state.k, jax.Array) and not isinstance(state.k, jax.core.Tracer):
    _check_alive(state.k)


def _check_rows(config: StreamConfig, rows: int):
  if rows % config.texts:
    raise ValueError(
      f"Guidance {config.guidance:g} takes two texts for each sample, and the state would have "
      f"{rows} rows; make it of the prompts' text keys and, behind them, as many of negative "
      "prompts."
    )


def _check_alive(array: jax.Array):
  if array.is_deleted():
    raise ValueError(
      "This state is used up: an earlier call took over its memory. Go on from the state that call "
      "returned."
    )


def begin_chunk(config: StreamConfig, state: StreamState, frames: int | None = None) -> ChunkState:
  """Opens the next chunk of `frames` (the geometry's by default).

  Frames beyond sink and previous leave the window and are absorbed; past keys are rotated to this
  chunk's positions and pooled, once for all forwards of the chunk.

  Raises ValueError if the state is another configuration's, or the chunk longer than its chunks.
  """
  g, variant = config.geometry, config.geometry.semantics
  check_state(config, state)
  frames = g.chunk if frames is None else frames
  if not isinstance(frames, int) or not 1 <= frames <= g.chunk:
    raise ValueError(f"A chunk of {frames} frames was begun; this geometry takes 1 to {g.chunk}.")
  # Positions are absolute until the cap, then the chunk stays at its end and the past moves.
  limit = None if variant.dense else g.rope_cap
  start = state.position
  if limit is not None:
    start = jnp.minimum(start, limit - frames)

  memory_, absorbed = _absorb_leaving(config, state, start, limit)

  # Shift what lies behind the sink; rows beyond the new length hold no valid frame.
  leaving = jnp.maximum(state.length - g.past, 0)
  row = jnp.arange(g.window)[None]
  source = jnp.minimum(jnp.where(row < g.sink, row, row + leaving[:, None]), g.window - 1)
  length = jnp.minimum(state.length, g.past)
  stream = state._replace(
    k=_take_frames(state.k, source, 1),
    v=_take_frames(state.v, source, 1),
    latents=_take_frames(state.latents, source, 0),
    memory=memory_,
    absorbed=absorbed,
    length=length,
  )

  shared = WindowShared(
    length=length,
    absorbed=absorbed,
    query=_rotation(config, start[:, None] + jnp.arange(frames), limit),
    key=_rotation(
      config,
      start[:, None] + jnp.arange(frames),
      limit,
      _still(config, state.position[:, None] + jnp.arange(frames)),
    ),
    stored=_stored_rotation(config, state.position, frames),
  )
  return ChunkState(stream, _past(config, stream, start, limit), shared)


def stored_keys(shared: WindowShared, k: Float[Array, "l b s h d"]) -> Float[Array, "l b s h d"]:
  """Keys of the current chunk as the variant keeps them."""
  stored = shared.stored
  if stored is None:
    return k
  return jax.vmap(lambda x: rope.rotate(x, stored))(k)


def _absorb_leaving(config, state, start, limit):
  """The memory after the frames that leave, and how many it holds."""
  g, variant = config.geometry, config.geometry.semantics
  if not config.has_memory:
    return state.memory, state.absorbed
  # The chunk that lies just before the previous frames, by window row; it may reach into the sink.
  first = state.length - g.previous - g.chunk
  row = first[:, None] + jnp.arange(g.chunk)
  if variant.absorb_sink:
    leaves = jnp.broadcast_to((first >= 0)[:, None], row.shape)
  else:
    leaves = row >= g.sink
  position = start[:, None] - g.previous - g.chunk + jnp.arange(g.chunk)
  rotation = _rotation(config, jnp.maximum(position, 0), limit)
  row = jnp.maximum(row, 0)

  def one(layer):
    held, k, v = layer
    return memory.absorb(
      held,
      state.absorbed,
      _take_frames(k, row, 0),
      _take_frames(v, row, 0),
      rotation,
      leaves,
      variant,
    )

  # A loop over layers: all at once would need float32 copies of the whole window.
  held = jax.lax.map(one, (state.memory, state.k, state.v))
  return held, state.absorbed + leaves.sum(axis=1, dtype=jnp.int32)


def _past(config, stream, start, limit) -> WindowPast:
  """Past keys rotated to their places before the chunk that starts at `start`, and pooled."""
  g = config.geometry
  row = jnp.arange(g.past)[None]
  position = jnp.where(row < g.sink, row, start[:, None] - (stream.length[:, None] - row))
  rotation = _rotation(
    config, jnp.maximum(position, 0), limit, _still(config, jnp.broadcast_to(row, position.shape))
  )
  pooled = g.sparse and g.semantics.split_blocks
  center = g.semantics.center_blocks

  def one(k):
    b, _, n, h, d = k.shape
    k = rope.rotate(k[:, : g.past].reshape(b, g.past * n, h, d), rotation)
    if not pooled:
      return k, None
    return k, pallas_kernels.block_means(
      pallas_kernels.center_keys(k, center), g.block, stream.length * n
    )

  k, means = jax.lax.map(one, stream.k)
  v = stream.v[:, :, : g.past].reshape(k.shape)
  return WindowPast(k, v, means, stream.memory)


def _rotation(config, position, limit, still=None) -> rope.Rotation:
  g = config.geometry
  return rope.grid_rotation(position, g.grid, config.model.head_dim, limit, still)


def _still(config, frame):
  """Frames whose keys are read as they lie: the sink, where the variant keeps it rotated."""
  g = config.geometry
  return frame < g.sink if g.semantics.rotate_first_chunk else None


def _stored_rotation(config, position, frames):
  """Rotation of the first chunk's keys before they are kept, where the variant does so."""
  if not config.geometry.semantics.rotate_first_chunk:
    return None
  place = jnp.broadcast_to(jnp.arange(frames)[None], (position.shape[0], frames))
  later = jnp.broadcast_to(position[:, None] > 0, place.shape)
  return _rotation(config, place, None, later)


def _take_frames(x, index, batch_axis):
  """Frames `index` `[b f]` of `x`, whose frame axis follows its batch axis."""
  return jax.vmap(
    lambda y, i: jnp.take(y, i, axis=batch_axis, mode="clip"),
    in_axes=(batch_axis, 0),
    out_axes=batch_axis,
  )(x, index)
