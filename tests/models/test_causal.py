import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.models import causal, wan
from tests.helpers import (
  MODEL,
  begin,
  close,
  context,
  flow,
  fresh_state,
  latents,
  random_params,
  stream_config,
)


def allowed(plan, frames):
  """The plan as a bool matrix of query frames by key frames."""
  mask = np.zeros((frames, frames), bool)
  for queries, keys in plan:
    for span in keys:
      mask[slice(*queries), slice(*span)] = True
  return mask


@pytest.mark.parametrize(("frames", "chunk"), [(3, 3), (12, 3), (10, 2), (4, 1)])
@pytest.mark.parametrize("window", [-1, 3, 5])
def test_block_causal_follows_the_rule(frames, chunk, window):
  """Spec section 3: key j is seen up to the end of the query's chunk, back to the window."""
  got = allowed(causal.block_causal(frames, chunk, window), frames)
  for i in range(frames):
    end = (i // chunk + 1) * chunk
    for j in range(frames):
      assert got[i, j] == (j < end and (window == -1 or j >= end - window))


def test_a_first_frame_of_its_own():
  assert causal.chunk_spans(7, 3, first_alone=True) == ((0, 1), (1, 4), (4, 7))
  got = allowed(causal.block_causal(7, 3, first_alone=True), 7)
  assert list(got.sum(axis=1)) == [1, 4, 4, 4, 7, 7, 7]


def test_teacher_forcing_follows_the_rule():
  """Noisy chunk b sees itself and the clean chunks before it; clean chunks see no noise."""
  f, c = 6, 2
  got = allowed(causal.teacher_forcing(f, c), 2 * f)
  for i in range(2 * f):
    for j in range(2 * f):
      chunk = i % f // c
      if i < f:
        want = j < (chunk + 1) * c
      else:
        want = j < chunk * c or (j >= f and (j - f) // c == chunk)
      assert got[i, j] == want, (i, j)


@pytest.mark.parametrize(
  ("call", "sentence"),
  [
    (lambda: causal.block_causal(7, 3), "7 frames do not divide into chunks of 3"),
    (lambda: causal.chunk_spans(6, 3, True), "multiple of 3 plus 1"),
    (lambda: causal.block_causal(6, 3, 2), "window of 2 frames is shorter than a chunk of 3"),
    (lambda: causal.teacher_forcing(5, 3), "5 frames"),
  ],
)
def test_impossible_plans_are_refused(call, sentence):
  with pytest.raises(ValueError, match=sentence):
    call()


@pytest.mark.parametrize("window", [-1, 7])
def test_cached_chunks_equal_the_masked_clip(window):
  """Dense attention through the window, chunk by chunk, equals one causal forward of the clip."""
  frames, chunk = 12, 3
  config = stream_config(chunk=chunk, window=window, sink=0, variant="reference_dense")
  params, x = random_params(), latents(config, frames)
  plan = causal.block_causal(frames, chunk, window)
  t = jnp.zeros((1, frames))  # clean keys, as commit makes them
  want = jax.jit(lambda: wan.predict_flow(MODEL, params, x, t, context(), plan=plan))()
  state = fresh_state(config, params)
  for n in range(frames // chunk):
    part = x[:, n * chunk : (n + 1) * chunk]
    begun = begin(config, state)
    got = flow(config, params, begun, part, jnp.zeros((1,)))
    np.testing.assert_allclose(got, want[:, n * chunk : (n + 1) * chunk], atol=5e-6)
    state = close(config, params, begun, part)


def test_teacher_forcing_equals_noisy_chunks_on_a_clean_past():
  frames, chunk = 6, 2
  config = stream_config(chunk=chunk, window=-1, sink=0, variant="reference_dense")
  params = random_params()
  clean, noisy = latents(config, frames), latents(config, frames, seed=9)
  t = jnp.repeat(jnp.array([[900.0, 400, 50]]), chunk, axis=1)
  plan = causal.teacher_forcing(frames, chunk)
  forward = jax.jit(
    lambda: wan.predict_flow(MODEL, params, noisy, t, context(), plan=plan, clean=clean)
  )
  want = forward()
  assert want.shape == noisy.shape
  state = fresh_state(config, params)
  for n in range(frames // chunk):
    span = slice(n * chunk, (n + 1) * chunk)
    begun = begin(config, state)
    got = flow(config, params, begun, noisy[:, span], t[:, span])
    np.testing.assert_allclose(got, want[:, span], atol=5e-6)
    state = close(config, params, begun, clean[:, span])
