"""Small models with parameters of realistic size, and streams of them."""

import contextlib
import functools
import math
import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np

from hfjax.models import wan
from hfjax.models.geometry import Geometry
from hfjax.models.presets import WanConfig
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.state import begin_chunk, init_state
from hfjax.streaming.step import chunk_step, commit, denoise

MODEL = WanConfig(
  dim=32, ffn_dim=48, heads=2, layers=2, in_dim=4, out_dim=4, text_dim=12, text_len=6,
  freq_dim=16, linear=True,
)  # fmt: skip
# 6 tokens a frame, and blocks of 8: every buffer ends in a ragged block.
GRID = {"height": 4, "width": 6, "block": 8}

# The transitions, compiled.
begin = jax.jit(begin_chunk, static_argnums=(0, 2))
flow = jax.jit(denoise, static_argnums=0)
close = jax.jit(commit, static_argnums=0)
advance = jax.jit(chunk_step, static_argnums=0)


@functools.cache
def shapes_of(init, config):
  """Of a network's parameters; many tests ask for the same, and tracing takes a while."""
  return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def random_params(config=MODEL, seed=0):
  """Parameters none of which is zero or one throughout: as they begin, and noise of 0.1.

  Drawn by NumPy, as JAX would run the network and compile a program for every shape.
  """
  draw, wide = np.random.default_rng(seed), math.hypot(0.1, config.dim**-0.5)

  def leaf(path, like):
    names = [key.key for key in path]
    matrix = names[0] == "blocks" and names[-1] == "kernel" and "linear_proj" not in names
    large = matrix or names[0] == "patch_embedding" or names[-1] == "modulation"
    x = draw.normal(float(names[-1] == "scale"), wide if large else 0.1, like.shape)
    return jnp.asarray(x, like.dtype)

  return jax.tree_util.tree_map_with_path(leaf, shapes_of(wan.init_params, config))


def drawn_params(init, config, seed=0):
  """Parameters of any network, for tests to which it does not matter how they begin."""
  draw = np.random.default_rng(seed)

  def leaf(path, like):
    inputs = like.shape[path[0].key == "blocks" : -1]  # without layers, which are stacked
    spread = math.prod(inputs) ** -0.5 if path[-1].key in ("kernel", "embedding") else 0.1
    return jnp.asarray(draw.normal(path[-1].key == "scale", spread, like.shape), like.dtype)

  return jax.tree_util.tree_map_with_path(leaf, shapes_of(init, config))


def stream_config(model=MODEL, steps=(1000, 500), dtype="float32", remat=False, **geometry):
  """A stream whose geometry differs from the small default in the given fields."""
  sizes = {"ratio": 0.4, **GRID, **geometry}
  return StreamConfig(model, Geometry(**sizes), steps=steps, dtype=dtype, remat=remat)


def context(batch=1, rows=5, seed=2, model=MODEL):
  return jax.random.normal(jax.random.key(seed), (batch, rows, model.text_dim))


def latents(config, frames, batch=1, seed=3):
  g = config.geometry
  shape = (batch, frames, g.height, g.width, config.model.in_dim)
  return jax.random.normal(jax.random.key(seed), shape)


def fresh_state(config, params, batch=1, seed=2):
  text = wan.text_keys(config.model, params, context(batch, seed=seed), config.compute_dtype)
  return init_state(config, text)


def assert_trees_close(a, b, atol):
  """Every leaf of two trees within `atol`; structures equal."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), 0, atol)


@contextlib.contextmanager
def compilations():
  """Names of the programs compiled inside, counted where XLA is called."""
  seen = []
  active = True

  def listen(event, duration, **kwargs):
    del duration
    if active and event == "/jax/core/compile/backend_compile_duration":
      seen.append(kwargs.get("fun_name", event))

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield seen
  finally:
    active = False


def live_bytes():
  """Bytes and number of the arrays that are alive."""
  arrays = jax.live_arrays()
  return sum(x.nbytes for x in arrays), len(arrays)


def interleave(x):
  """Channel pairs from halves to neighbours, the order of published weights."""
  a, b = jnp.split(jnp.asarray(x), 2, axis=-1)
  return jnp.stack([a, b], axis=-1).reshape(x.shape)


@contextlib.contextmanager
def files_at_most(count):
  """No file of this process grows beyond so many bytes: as on a disk that fills up."""
  before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)
