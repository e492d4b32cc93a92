"""Streaming variant "paper" and whole-clip forwards against the NumPy oracle."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from hfjax.convert import dit
from hfjax.models import causal, wan
from hfjax.models.geometry import Geometry
from hfjax.models.presets import WanConfig
from hfjax.streaming import state as streaming
from hfjax.streaming import step as stepping
from hfjax.streaming.config import StreamConfig
from tests.reference import wan_numpy as oracle

# hfjax computes in float32, the oracle in float64. A float32 matrix product of width 48 to 96 with
# terms of O(1) is off by a few 1e-7; two blocks, norms and the head make 1e-6 to 1e-5 of it in
# flows of O(1 to 4). A wrong position, frame, count or block moves flows by 1e-3 and more.
FLOW = 2e-5
# Keys, values and the memory's means are of O(1) too. A memory read where the denominator is 1e-3
# (narrow heads, all but a channel or two negative) multiplies the query's rounding to 1e-5.
STATE = 2e-5

TEXT_ROWS, TEXT_DIM, CHANNELS = 5, 12, 4

_text = jax.jit(wan.text_keys, static_argnums=0)
_init = jax.jit(streaming.init_state, static_argnums=0)
_begin = jax.jit(streaming.begin_chunk, static_argnums=(0, 2))
_denoise = jax.jit(stepping.denoise, static_argnums=0)
_context = jax.jit(stepping.context_step, static_argnums=0)
_predict = jax.jit(wan.predict_flow, static_argnums=0, static_argnames="plan")


@functools.partial(jax.jit, static_argnums=0)
def _run_chunk(config, params, state, x, t, x0):
  """A chunk's stream after its beginning, flow of x at t, and stream after x0 is committed."""
  chunk = streaming.begin_chunk(config, state, x.shape[1])
  flow = stepping.denoise(config, params, chunk, x, t)
  return chunk.stream, flow, stepping.commit(config, params, chunk, x0)


def model(dim: int, heads: int, is_hybrid: bool = True) -> WanConfig:
  # More text rows than are given, so that rows of padding are attended to.
  return WanConfig(
    dim=dim,
    ffn_dim=2 * dim,
    heads=heads,
    layers=2,
    in_dim=CHANNELS,
    out_dim=CHANNELS,
    text_dim=TEXT_DIM,
    text_len=TEXT_ROWS + 2,
    freq_dim=32,
    linear=is_hybrid,
  )


