"""Cases of streams, chunk by chunk."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from goldens.file import (
  ROLLOUT,
  STATE,
  Golden,
  Row,
  UnreadableError,
  halves_to_pairs,
  model,
  ours,
  theirs,
)
from hfjax.convert import dit
from hfjax.models import wan
from hfjax.models.geometry import Geometry
from hfjax.streaming import state as streaming
from hfjax.streaming import step as stepping
from hfjax.streaming.config import StreamConfig

# Tokens that the published dense model sees if its window is -1, whatever the size of a frame.
UNBOUNDED_WINDOW = 32_760


class Rollout:
  """A stream of a golden file, called step by step as the file was recorded."""

  def __init__(self, g: Golden, geometry: Geometry, steps: tuple[float, ...], warp: bool):
    network, self.params = model(g)
    self.config = StreamConfig(network, geometry, steps, warp, g.setting("scheduler_shift"))
    self.frames = g.setting("frames_per_chunk")
    self.context = jnp.asarray(g["in/prompt_embeds"])
    self.noise = ours(g["in/noise"])
    self.state = streaming.init_state(
      self.config, wan.text_keys(network, self.params, self.context)
    )
    self._begin = jax.jit(streaming.begin_chunk, static_argnums=(0, 2))
    self._denoise = jax.jit(stepping.denoise, static_argnums=0)
    self._commit = jax.jit(stepping.commit, static_argnums=0)

  def begin(self, n: int) -> jax.Array:
    """Begins chunk n; its noise."""
    self.chunk = self._begin(self.config, self.state, self.frames)
    return self.noise[:, n * self.frames : (n + 1) * self.frames]

  def flow(self, x: jax.Array, t: float) -> jax.Array:
    return self._denoise(self.config, self.params, self.chunk, x, self.times(x, t))

  def predict(self, x: jax.Array, t: float) -> tuple[jax.Array, jax.Array]:
    """Flow and clean latents."""
    flow = self.flow(x, t)
    return flow, self.config.schedule.x0_from_flow(flow, x, self.times(x, t))

  def add_noise(self, x0: jax.Array, noise: np.ndarray, t: float) -> jax.Array:
    return self.config.schedule.add_noise(x0, ours(noise).reshape(x0.shape), self.times(x0, t))

  def commit(self, x0: jax.Array):
    self.state = self._commit(self.config, self.params, self.chunk, x0)

  def memory(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Key mean, key-value mean and token count of every layer, as the files store them."""
    held, g = self.chunk.stream.memory, self.config.geometry
    kv = np.swapaxes(halves_to_pairs(np.swapaxes(held.kv[:, 0], -1, -2)), -1, -2)
    seqlen = np.full(kv.shape[0], int(self.chunk.stream.absorbed[0]) * g.tokens)
    return halves_to_pairs(held.k[:, 0]), kv, seqlen

  @staticmethod
  def times(x: jax.Array, t: float) -> jax.Array:
    return jnp.full(x.shape[:1], np.float32(t))


