"""Compares hfjax with golden numbers of the published code: `python tools/parity.py DIR`.

Each file of the folder is a case; its README tells the format. A case is rebuilt from the
configuration, parameters and inputs that its file holds, run in float32 on the CPU, and every
stored output gets one row: case, array, largest error, allowed error, verdict. Verdicts are ok,
FAIL, information (not judged) and "not covered" (no code of ours answers it yet).

Exit status: 0 if nothing failed, 1 if a row failed, 2 with a sentence if the folder cannot be read
or the case is unknown.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_default_matmul_precision", "highest")

import jax.numpy as jnp  # noqa: E402
from einops import rearrange  # noqa: E402

import pallas_kernels  # noqa: E402
from hfjax.convert import dit  # noqa: E402
from hfjax.convert import umt5 as text_names  # noqa: E402
from hfjax.convert import vae as video_names  # noqa: E402
from hfjax.diffusion.schedule import TRAIN_TIMESTEPS, FlowSchedule, training_target  # noqa: E402
from hfjax.models import rope, wan  # noqa: E402
from hfjax.models import umt5 as text_encoder  # noqa: E402
from hfjax.models import vae as video_coder  # noqa: E402
from hfjax.models.geometry import Geometry  # noqa: E402
from hfjax.streaming import state as streaming  # noqa: E402
from hfjax.streaming import step as stepping  # noqa: E402
from hfjax.streaming.config import StreamConfig  # noqa: E402

# What the folder's README allows.
MAGNITUDE = 1e-6  # schedule: share of the array's largest magnitude
EMBEDDING = 1e-5
SPARSE = 1e-5
FORWARD = 2e-5
ROLLOUT = 5e-5
STATE = 2e-5
AUTOENCODER = 2e-5
GRADIENT = 2e-5  # share of the array's norm
# Tokens that the published dense model sees if its window is -1, whatever the size of a frame.
UNBOUNDED_WINDOW = 32_760
INFORMATION = ("min_topk_margin", "kept_fraction", "cache_local_global_end")


class UnreadableError(Exception):
  """A sentence for the user; exit status 2."""


class Row(NamedTuple):
  array: str
  error: float | None
  allowed: float | None
  verdict: str


class Golden:
  """One file, and a tally of which of its outputs have been compared."""

  def __init__(self, path: Path):
    self.name = path.stem
    try:
      with np.load(path, allow_pickle=False) as file:
        self.arrays = {k: file[k] for k in file.files}
      self.cfg: dict[str, Any] = dict(json.loads(str(self.arrays.pop("cfg"))))
    except Exception as e:
      raise UnreadableError(
        f"{path} is no golden file that can be read ({e}); make it anew, in the format "
        "of the goldens' README."
      ) from e
    self.compared: set[str] = set()

  def __getitem__(self, key: str) -> np.ndarray:
    if key not in self.arrays:
      raise UnreadableError(
        f"{self.name} lacks the array {key}, which this case needs; make the file anew."
      )
    return self.arrays[key]

  def has(self, key: str) -> bool:
    return key in self.arrays

  def setting(self, key: str) -> Any:
    if key not in self.cfg:
      raise UnreadableError(
        f"{self.name} lacks {key} in cfg, which this case needs; make the file anew."
      )
    return self.cfg[key]

  def params(self) -> dict[str, np.ndarray]:
    return {k.removeprefix("param/"): v for k, v in self.arrays.items() if k.startswith("param/")}

  def close(self, key: str, got: Any, allowed: float) -> Iterator[Row]:
    """Largest absolute difference against `allowed`."""
    yield from self._judge(key, got, lambda g, w: (np.abs(g - w).max(initial=0), allowed))

  def close_to_magnitude(self, key: str, got: Any) -> Iterator[Row]:
    """Largest absolute difference against a share of the array's largest magnitude."""
    yield from self._judge(
      key, got, lambda g, w: (np.abs(g - w).max(initial=0), MAGNITUDE * np.abs(w).max(initial=0))
    )

  def close_to_norm(self, key: str, got: Any) -> Iterator[Row]:
    """Norm of the difference over the array's norm."""
    yield from self._judge(
      key, got, lambda g, w: (np.linalg.norm(g - w) / np.linalg.norm(w), GRADIENT)
    )

  def equal(self, key: str, got: Any) -> Iterator[Row]:
    """Equal to the last bit."""
    yield from self._judge(key, got, lambda g, w: (np.abs(g - w).max(initial=0), 0))

  def _judge(self, key, got, measure) -> Iterator[Row]:
    if not self.has(key):  # a file may leave outputs out
      return
    self.compared.add(key)
    if self.arrays[key].dtype.kind not in "fiub":
      raise UnreadableError(f"{self.name} holds {key} as {self.arrays[key].dtype}; give numbers.")
    got, want = np.asarray(got, np.float64), self.arrays[key].astype(np.float64)
    if got.shape != want.shape:
      raise UnreadableError(
        f"{self.name} holds {key} of shape {want.shape}, and its configuration gives "
        f"{got.shape}; make the file anew."
      )
    error, allowed = measure(got, want)
    finite = np.isfinite(got).all() and np.isfinite(want).all()
    yield Row(
      key.removeprefix("out/"),
      float(error),
      float(allowed),
      "ok" if finite and error <= allowed else "FAIL",
    )

  def rest(self) -> Iterator[Row]:
    """Outputs that no comparison asked for."""
    for key in self.arrays:
      if key.startswith("out/") and key not in self.compared:
        verdict = "information" if key.rpartition("/")[2] in INFORMATION else "not covered"
        yield Row(key.removeprefix("out/"), None, None, verdict)


