"""Long runs: one compilation, constant memory, and the same numbers however they are divided."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.models.geometry import VARIANTS
from hfjax.streaming.latent_stream import LatentStream, sample_keys
from hfjax.streaming.rollout import generate
from tests.helpers import (
  assert_trees_close,
  compilations,
  context,
  fresh_state,
  latents,
  live_bytes,
  random_params,
  stream_config,
)

PARAMS = random_params()


@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_equals_stepping(variant):
  config = stream_config(window=7, sink=2, chunk=2, variant=variant)
  stream = LatentStream(config, PARAMS, context(2), seeds=11)
  stepped = np.concatenate([next(stream) for _ in range(7)], axis=1)
  state, x = generate(config, PARAMS, fresh_state(config, PARAMS, 2), sample_keys(11, 2), 7)
  assert x.shape == (2, 14, 4, 6, 4)
  np.testing.assert_allclose(x, stepped, atol=1e-6)
  assert_trees_close(state, stream.state, 1e-6)


def test_dividing_a_run_changes_nothing():
  """The same compiled step gives the same bits, and generate continues where it stopped."""
  config = stream_config(window=7, sink=2, chunk=2)
  keys = sample_keys(3, 1)
  whole, x = generate(config, PARAMS, fresh_state(config, PARAMS), keys, 6)
  first, a = generate(config, PARAMS, fresh_state(config, PARAMS), keys, 3)
  second, b = generate(config, PARAMS, first, keys, 3)
  np.testing.assert_array_equal(np.concatenate([a, b], axis=1), x)
  assert_trees_close(second, whole, 0)
  runs = []
  for _ in range(2):
    stream = LatentStream(config, PARAMS, context(), seeds=3)
    runs.append(np.concatenate([next(stream) for _ in range(4)], axis=1))
  np.testing.assert_array_equal(*runs)
  assert np.abs(next(LatentStream(config, PARAMS, context(), seeds=4)) - runs[0][:, :2]).max() > 0.1


def test_two_hundred_chunks_compile_once_in_constant_memory():
  config = stream_config()
  stream = LatentStream(config, PARAMS, context(), seeds=0)
  for _ in range(10):  # until all latents are there that are kept
    x = next(stream)
  x.block_until_ready()
  gc.collect()
  with compilations() as compiled:
    before = live_bytes()
    for _ in range(200):
      x = next(stream)
      assert bool(jnp.isfinite(x).all())
    x.block_until_ready()
    gc.collect()
    after = live_bytes()
  # The check of each chunk compiles nothing after its first use either.
  assert [c for c in compiled if "advance" in c or "chunk" in c] == []
  assert len(compiled) <= 2, compiled
  assert after == before
  assert int(stream.state.chunk[0]) == 210 and int(stream.state.absorbed[0]) == 3 * 210 - 9


def test_the_count_of_compilations_counts():
  """The guard above sees a program that is compiled anew."""
  with compilations() as compiled:
    jax.jit(lambda x: x * 1.2345 + 1)(jnp.ones(3)).block_until_ready()
  assert compiled


def test_the_state_is_donated():
  config = stream_config()
  stream = LatentStream(config, PARAMS, context())
  old = stream.state
  next(stream)
  assert old.k.is_deleted() and old.memory.kv.is_deleted() and not stream.state.k.is_deleted()


def test_context_enters_through_the_same_transitions():
  """Seven frames enter as 1 + 3 + 3; a stream continues from them, memory included."""
  config = stream_config(window=8, sink=3, chunk=3)
  x = latents(config, 13)
  stream = LatentStream(config, PARAMS, context(), seeds=1)
  stream.extend(x)
  assert int(stream.state.position[0]) == 13 and int(stream.state.chunk[0]) == 5
  assert int(stream.state.absorbed[0]) == 5
  np.testing.assert_array_equal(stream.state.latents[:, :3], x[:, :3])
  clips = []
  for y in (x, latents(config, 13, seed=30).at[:, -8:].set(x[:, -8:]).at[:, :3].set(x[:, :3])):
    s = LatentStream(config, PARAMS, context(), seeds=1)
    s.extend(y)
    clips.append(np.array(next(s)))
  # The two differ only in frames that have left the window, and it shows.
  assert np.abs(clips[0] - clips[1]).max() > 1e-4
  with pytest.raises(ValueError, match="at least one frame"):
    stream.extend(x[:, :0])


def test_a_single_image_starts_a_stream():
  config = stream_config()
  stream = LatentStream(config, PARAMS, context(), seeds=1)
  stream.extend(latents(config, 1))
  assert next(stream).shape == (1, 3, 4, 6, 4)
  assert int(stream.state.position[0]) == 4


def test_seeds():
  config = stream_config()
  a = next(LatentStream(config, PARAMS, jnp.concatenate([context()] * 2), seeds=5))
  assert np.abs(a[0] - a[1]).max() > 0.1  # one seed for all: each sample has its own noise
  b = next(LatentStream(config, PARAMS, context(), seeds=[5]))
  np.testing.assert_allclose(a[:1], b, atol=2e-5)
  for seeds, sentence in (
    ([1, 2], "2 seeds were given for 1 samples"), (1.5, "seeds are 1.5; give a whole number"),
    ([1.5], "must be whole numbers"), ("a", "seeds are 'a'"), (None, "seeds are None"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=sentence):
      LatentStream(config, PARAMS, context(), seeds=seeds)
  c = next(LatentStream(config, PARAMS, context(), seeds=np.int64(5)))
  np.testing.assert_array_equal(b, c)
  with pytest.raises(ValueError, match="0 chunks"):
    generate(config, PARAMS, fresh_state(config, PARAMS), sample_keys(0, 1), 0)