def causal_dense(g: Golden) -> Iterator[Row]:
  times, chunks = g.setting("timesteps"), g.setting("chunks")
  for name, v in g.setting("variants").items():
    o, window, sink, room = f"out/{name}/", v["local_attn_size"], v["sink_size"], v["cache_frames"]
    if window == -1:
      window, sink = min(room, UNBOUNDED_WINDOW // g.setting("tokens_per_frame")), 0
    # The published window is the end of the cache: the sink is in it only if it is all of it.
    elif room >= window + sink:
      sink = 0
    elif room != window:
      raise UnreadableError(
        f"{g.name} has a cache of {room} frames for a window of {window} and a sink of "
        f"{sink}; hfjax follows caches of {window} or of {window + sink} and more."
      )
    height, width = g.setting("latent_hw")
    r = Rollout(
      g,
      Geometry(
        height,
        width,
        chunk=g.setting("frames_per_chunk"),
        window=window,
        sink=sink,
        variant="reference_dense",
      ),
      (times[0],),
      warp=False,
    )
    renoise = g["in/renoise"]
    renoise = renoise.reshape(chunks, len(times) - 2, r.frames, *renoise.shape[-3:])
    flows, finals = [], []
    for n in range(chunks):
      x, calls = r.begin(n), []
      for i, t in enumerate(times[:-1]):
        flow, x0 = r.predict(x, t)
        calls.append(flow[0])
        if i + 2 < len(times):
          x = r.add_noise(x0, renoise[n, i], times[i + 1])
      calls.append(r.flow(x0, times[-1])[0])
      r.commit(x0)
      flows.append(jnp.stack(calls))
      finals.append(x0[0])
    first = v["first_stored_chunk"]
    yield from g.close(o + "flow", theirs(jnp.stack(flows[first:])), ROLLOUT)
    yield from g.close(o + "x0_final", theirs(jnp.stack(finals[first:])), ROLLOUT)
    yield from g.close(o + "crossattn_k_layer0", r.state.text.k[0], STATE)


def hybrid_geometry(g: Golden, variant: str) -> Geometry:
  if g.cfg.get("rope_type", "relative") != "relative":
    raise UnreadableError(
      f"{g.name} has rope_type {g.cfg['rope_type']}; hfjax's hybrid variants are relative."
    )
  height, width = g.setting("latent_hw")
  return Geometry(
    height,
    width,
    chunk=g.setting("frames_per_chunk"),
    window=g.setting("local_attn_size"),
    sink=g.setting("sink_size"),
    ratio=g.setting("sparse_percent"),
    variant=variant,
  )


def hybrid_infer(g: Golden) -> Iterator[Row]:
  r = Rollout(
    g, hybrid_geometry(g, "reference_infer"), tuple(g.setting("denoising_steps")), g.setting("warp")
  )
  times, chunks = r.config.timesteps, g.setting("chunks")
  flows, clean, memories, keys, values = [], [], [], [], []
  for n in range(chunks):
    x, calls, x0s = r.begin(n), [], []
    for i, t in enumerate(times):
      flow, x0 = r.predict(x, t)
      calls.append(flow[0])
      x0s.append(x0[0])
      if i + 1 < len(times):
        x = r.add_noise(x0, g["in/renoise"][n, i], times[i + 1])
    calls.append(r.flow(x0, 0.0)[0])
    memories.append(r.memory())
    r.commit(x0)
    end = int(r.state.length[0])
    for cache, window in ((keys, r.state.k), (values, r.state.v)):
      cache.extend(np.asarray(window[0, :, end - r.frames : end]).swapaxes(0, 1))
    flows.append(jnp.stack([calls[i] for i in g.setting("flow_steps_stored")]))
    clean.append(jnp.stack(x0s))
  yield from g.close_to_magnitude("out/timesteps", [*times, 0.0])
  yield from g.close("out/flow", theirs(jnp.stack(flows)), ROLLOUT)
  yield from g.close("out/x0", theirs(jnp.stack(clean)), ROLLOUT)
  yield from g.close("out/x0_final", theirs(jnp.stack(clean)[:, -1]), ROLLOUT)
  yield from memory_rows(g, memories)
  # The published cache keeps more frames than the window: the sink and the latest, from the front.
  room, sink = g.setting("cache_frames"), g.setting("sink_size")
  for key, cache, turn in (
    ("out/cache_k_layer0", keys, halves_to_pairs),
    ("out/cache_v_layer0", values, np.asarray),
  ):
    held = cache if len(cache) <= room else cache[:sink] + cache[len(cache) - (room - sink) :]
    rows = turn(np.concatenate(held, axis=1))
    room_left = room * rows.shape[1] // len(held) - rows.shape[1]
    yield from g.close(key, np.pad(rows, ((0, 0), (0, room_left), (0, 0), (0, 0))), STATE)


def hybrid_train(g: Golden) -> Iterator[Row]:
  r = Rollout(
    g, hybrid_geometry(g, "reference_train"), tuple(g.setting("denoising_steps")), g.setting("warp")
  )
  first, last = r.config.timesteps[0], r.config.timesteps[g.setting("exit_index")]
  flows, memories = [], []
  for n in range(g.setting("chunks")):
    x = r.begin(n)
    flow_first, x0 = r.predict(x, first)
    x = r.add_noise(x0, g["in/renoise"][n], last)
    flow_last, x0 = r.predict(x, last)
    noisy = r.add_noise(x0, g["in/context_noise"][n], 0.0)
    flow_context = r.flow(noisy, 0.0)
    memories.append(r.memory())
    if n + 1 < g.setting("chunks"):
      r.commit(noisy)
    flows.append(jnp.stack([flow_first[0], flow_last[0], flow_context[0]]))
  yield from g.close("out/flow", theirs(jnp.stack(flows)), ROLLOUT)
  yield from g.close("out/x0_last_chunk", theirs(x0), ROLLOUT)
  yield from memory_rows(g, memories)

  @jax.jit
  @jax.grad
  def grads(params):
    flow = stepping.denoise(r.config, params, r.chunk, x, r.times(x, last), r.context)
    return (flow * ours(g["in/cot"])).sum()

  got = dit.to_original(r.config.model, grads(r.params))
  for name in g.setting("grads"):
    yield from g.close_to_norm(f"out/grad/{name}", got[name])


def memory_rows(g: Golden, memories: list) -> Iterator[Row]:
  kmean, kv, seqlen = (np.stack(x) for x in zip(*memories, strict=True))
  yield from g.close("out/linear_kmean", kmean, STATE)
  yield from g.close("out/linear_kv", kv, STATE)
  yield from g.equal("out/linear_seqlen", seqlen)
