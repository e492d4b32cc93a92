"""The transitions of a chunk: denoise it, commit it, or both from noise to clean latents."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from hfjax.diffusion import guidance, schedule
from hfjax.models import checks, wan
from hfjax.models.attention import WindowAttention
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.state import ChunkState, StreamState, begin_chunk, stored_keys


class ChunkNoise(NamedTuple):
  """All random numbers of a chunk, standard normal."""

  start: Float[Array, "b f y x c"]  # what the chunk starts from
  again: Float[Array, "r b f y x c"]  # added after each denoising step but the last


def denoise(
  config: StreamConfig,
  params: wan.Params,
  chunk: ChunkState,
  x: Float[Array, "b f y x c"],
  t: Float[Array, "b"] | Float[Array, "b f"],
  context: Float[Array, "b t w"] | None = None,
) -> Float[Array, "b f y x c"]:
  """Flow of the chunk's latents `x` at time `t`, guided if configured; writes nothing.

  context: text rows whose keys and values are computed here, so that they carry gradients; the
    state's are used by default. With guidance, negative ones follow behind. History carries no
    gradient.

  Raises ValueError on latents that do not fit the chunk.
  """
  flow, _ = _forward(config, params, chunk, x, t, context, collect=False)
  scale = guidance.scale_at(config.guidance, config.guidance_interval, jnp.asarray(t))
  return guidance.merge_rows(flow, config.texts, scale)


def commit(
  config: StreamConfig, params: wan.Params, chunk: ChunkState, x0: Float[Array, "b f y x c"]
) -> StreamState:
  """Closes the chunk with clean latents: their keys and values enter the window, under each text.

  Raises ValueError on latents that do not fit the chunk.
  """
  g = config.geometry
  t = jnp.full(x0.shape[:1], config.context_timestep, jnp.float32)
  _, kv = _forward(config, params, chunk, x0, t, None, collect=True)
  frames = x0.shape[1]
  stream = chunk.stream

  def put(window, new):
    """Writes frames `[b f ...]` behind the valid ones of `[b a ...]`."""
    return jax.vmap(lambda w, n, i: jax.lax.dynamic_update_slice_in_dim(w, n, i, axis=0))(
      window, new.astype(window.dtype), stream.length
    )

  def put_layers(window, new):
    new = new.reshape(*new.shape[:2], frames, g.tokens, *new.shape[3:])
    return jax.vmap(put)(window, new)

  return stream._replace(
    k=put_layers(stream.k, stored_keys(chunk.shared, kv.k)),
    v=put_layers(stream.v, kv.v),
    latents=put(stream.latents, guidance.repeat_rows(x0, config.texts)),
    length=stream.length + frames,
    position=stream.position + frames,
    chunk=stream.chunk + 1,
  )


def draw_noise(
  config: StreamConfig, keys: PRNGKeyArray, chunk: Int[Array, "b"], frames: int | None = None
) -> ChunkNoise:
  """Noise of a chunk, a function of each sample's key and chunk number alone.

  keys: one typed key per sample, `[b]`.
  chunk: the state's numbers; of those of several texts, which are equal, the first are read.
  """
  g, m = config.geometry, config.model
  shape = (g.chunk if frames is None else frames, g.height, g.width, m.out_dim)

  def one(key, number):
    key = jax.random.fold_in(key, number)
    draws = [
      jax.random.normal(jax.random.fold_in(key, i), shape) for i in range(1 + config.returns)
    ]
    return draws[0], jnp.stack(draws[1:]) if draws[1:] else jnp.zeros((0, *shape))

  start, again = jax.vmap(one)(keys, chunk[: keys.shape[0]])
  return ChunkNoise(start, jnp.moveaxis(again, 1, 0))


def denoise_chunk(
  config: StreamConfig, params: wan.Params, chunk: ChunkState, noise: ChunkNoise
) -> Float[Array, "b f y x c"]:
  """Clean latents of a chunk, solved from noise or in few steps.

  Each of few steps predicts them and, but for the last, noises them again.

  Raises ValueError on noise that does not fit the steps or the chunk.
  """
  want = (config.returns, *noise.start.shape)
  if noise.again.shape != want:
    how = "a solver" if config.solver is not None else f"{len(config.steps)} denoising steps"
    raise ValueError(
      f"The noise to be added again has shape {noise.again.shape}; noise of shape "
      f"{noise.start.shape} and {how} need {want}."
    )
  if config.solver is not None:
    return _solve(config, config.solver, params, chunk, noise.start)
  times = jnp.asarray(config.timesteps, jnp.float32)
  sigmas = jnp.asarray(config.sigmas, jnp.float32)
  # Noise level 0 follows the last step, where this noise is multiplied away.
  again = jnp.concatenate([noise.again, jnp.zeros_like(noise.start)[None]])

  def step(x, i):
    t = jnp.full(x.shape[:1], times[i])
    x0 = schedule.remove_flow(x, denoise(config, params, chunk, x, t), sigmas[i])
    return schedule.mix_noise(x0, again[i], sigmas[i + 1]), None

  return jax.lax.scan(step, noise.start, jnp.arange(len(config.steps)))[0]


def chunk_step(
  config: StreamConfig, params: wan.Params, state: StreamState, noise: ChunkNoise
) -> tuple[StreamState, Float[Array, "b f y x c"]]:
  """Generates one chunk: the state after it, and its clean latents."""
  chunk = begin_chunk(config, state, noise.start.shape[1])
  x0 = denoise_chunk(config, params, chunk, noise)
  return commit(config, params, chunk, x0), x0


def context_step(
  config: StreamConfig, params: wan.Params, state: StreamState, x0: Float[Array, "b f y x c"]
) -> StreamState:
  """Takes given clean latents (an image, a clip to continue) as the next chunk."""
  return commit(config, params, begin_chunk(config, state, x0.shape[1]), x0)


def _solve(config, solver, params, chunk, noise):
  times = jnp.asarray(solver.timesteps, jnp.float32)

  def step(state, i):
    t = jnp.full(noise.shape[:1], times[i])
    return solver.step(state, denoise(config, params, chunk, state.x, t), i), None

  return jax.lax.scan(step, solver.init(noise), jnp.arange(solver.steps))[0].x


def _forward(config, params, chunk, x, t, context, collect):
  """Flow, and keys and values if `collect`, of latents `[b f y x c]` under each of their texts."""
  g, m = config.geometry, config.model
  rows = chunk.shared.length.shape[0]
  want = (
    rows // config.texts,
    chunk.shared.query.cos.shape[1] // g.tokens,
    g.height,
    g.width,
  )
  if x.shape[:4] != want or x.ndim != 5 or x.shape[4] != m.in_dim:
    raise ValueError(
      f"The chunk's latents have shape {tuple(x.shape)}; the chunk that was begun takes "
      f"{(*want, m.in_dim)} ([batch, frames, rows, columns, channels])."
    )
  if (chunk.stream.model, chunk.stream.geometry) != (m, g):
    raise ValueError(
      "This chunk was begun with another configuration; use the one that began it throughout."
    )
  wan.check_params(m, params)
  t = checks.as_times(t, *want[:2])
  x, t = (guidance.repeat_rows(y, config.texts) for y in (x, t))
  past, shared, text = jax.lax.stop_gradient((chunk.past, chunk.shared, chunk.stream.text))
  if context is not None:
    wan.check_context(m, context)
    checks.check_batch("text context", context, rows)
    text = None
  model = wan.Wan(
    m, WindowAttention(g, config.backend), config.compute_dtype, collect, config.remat
  )
  return model.apply({"params": params}, x, t, shared, past=past, text=text, context=context)