def draw_tensors(config: WanConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """Parameters under original names, none of them zero or one."""
  c = config
  tensors = {}

  def matrix(name, *shape):
    scale = 1 / np.sqrt(np.prod(shape[1:]))
    tensors[name + ".weight"] = scale * rng.standard_normal(shape)
    tensors[name + ".bias"] = 0.1 * rng.standard_normal(shape[0])

  def scale(name):
    tensors[name + ".weight"] = 1 + 0.1 * rng.standard_normal(c.dim)

  matrix("patch_embedding", c.dim, c.in_dim, 1, *c.patch)
  matrix("text_embedding.0", c.dim, c.text_dim)
  matrix("text_embedding.2", c.dim, c.dim)
  matrix("time_embedding.0", c.dim, c.freq_dim)
  matrix("time_embedding.2", c.dim, c.dim)
  matrix("time_projection.1", 6 * c.dim, c.dim)
  matrix("head.head", c.patch[0] * c.patch[1] * c.out_dim, c.dim)
  tensors["head.modulation"] = 0.3 * rng.standard_normal((1, 2, c.dim))
  for i in range(c.layers):
    block = f"blocks.{i}"
    tensors[block + ".modulation"] = 0.3 * rng.standard_normal((1, 6, c.dim))
    for attn in (".self_attn", ".cross_attn"):
      for name in "qkvo":
        matrix(f"{block}{attn}.{name}", c.dim, c.dim)
      scale(f"{block}{attn}.norm_q")
      scale(f"{block}{attn}.norm_k")
    if c.linear:
      matrix(block + ".self_attn.linear_proj", c.head_dim, c.head_dim)
    scale(block + ".norm3")
    tensors[block + ".norm3.bias"] = 0.1 * rng.standard_normal(c.dim)
    matrix(block + ".ffn.0", c.ffn_dim, c.dim)
    matrix(block + ".ffn.2", c.dim, c.ffn_dim)
  # What float32 holds, so that both sides start from the same numbers.
  return {k: v.astype(np.float32) for k, v in tensors.items()}


class Sides:
  """The same network on both sides."""

  def __init__(self, config: WanConfig, seed: int):
    self.config = config
    self.rng = np.random.default_rng(seed)
    tensors = draw_tensors(config, self.rng)
    self.params = jax.tree.map(jnp.asarray, dit.from_original(config, tensors))
    self.tensors = {k: v.astype(np.float64) for k, v in tensors.items()}
    self.sizes = oracle.Sizes(config.heads, config.text_len)

  def draw(self, *shape: int) -> np.ndarray:
    return self.rng.standard_normal(shape).astype(np.float32)

  def draw_context(self, batch: int) -> np.ndarray:
    return self.draw(batch, TEXT_ROWS, TEXT_DIM)


class Rollout(Sides):
  """A batch of streams in hfjax, and one oracle stream per sample."""

  def __init__(self, config: WanConfig, geometry: Geometry, batch: int, seed: int):
    super().__init__(config, seed)
    g = geometry
    self.stream_config = StreamConfig(config, g)
    self.context = self.draw_context(batch)
    self.state = _init(self.stream_config, _text(config, self.params, self.context))
    window = oracle.Window(g.window, g.sink, g.chunk, g.rope_cap, g.ratio, g.block)
    self.streams = [
      oracle.Stream(self.tensors, self.sizes, window, g.grid, self.context[b]) for b in range(batch)
    ]

  def draw_latents(self, frames: int) -> np.ndarray:
    g = self.stream_config.geometry
    return self.draw(len(self.streams), frames, g.height, g.width, CHANNELS)

  def run_chunk(self, frames: int, t: np.ndarray):
    """One chunk on both sides, compared on the way; t: [b] or [b f]."""
    x, t = self.draw_latents(frames), t.astype(np.float32)
    for stream in self.streams:
      stream.begin(frames)
    want = np.stack([s.flow(x[b], t[b]) for b, s in enumerate(self.streams)])
    assert 0.3 < want.std() < 4  # what the tolerances are made for
    sigma = t.reshape(*t.shape, *[1] * (x.ndim - t.ndim)) / 1000
    x0 = (x - sigma * want).astype(np.float32)

    begun, got, self.state = _run_chunk(self.stream_config, self.params, self.state, x, t, x0)
    np.testing.assert_allclose(got, want, rtol=0, atol=FLOW)
    self.compare_memory(begun)
    for b, stream in enumerate(self.streams):
      stream.commit(x0[b])
    self.compare_state()

  def run_context(self, frames: int):
    """One chunk of given clean latents on both sides."""
    x0 = self.draw_latents(frames)
    self.state = _context(self.stream_config, self.params, self.state, x0)
    for b, stream in enumerate(self.streams):
      stream.begin(frames)
      stream.commit(x0[b])
    self.compare_state()

  def compare_memory(self, stream: streaming.StreamState):
    if not self.stream_config.has_memory:
      assert stream.memory is None
      return
    kv, k = np.asarray(stream.memory.kv), np.asarray(stream.memory.k)
    kv = rearrange(kv, "l b h (two pair) d -> l b h (pair two) d", two=2)
    k = rearrange(k, "l b h (two pair) -> l b h (pair two)", two=2)
    for b, s in enumerate(self.streams):
      assert int(stream.absorbed[b]) == len(s.left())
      for layer in range(self.config.layers):
        kv_want, k_want = s.memory[layer] or (0, 0)
        np.testing.assert_allclose(kv[layer, b], kv_want, rtol=0, atol=STATE)
        np.testing.assert_allclose(k[layer, b], k_want, rtol=0, atol=STATE)

  def compare_state(self):
    """The window after a commit: sink, previous, and the chunk, in order."""
    k = rearrange(np.asarray(self.state.k), "l b a n h (two pair) -> l b a n h (pair two)", two=2)
    v, latents = np.asarray(self.state.v), np.asarray(self.state.latents)
    for b, s in enumerate(self.streams):
      gone = [n for n, _ in s.left()]
      frames = [n for n in range(s.committed) if n not in gone]
      length = len(frames)
      assert int(self.state.length[b]) == length
      assert int(self.state.position[b]) == s.committed
      assert int(self.state.chunk[b]) == len(s.begun)
      np.testing.assert_array_equal(latents[b, :length], [s.latents[n] for n in frames])
      for layer in range(self.config.layers):
        for window, held in ((k, s.k), (v, s.v)):
          want = np.stack([held[layer][n] for n in frames])
          np.testing.assert_allclose(window[layer, b, :length], want, rtol=0, atol=STATE)


class Case(NamedTuple):
  """A stream: window, and lengths of its chunks."""

  name: str
  window: int
  sink: int
  chunk: int
  cap: int
  ratio: float
  chunks: Sequence[int]
  latent: tuple[int, int] = (8, 12)
  dim: int = 48
  heads: int = 2
  batch: int = 1
  block: int = 64
  is_hybrid: bool = True
  per_frame: bool = False  # times
  context: int = 0  # chunks that are given
  seed: int = 0

  def geometry(self) -> Geometry:
    return Geometry(
      *self.latent,
      chunk=self.chunk,
      window=self.window,
      sink=self.sink,
      ratio=self.ratio,
      rope_cap=self.cap,
      block=self.block,
    )


CASES = (
  Case("odd_window", 7, 2, 2, 21, 0.4, [2] * 12, batch=2),
  Case("tight_cap", 9, 3, 3, 9, 0.3, [3] * 7, heads=3, batch=2),
  Case("no_sink", 5, 0, 2, 8, 0.5, [2] * 7, latent=(6, 10), dim=30, heads=3, batch=3),
  Case("no_previous_small_sink", 4, 1, 3, 12, 0.6, [3] * 6, latent=(10, 14), dim=40),
  Case("no_previous_large_sink", 5, 3, 2, 10, 0.5, [2] * 7, heads=3),
  Case("dense_large_sink_single_first", 10, 4, 3, 21, 1.0, [1] + [3] * 8, latent=(6, 10)),
  Case("single_first", 9, 3, 3, 12, 0.2, [1] + [3] * 5, batch=2),
  Case("small_sink_small_blocks", 8, 1, 2, 12, 0.35, [1] + [2] * 7, latent=(6, 10), block=16),
  Case("mixed_lengths", 8, 2, 3, 11, 0.45, [3, 1, 3, 1, 1, 3, 3, 1], dim=44),
  Case("all_of_the_cap", -1, 2, 2, 8, 0.5, [2] * 7, latent=(6, 10), per_frame=True),
  Case("context", 9, 3, 3, 12, 0.2, [1] + [3] * 5, batch=2, context=3, seed=6),
  Case("no_linear_branch", 7, 1, 3, 8, 0.5, [3] * 5, is_hybrid=False),
  Case("single_frames", 3, 1, 1, 5, 0.7, [1] * 9, latent=(6, 10), dim=30, heads=3, batch=2),
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_rollout(case):
  config = model(case.dim, case.heads, case.is_hybrid)
  rollout = Rollout(config, case.geometry(), case.batch, case.seed)
  for n, frames in enumerate(case.chunks):
    if n < case.context:
      rollout.run_context(frames)
      continue
    t = np.linspace(1000, 500, case.batch) - 23.25 * n
    if case.per_frame:
      t = t[:, None] - np.linspace(0, 300, frames)
    rollout.run_chunk(frames, t)
  # The case is worth its while: blocks were dropped, the rotary cap was passed, and frames left
  # the same position again and again.
  stream = rollout.streams[0]
  assert (stream.gap < np.inf) == rollout.stream_config.geometry.sparse
  start, last = stream.begun[-1]
  assert start > rollout.stream_config.geometry.rope_cap - last
  assert len({position for _, position in stream.left()}) < len(stream.left())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_rollout_of_drawn_sizes(seed):
  """Sizes that nobody chose."""
  rng = np.random.default_rng(1000 + seed)
  chunk, sink, previous = rng.integers(1, 5), rng.integers(0, 5), rng.integers(0, 5)
  window = sink + previous + chunk
  cap = max(window, previous + 2 * chunk) + rng.integers(0, 4)
  heads = int(rng.integers(1, 4))
  lengths = rng.integers(1, chunk + 1, 4).tolist()
  case = Case(
    f"seed {seed}",
    int(window),
    int(sink),
    int(chunk),
    int(cap),
    float(rng.uniform(0.05, 1)),
    [*lengths, *[int(chunk)] * (2 + int(cap // chunk))],
    latent=(2 * int(rng.integers(1, 7)), 2 * int(rng.integers(1, 7))),
    dim=heads * 2 * int(rng.integers(4, 17)),
    heads=heads,
    batch=int(rng.integers(1, 3)),
    block=int(rng.choice([5, 16, 64])),
    seed=seed,
  )
  rollout = Rollout(model(case.dim, heads), case.geometry(), case.batch, seed)
  for n, frames in enumerate(case.chunks):
    rollout.run_chunk(frames, np.linspace(1000, 500, case.batch) - 20.5 * n)


def test_streams_of_different_age():
  """A batch put together from streams that have run for 5 chunks and for 1."""
  case = CASES[0]
  config = model(case.dim, case.heads)
  old, young = (Rollout(config, case.geometry(), 2, seed=1) for _ in range(2))  # the same network
  for rollout, chunks in ((old, 5), (young, 1)):
    for n in range(chunks):
      rollout.run_chunk(2, np.array([900.0, 300.0]) - 50 * n - chunks)

  def join(name, a, b):
    """The first sample of a, the second of b."""
    if name in ("model", "geometry"):
      return a
    if name in ("k", "v", "memory", "text"):  # layers first
      return jax.tree.map(lambda x, y: jnp.concatenate([x[:, :1], y[:, 1:]], axis=1), a, b)
    return jnp.concatenate([a[:1], b[1:]])

  old.state = old.state._replace(
    **{
      name: join(name, value, getattr(young.state, name))
      for name, value in old.state._asdict().items()
    }
  )
  old.streams = [old.streams[0], young.streams[1]]
  for n in range(5):
    old.run_chunk(2, np.array([800.0, 500.0]) - n)
  assert [s.committed for s in old.streams] == [20, 12]
  assert all(s.left() for s in old.streams)


def test_context_within_forward():
  """Text given to the forward is used instead of the stream's."""
  case = CASES[0]
  rollout = Rollout(model(case.dim, case.heads), case.geometry(), 2, seed=2)
  for n in range(4):
    rollout.run_chunk(2, np.array([700.0, 300.0]) + n)
  chunk = _begin(rollout.stream_config, rollout.state, 2)
  x, context = rollout.draw_latents(2), rollout.draw_context(2)
  t = np.array([450, 999], np.float32)
  got = _denoise(rollout.stream_config, rollout.params, chunk, x, t, context)
  for b, stream in enumerate(rollout.streams):
    stream.begin(2)
    stream.context = context[b]
    np.testing.assert_allclose(got[b], stream.flow(x[b], t[b]), rtol=0, atol=FLOW)


# ---- Whole clips ----


@pytest.mark.parametrize("dim,heads,frames,is_hybrid", [(48, 2, 3, False), (30, 3, 4, True)])
def test_bidirectional(dim, heads, frames, is_hybrid):
  both = Sides(model(dim, heads, is_hybrid), seed=3)
  x, context = both.draw(2, frames, 8, 12, CHANNELS), both.draw_context(2)
  t = np.array([937.5, 12.25], np.float32)
  got = _predict(both.config, both.params, x, t, context)
  want = oracle.predict_flow(both.tensors, both.sizes, x, t, context)
  np.testing.assert_allclose(got, want, rtol=0, atol=FLOW)


@pytest.mark.parametrize(
  "frames,chunk,window,first_alone",
  [(6, 2, 3, False), (7, 3, -1, True), (7, 2, 4, True), (4, 1, 2, False)],
)
def test_block_causal(frames, chunk, window, first_alone):
  both = Sides(model(30, 3), seed=4)
  x, context = both.draw(2, frames, 6, 10, CHANNELS), both.draw_context(2)
  t = both.rng.uniform(0, 1000, (2, frames)).astype(np.float32)
  plan = causal.block_causal(frames, chunk, window, first_alone)
  got = _predict(both.config, both.params, x, t, context, plan=plan)
  mask = oracle.block_causal_mask(frames, chunk, 15, window, first_alone)
  want = oracle.predict_flow(both.tensors, both.sizes, x, t, context, mask)
  np.testing.assert_allclose(got, want, rtol=0, atol=FLOW)


@pytest.mark.parametrize("frames,chunk,is_augmented", [(4, 2, False), (6, 3, True)])
def test_teacher_forcing(frames, chunk, is_augmented):
  both = Sides(model(48, 3), seed=5)
  x, clean = both.draw(2, 2, frames, 6, 10, CHANNELS)
  context = both.draw_context(2)
  t = both.rng.uniform(0, 1000, (2, frames)).astype(np.float32)
  clean_t = both.rng.uniform(0, 100, (2, frames)).astype(np.float32) if is_augmented else None
  got = _predict(
    both.config,
    both.params,
    x,
    t,
    context,
    plan=causal.teacher_forcing(frames, chunk),
    clean=clean,
    clean_t=clean_t,
  )
  mask = oracle.teacher_forcing_mask(frames, chunk, 15)
  want = oracle.predict_flow(both.tensors, both.sizes, x, t, context, mask, clean, clean_t)
  np.testing.assert_allclose(got, want, rtol=0, atol=FLOW)
