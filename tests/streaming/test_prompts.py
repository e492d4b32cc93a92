"""Another prompt for a stream that runs: what is computed anew, and that nothing compiles again."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfjax.models.geometry import VARIANTS
from hfjax.streaming.latent_stream import LatentStream
from hfjax.streaming.replay import History
from tests.helpers import (
  assert_trees_close,
  compilations,
  context,
  latents,
  live_bytes,
  random_params,
  stream_config,
)

PARAMS = random_params()
OTHER = context(seed=9)


def begun(config, chunks, seed=2, image=0, **kwargs):
  stream = LatentStream(config, PARAMS, context(seed=seed), seeds=1, **kwargs)
  if image:
    stream.extend(latents(config, image))
  for _ in range(chunks):
    next(stream)
  return stream


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("sink", "chunk", "image"), [(3, 3, 0), (2, 3, 1), (0, 2, 0), (4, 3, 5)])
def test_the_same_prompt_again_changes_nothing_while_all_is_kept(variant, sink, chunk, image):
  """The oracle of a replay: the state that the stream has come to chunk by chunk."""
  window = {3: 9, 2: 8, 0: 4, 4: 10}[sink]
  config = stream_config(window=window, sink=sink, chunk=chunk, variant=variant)
  stream = begun(config, 5, image=image, kept=100)
  before = jax.tree.map(np.array, stream.state)
  stream.set_context(context())
  # Chunks were committed by another program, which rounds otherwise.
  assert_trees_close(stream.state, before, 2e-5)


def test_the_state_is_that_of_a_stream_which_had_the_prompt_from_the_start():
  config = stream_config(window=9, sink=3, chunk=3)
  stream = begun(config, 5, kept=100)
  shown = jnp.concatenate(list(stream.history.last), axis=1)
  stream.set_context(OTHER)
  given_all = LatentStream(config, PARAMS, OTHER, seeds=1)
  given_all.extend(shown)
  assert_trees_close(stream.state, given_all.state, 0)
  np.testing.assert_array_equal(next(stream), next(given_all))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_no_key_of_the_window_remembers_the_old_prompt(share):
  """Streams that saw the same latents under different prompts agree after the change."""
  config = stream_config(window=9, sink=3, chunk=3)
  shown = latents(config, 30)
  after = []
  for seed in (2, 5):
    stream = LatentStream(config, PARAMS, context(seed=seed), seeds=1, kept=12)
    stream.extend(shown)
    stream.set_context(OTHER, share=share)
    after.append(jax.tree.map(np.array, stream.state))
  a, b = after
  assert a.position == 30 and a.length == 9 and a.chunk == 10
  np.testing.assert_array_equal(a.latents, b.latents)
  np.testing.assert_array_equal(a.latents, np.concatenate([shown[:, :3], shown[:, -6:]], axis=1))
  if share == 0:
    assert_trees_close(a, b, 0)
    assert a.absorbed == 12 - 6  # what is kept beyond the window
  else:
    # The memory is still the old prompt's, and the window is read beside it.
    assert np.abs(a.memory.kv - b.memory.kv).max() > 1e-3
    assert a.absorbed == int(share * 21)


def test_the_first_layers_keys_do_not_depend_on_prompts_and_stay():
  """Keys of the first layer are of latents alone, so they must come back where they were."""
  config = stream_config(window=9, sink=3, chunk=3)
  stream = begun(config, 8)
  before = jax.tree.map(np.array, stream.state)
  stream.set_context(OTHER)
  np.testing.assert_allclose(stream.state.k[0], before.k[0], atol=1e-6)
  assert np.abs(stream.state.k[1] - before.k[1]).max() > 1e-3
  np.testing.assert_array_equal(stream.state.position, before.position)


def test_a_blend_moves_evenly_and_ends_at_the_new_prompt():
  config = stream_config(window=9, sink=3, chunk=3)
  stream, hard = begun(config, 4), begun(config, 4)
  old = np.array(stream.context)
  stream.set_context(OTHER, blend=4)
  seen = []
  for _ in range(5):
    next(stream)
    seen.append(np.array(stream.context))
  end = np.pad(OTHER, ((0, 0), (0, 1), (0, 0)))
  for i, x in enumerate(seen):
    np.testing.assert_allclose(x, old + min(1, (i + 1) / 4) * (end - old), atol=1e-6)
  hard.set_context(OTHER)
  assert_trees_close(stream.state.text, hard.state.text, 1e-6)


def test_a_new_change_in_the_middle_of_one_starts_from_there():
  stream = begun(stream_config(), 1)
  stream.set_context(OTHER, blend=2)
  next(stream)
  middle = np.array(stream.context)
  stream.set_context(context(seed=20), blend=2)
  next(stream)
  want = (middle + np.pad(context(seed=20), ((0, 0), (0, 1), (0, 0)))) / 2
  np.testing.assert_allclose(stream.context, want, atol=1e-6)


def test_a_change_of_prompt_compiles_nothing_and_keeps_memory():
  config = stream_config(window=8, sink=2, chunk=3)
  stream = LatentStream(config, PARAMS, context(), seeds=1)
  stream.warm_up()
  for _ in range(12):
    next(stream)
  for share in (0.0, 0.5):
    stream.set_context(OTHER, blend=2, share=share)
    next(stream), next(stream)
  next(stream).block_until_ready()
  gc.collect()
  before = live_bytes()
  with compilations() as compiled:
    for i in range(10):
      # Prompts of all lengths, hard and blended.
      stream.set_context(context(rows=1 + i % 6, seed=i), blend=2 * (i % 2), share=i % 3 / 4)
      for _ in range(3):
        x = next(stream)
    x.block_until_ready()
  big = [c for c in compiled if any(n in c for n in ("advance", "context", "restart", "text"))]
  assert big == [], big
  del x
  gc.collect()
  assert live_bytes()[0] <= before[0]


def test_warming_up_leaves_no_trace():
  config = stream_config(window=9, sink=3, chunk=3)
  cold, warm = begun(config, 0), begun(config, 0)
  warm.warm_up()
  for _ in range(5):
    np.testing.assert_array_equal(next(cold), next(warm))
  assert_trees_close(cold.state, warm.state, 0)
  with pytest.raises(ValueError, match="15 frames have been made already"):
    warm.warm_up()


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    ({"blend": -1}, "The blend is -1 chunks"),
    ({"blend": 1.5}, "The blend is 1.5 chunks"),
    ({"share": 2}, "share of the memory is 2"),
    ({"share": float("nan")}, "share of the memory is nan"),
    ({"context": context(batch=2)}, "has 1 samples, and the new text 2"),
    ({"context": jnp.zeros((1, 5, 7))}, r"shape \(1, 5, 7\)"),
  ],
)
def test_changes_that_cannot_be_are_refused(arguments, sentence):
  stream = begun(stream_config(), 1)
  before = jax.tree.map(np.array, stream.state)
  with pytest.raises(ValueError, match=sentence):
    stream.set_context(**{"context": OTHER, **arguments})
  assert_trees_close(stream.state, before, 0)


@given(
  sizes=st.lists(st.integers(1, 4), min_size=1, max_size=12),
  sink=st.integers(0, 6),
  frames=st.integers(1, 12),
  most=st.one_of(st.none(), st.integers(1, 12)),
)
def test_history_gives_the_sink_and_the_end_without_overlap(sizes, sink, frames, most):
  history, number = History(sink, frames), 0
  for size in sizes:
    history.add(np.arange(number, number + size)[None])
    number += size
  first, last = ([int(x) for piece in p for x in piece[0]] for p in history.pieces(most))
  assert last == list(range(number - len(last), number))
  assert first == list(range(min(sink, number - len(last))))
  if most is None:
    assert len(last) >= min(frames, number)
  else:
    assert len(last) <= most
  # Nothing is kept that is not asked for, but the rest of a piece.
  assert sum(p.shape[1] for p in history.last) < frames + 4
  assert sum(p.shape[1] for p in history.first) < sink + 4