# Latents there are [.. frames, channels, rows, columns], here [.. frames, rows, columns, channels].
def ours(x: np.ndarray) -> jax.Array:
  return jnp.asarray(np.moveaxis(x, -3, -1))


def theirs(x: Any) -> np.ndarray:
  return np.moveaxis(np.asarray(x), -1, -3)


def pairs_to_halves(x: Any) -> np.ndarray:
  """Channels of rotary pairs, from neighbours (theirs) to halves (ours)."""
  return rearrange(np.asarray(x), "... (pair two) -> ... (two pair)", two=2)


def halves_to_pairs(x: Any) -> np.ndarray:
  return rearrange(np.asarray(x), "... (two pair) -> ... (pair two)", two=2)


def schedule(g: Golden) -> Iterator[Row]:
  expected = {
    "sigma_min": 0.0,
    "sigma_max": 1.0,
    "extra_one_step": True,
    "num_train_timesteps": TRAIN_TIMESTEPS,
  }
  for key, value in expected.items():
    if g.cfg.get(key, value) != value:
      raise UnreadableError(
        f"{g.name} has {key} {g.cfg[key]}; hfjax's schedule is made for {value}."
      )
  for entry in g.setting("shifts"):
    name = f"shift{entry['shift']:g}/"
    i, o = "in/" + name, "out/" + name
    table, few = FlowSchedule(entry["shift"]), FlowSchedule(entry["shift"], entry["few_steps"])
    t, clean, noise, x_t = (jnp.asarray(g[i + k]) for k in ("t", "clean", "noise", "xt"))
    yield from g.close_to_magnitude(o + "sigmas", table.sigmas)
    yield from g.close_to_magnitude(o + "timesteps", table.timesteps)
    yield from g.close_to_magnitude(o + "training_weights", table.training_weights)
    yield from g.close_to_magnitude(
      o + "warped_steps", table.warp(g[i + "denoising_steps"].tolist())
    )
    yield from g.equal(o + "timestep_id", table.index(t))
    yield from g.close_to_magnitude(o + "training_weight_at_t", table.training_weight(t))
    yield from g.close_to_magnitude(o + "noisy", table.add_noise(clean, noise, t))
    yield from g.close_to_magnitude(o + "training_target", training_target(clean, noise))
    flow = jnp.asarray(g[i + "flow"])
    yield from g.close_to_magnitude(o + "x0_from_flow", table.x0_from_flow(flow, x_t, t))
    # The golden takes its noisy and clean latents from these two inputs.
    yield from g.close_to_magnitude(o + "flow_from_x0", table.flow_from_x0(clean, x_t, t))
    yield from g.close_to_magnitude(o + "few_sigmas", few.sigmas)
    yield from g.close_to_magnitude(o + "few_timesteps", few.timesteps)
    x, states = jnp.asarray(g[i + "few_start"]), []
    outputs = jnp.asarray(g[i + "few_model_outputs"])
    for flow, tau in zip(outputs, few.timesteps, strict=True):
      x = few.step(flow, x, jnp.full(x.shape[:1], tau))
      states.append(x)
    yield from g.close_to_magnitude(o + "few_states", jnp.stack(states))
    n, start = g.setting("to_final_index"), jnp.asarray(g[i + "few_start"])
    final = few.step(outputs[n], start, jnp.full(start.shape[:1], few.timesteps[n]), to_final=True)
    yield from g.close_to_magnitude(o + "step_to_final", final)


def embeddings(g: Golden) -> Iterator[Row]:
  for width in g.setting("sinusoidal_dims"):
    got = rope.timestep_embedding(g["in/positions"], width)
    yield from g.close(f"out/sinusoidal_{width}", got, EMBEDDING)
  for n, case in enumerate(g.setting("rope_cases")):
    d = case["head_dim"]
    x = pairs_to_halves(g[f"in/rope{n}_x"])
    frames, *grid = case["grid"]
    if g.has(f"out/rope{n}_freq_cos"):
      rows = jnp.arange(g[f"out/rope{n}_freq_cos"].shape[0])
      parts = [rope.turn(rows, rope.frequencies(w)) for w in rope.split_pairs(d // 2)]
      for k, name in enumerate(("cos", "sin")):
        table = jnp.concatenate([p[k] for p in parts], axis=-1)
        yield from g.close(f"out/rope{n}_freq_{name}", table, EMBEDDING)
    for key, start in (
      (f"out/rope{n}", 0),
      *((f"out/rope{n}_start{s}", s) for s in g.setting("starts")),
    ):
      at = jnp.broadcast_to(start + jnp.arange(frames), (x.shape[0], frames))
      rotation = rope.grid_rotation(at, tuple(grid), d)
      tokens = rotation.cos.shape[1]
      turned = rope.rotate(jnp.asarray(x[:, :tokens]), rotation)
      got = np.concatenate([np.asarray(turned), x[:, tokens:]], axis=1)
      yield from g.close(key, halves_to_pairs(got), EMBEDDING)


def block_sparse(g: Golden) -> Iterator[Row]:
  for case in g.setting("cases"):
    q, k, v, cot = (jnp.asarray(g[f"in/{case['name']}/{n}"]) for n in ("q", "k", "v", "cot"))
    block = case["block"]
    for ratio in case["ratios"]:
      kept = int(pallas_kernels.kept_counts(ratio, [k.shape[1]], block=block)[0])
      for layout, center in (("bsld", "heads"), ("bhld", "sequence")):
        o = f"out/{case['name']}/ratio{ratio:g}/{layout}/"
        means = [
          pallas_kernels.block_means(x, block) for x in (q, pallas_kernels.center_keys(k, center))
        ]
        index, count = pallas_kernels.block_map(*means, kept)
        chosen = np.zeros((*index.shape[:3], means[1].shape[2]), np.int8)
        np.put_along_axis(chosen, np.asarray(index), 1, axis=-1)
        yield from g.equal(o + "real_topk", [kept])
        yield from g.equal(o + "block_map", chosen)
        yield from g.equal(o + "lut_sorted", np.sort(index, axis=-1))
        attend = partial(
          pallas_kernels.block_sparse_attention,
          block_index=index,
          block_count=count,
          block_q=block,
          block_k=block,
        )
        out, back = jax.vjp(lambda *a, attend=attend: attend(*a), q, k, v)
        turn = (0, 1, 2, 3) if layout == "bsld" else (0, 2, 1, 3)
        yield from g.close(o + "out", out.transpose(turn), SPARSE)
        for name, grad in zip(("dq", "dk", "dv"), back(cot), strict=True):
          yield from g.close(o + name, grad.transpose(turn), SPARSE)


def model(g: Golden) -> tuple[Any, Any]:
  """Architecture and parameters of a file."""
  tensors = g.params()
  config = dit.config_from_original(g.cfg, any("linear_proj" in k for k in tensors))
  return config, jax.tree.map(jnp.asarray, dit.from_original(config, tensors))


def wan_bidirectional(g: Golden) -> Iterator[Row]:
  config, params = model(g)
  for batch in sorted({k.split("/")[1] for k in g.arrays if k.startswith("in/")}):
    i, o = f"in/{batch}/", f"out/{batch}/"
    x, cot = (rearrange(g[i + k], "b c f y x -> b f y x c") for k in ("x", "cot"))
    context = np.zeros((x.shape[0], config.text_len, config.text_dim), np.float32)
    for n in range(x.shape[0]):
      rows = g[f"{i}context{n}"]
      context[n, : rows.shape[0]] = rows
    forward = jax.jit(lambda p, x=x, t=g[i + "t"], c=context: wan.predict_flow(config, p, x, t, c))
    flow, back = jax.vjp(forward, params)
    yield from g.close(o + "flow", rearrange(flow, "b f y x c -> b c f y x"), FORWARD)
    grads = dit.to_original(config, back(jnp.asarray(cot))[0])
    for name in g.setting("grads"):
      yield from g.close_to_norm(f"{o}grad/{name}", grads[name])


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


def umt5(g: Golden) -> Iterator[Row]:
  config = text_names.config_from_original(g.cfg)
  params = jax.tree.map(jnp.asarray, text_names.from_original(config, g.params()))
  encode = jax.jit(text_encoder.encode, static_argnums=(0, 4, 5))
  for n in range(len(g.setting("batches"))):
    i, o = f"in/batch{n}/", f"out/batch{n}/"
    inputs = (g[i + "ids"], g[i + "mask"].sum(axis=1), jnp.float32)
    yield from g.close(o + "hidden", encode(config, params, *inputs, True), FORWARD)
    yield from g.close(o + "hidden_padding_zeroed", encode(config, params, *inputs, False), FORWARD)
  got = text_encoder.relative_buckets(
    g["in/relative_positions"], config.buckets, config.max_distance
  )
  yield from g.equal("out/relative_buckets", got)


def vae(g: Golden) -> Iterator[Row]:
  statistics = {f"latents_{k}": g[f"in/{k}"].tolist() for k in ("mean", "std")}
  config = video_names.config_from_original({**g.cfg, **statistics})
  params = jax.tree.map(jnp.asarray, video_names.from_original(config, g.params()))
  encode, decode = (jax.jit(partial(f, config)) for f in (video_coder.encode, video_coder.decode))
  video, latent, stream = (
    rearrange(g[f"in/{k}"], "b c t y x -> b t y x c") for k in ("video", "latent", "latent_stream")
  )

  def close(key: str, x: Any) -> Iterator[Row]:
    yield from g.close(
      f"out/{key}", rearrange(np.asarray(x), "b t y x c -> b c t y x"), AUTOENCODER
    )

  yield from close("encoded", encode(params, video))
  yield from close("encoded_first_frame_only", encode(params, video[:, :1]))
  yield from close("decoded", decode(params, latent))
  first, cache = jax.jit(partial(video_coder.decode_first, config))(params, stream[:, :1])
  go_on = jax.jit(partial(video_coder.decode_chunk, config))
  at = 0
  for n, frames in enumerate(g.setting("pieces")):
    given = stream[:, max(at, 1) : at + frames]
    pixels = [] if at else [first]
    if given.shape[1]:
      more, cache = go_on(params, cache, given)
      pixels.append(more)
    yield from close(f"cached_decode_piece{n}", jnp.concatenate(pixels, axis=1))
    at += frames


# By the beginning of the file's name, so that a folder may hold several files of a kind.
CASES = {
  "schedule": schedule,
  "embeddings": embeddings,
  "block_sparse": block_sparse,
  "wan_bidirectional": wan_bidirectional,
  "causal_dense_rollout": causal_dense,
  "hybrid_infer_rollout": hybrid_infer,
  "hybrid_train_rollout": hybrid_train,
  "umt5": umt5,
  "vae": vae,
}


def show(case: str, row: Row):
  numbers = ["-" if x is None else f"{x:.2e}" for x in (row.error, row.allowed)]
  case, array = (
    " ".join(x.split()) or "-" for x in (case, row.array)
  )  # one line, whatever it holds
  print(f"{case:24} {array:44} {numbers[0]:>9} {numbers[1]:>9} {row.verdict}", flush=True)


def run(folder: Path, case: str | None) -> int:
  """Prints the rows; the exit status, but for UnreadableError."""
  try:
    there = folder.is_dir()
  except OSError as e:
    raise UnreadableError(f"{folder} cannot be looked at ({e.strerror}); give another.") from e
  if not there:
    raise UnreadableError(f"{folder} is no folder; give one that holds golden files (*.npz).")
  files = {p.stem: p for p in sorted(folder.glob("*.npz"))}
  if not files:
    raise UnreadableError(f"{folder} holds no golden files (*.npz); give a folder that does.")
  if case is not None:
    if case not in files:
      raise UnreadableError(f"There is no case {case!r} in {folder}; it holds {', '.join(files)}.")
    files = {case: files[case]}
  failed = 0
  for name, path in files.items():
    handler = next((h for start, h in CASES.items() if name.startswith(start)), None)
    if handler is None:
      show(name, Row("-", None, None, "not covered"))
      continue
    golden = Golden(path)
    try:
      compared = tuple(handler(golden))
    except (UnreadableError, ValueError):
      raise
    except Exception as e:  # whatever a configuration of wrong types and shapes leads to
      reason = str(e).partition("\n")[0]
      raise UnreadableError(
        f"{name} cannot be rebuilt from its cfg and inputs ({type(e).__name__}: {reason}); make "
        "the file anew."
      ) from e
    if not compared:
      raise UnreadableError(f"{name} holds no output that its cfg speaks of; make the file anew.")
    for row in (*compared, *golden.rest()):
      failed += row.verdict == "FAIL"
      show(name, row)
  return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
  """Command line; the exit status."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
  parser.add_argument("folder", type=Path, metavar="DIR", help="folder of golden files")
  parser.add_argument("--case", help="only this file, by its name without .npz")
  args = parser.parse_args(argv)
  try:
    return run(args.folder, args.case)
  except (UnreadableError, ValueError) as e:
    print("parity:", " ".join(str(e).split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main())
