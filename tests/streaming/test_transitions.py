"""Properties of begin, denoise and commit; numbers are held to oracles elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.models import causal, wan
from hfjax.models.geometry import VARIANTS
from hfjax.streaming.latent_stream import sample_keys
from hfjax.streaming.rollout import generate
from hfjax.streaming.state import begin_chunk, init_state
from hfjax.streaming.step import ChunkNoise, chunk_step, commit, denoise, draw_noise
from tests.helpers import (
  MODEL,
  advance,
  assert_trees_close,
  begin,
  close,
  context,
  flow,
  fresh_state,
  latents,
  random_params,
  stream_config,
)

PARAMS = random_params()


def commit_frames(config, x, batch=1, cuts=None):
  """The state after committing clean latents in chunks of the given lengths."""
  state, at = fresh_state(config, PARAMS, batch), 0
  for frames in cuts or [config.geometry.chunk] * (x.shape[1] // config.geometry.chunk):
    state = close(config, PARAMS, begin(config, state, frames), x[:, at : at + frames])
    at += frames
  return state


def test_with_all_blocks_and_an_unbounded_window_hybrid_equals_dense():
  """For as many frames as the rotary cap allows nothing leaves, and nothing is dropped."""
  config = stream_config(ratio=1.0, window=-1, rope_cap=12)
  x = latents(config, 12)
  plan = causal.block_causal(12, 3)
  forward = jax.jit(
    lambda t: wan.predict_flow(MODEL, PARAMS, x, t, context(), plan=plan)  # dense, causal
  )
  want = forward(jnp.zeros((1, 12)))
  state = fresh_state(config, PARAMS)
  for n in range(4):
    part = x[:, 3 * n : 3 * n + 3]
    chunk = begin(config, state)
    got = flow(config, PARAMS, chunk, part, jnp.zeros((1,)))
    np.testing.assert_allclose(got, want[:, 3 * n : 3 * n + 3], atol=5e-6)
    state = close(config, PARAMS, chunk, part)
  # The next chunk no longer fits: frames have left, and it does not equal a longer dense clip.
  longer = latents(config, 15, seed=8).at[:, :12].set(x)
  plan = causal.block_causal(15, 3)
  dense = jax.jit(lambda t: wan.predict_flow(MODEL, PARAMS, longer, t, context(), plan=plan))(
    jnp.zeros((1, 15))
  )
  got = flow(config, PARAMS, begin(config, state), longer[:, 12:], jnp.zeros((1,)))
  assert np.abs(got - dense[:, 12:]).max() > 1e-3


@pytest.mark.parametrize("variant", ["paper", "reference_train", "reference_infer"])
def test_the_sparse_path_with_every_block_equals_the_dense_one(variant):
  """A ratio just below one still goes through block lists; with one key block it keeps all."""
  sizes = {"block": 512, "window": 7, "sink": 2, "chunk": 2, "variant": variant}
  sparse, dense = (stream_config(ratio=r, **sizes) for r in (0.9999, 1.0))
  x = latents(sparse, 10)
  a, b = (commit_frames(c, x) for c in (sparse, dense))
  if variant == "paper":
    # Past and current are a block each, of which one is kept; compare before there is a past.
    a, b = (commit_frames(c, x[:, :2]) for c in (sparse, dense))
  np.testing.assert_allclose(a.k, b.k, atol=5e-6)
  np.testing.assert_allclose(a.v, b.v, atol=5e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_run_together_as_one_by_one(variant):
  config = stream_config(window=7, sink=2, chunk=2, variant=variant)
  x = latents(config, 12, batch=3)
  together = commit_frames(config, x, batch=3)
  text = wan.text_keys(MODEL, PARAMS, context(3))
  for i in range(3):
    state = init_state(config, jax.tree.map(lambda y, i=i: y[:, i : i + 1], text))
    for n in range(6):
      state = close(config, PARAMS, begin(config, state), x[i : i + 1, 2 * n : 2 * n + 2])
    part = together._replace(
      k=together.k[:, i : i + 1],
      v=together.v[:, i : i + 1],
      memory=jax.tree.map(lambda y, i=i: y[:, i : i + 1], together.memory),
      text=jax.tree.map(lambda y, i=i: y[:, i : i + 1], together.text),
      **{
        name: getattr(together, name)[i : i + 1]
        for name in ("latents", "absorbed", "length", "position", "chunk")
      },
    )
    assert_trees_close(part, state, 1e-5)


def test_streams_of_different_age_share_a_batch():
  config = stream_config(window=7, sink=2, chunk=2)
  young, old = (commit_frames(config, latents(config, n, seed=n)) for n in (4, 14))
  axis = {"k": 1, "v": 1, "memory": 1, "text": 1}
  both = type(young)(
    **{
      name: jax.tree.map(
        lambda a, b, n=name: jnp.concatenate([a, b], axis=axis.get(n, 0)),
        *(getattr(s, name) for s in (young, old)),
      )
      for name in young._fields
    }
  )
  x, t = latents(config, 2, batch=2, seed=5), jnp.array([700.0, 300.0])
  got = flow(config, PARAMS, begin(config, both), x, t)
  for i, state in enumerate((young, old)):
    want = flow(config, PARAMS, begin(config, state), x[i : i + 1], t[i : i + 1])
    np.testing.assert_allclose(got[i], want[0], atol=5e-6)


def test_frames_leave_one_by_one_after_a_single_first_frame():
  """The sink is the first S frames however they were chunked; the rest leaves as it must."""
  config = stream_config(window=8, sink=3, chunk=3)
  x = latents(config, 13)
  state, at = fresh_state(config, PARAMS), 0
  absorbed, lengths = [], []
  for frames in (1, 3, 3, 3, 3):
    chunk = begin(config, state, frames)
    absorbed.append(int(chunk.stream.absorbed[0]))
    state = close(config, PARAMS, chunk, x[:, at : at + frames])
    lengths.append(int(state.length[0]))
    at += frames
  # Sink 3 and previous 2: of 1, 4, 7, 10 frames 0, 0, 2, 5 have left.
  assert absorbed == [0, 0, 0, 2, 5]
  assert lengths == [1, 4, 7, 8, 8]
  assert int(state.position[0]) == 13 and int(state.chunk[0]) == 5
  # The window's latents tell which frames it holds: the sink, then the latest.
  np.testing.assert_array_equal(state.latents[:, :3], x[:, :3])
  np.testing.assert_array_equal(state.latents[:, 3:], x[:, 8:13])


def test_the_sink_does_not_depend_on_how_frames_were_chunked():
  """Keys of the first layer depend on their own frame alone: sink and newest frame are the same."""
  config = stream_config(window=8, sink=3, chunk=3)
  x = latents(config, 7)
  a, b = (commit_frames(config, x, cuts=cuts) for cuts in ([1, 3, 3], [3, 3, 1]))
  assert (int(a.length[0]), int(b.length[0])) == (7, 6)  # frame 3 left at the third chunk of b
  for i, j in ((0, 0), (1, 1), (2, 2), (6, 5)):
    np.testing.assert_allclose(a.k[0, :, i], b.k[0, :, j], atol=1e-6)
    np.testing.assert_array_equal(a.latents[:, i], b.latents[:, j])


def test_denoising_reads_and_writes_nothing():
  config = stream_config()
  chunk = begin(config, commit_frames(config, latents(config, 6)))
  before = jax.tree.map(np.array, chunk)
  x = latents(config, 3)
  one = flow(config, PARAMS, chunk, x, jnp.array([500.0]))
  two = flow(config, PARAMS, chunk, x, jnp.array([500.0]))
  np.testing.assert_array_equal(one, two)
  assert_trees_close(before, chunk, 0)


def test_gradients_flow_through_denoising_and_stop_at_history():
  config = stream_config(window=7, sink=2, chunk=2)
  state = commit_frames(config, latents(config, 10))
  assert int(begin(config, state).stream.absorbed[0]) > 0
  x = latents(config, 2, seed=4)

  def loss(params, state, text):
    chunk = begin_chunk(config, state)
    return (denoise(config, params, chunk, x, jnp.array([400.0]), text) ** 2).sum()

  grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2), allow_int=True))(PARAMS, state, context())
  for path, g in jax.tree_util.tree_flatten_with_path(grads[0])[0]:
    assert np.any(g), jax.tree_util.keystr(path)
  history = grads[1]._replace(text=None)
  floats = [g for g in jax.tree.leaves(history) if jnp.issubdtype(g.dtype, jnp.floating)]
  assert floats and not any(np.any(g) for g in floats)
  assert np.any(grads[2])  # text given as context carries gradients


def test_recomputing_layers_changes_no_gradient():
  config = stream_config(window=7, sink=2, chunk=2)
  state = commit_frames(config, latents(config, 8))
  x = latents(config, 2, seed=4)

  def grad(config):
    def loss(params):
      chunk = begin_chunk(config, state)
      return (denoise(config, params, chunk, x, jnp.array([400.0]), context()) ** 2).sum()

    return jax.jit(jax.grad(loss))(PARAMS)

  again = dataclasses.replace(config, remat=True)
  x_t = (latents(config, 2, seed=4), jnp.array([400.0]))
  chunk = begin(config, state)

  def count(c):
    traced = str(jax.make_jaxpr(jax.grad(lambda p: denoise(c, p, chunk, *x_t).sum()))(PARAMS))
    return traced.count("remat") + traced.count("checkpoint")

  assert count(again) > count(config)  # the plain-JAX attention recomputes in both
  plain = grad(config)
  scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(plain))
  assert_trees_close(plain, grad(again), 1e-6 * scale)


def test_half_precision_stays_near_single():
  sizes = {"window": 7, "sink": 2, "chunk": 2, "ratio": 1.0}
  single, half = (stream_config(dtype=d, **sizes) for d in ("float32", "bfloat16"))
  x = latents(single, 10)
  a, b = (commit_frames(c, x) for c in (single, half))
  assert b.k.dtype == jnp.bfloat16 and b.memory.kv.dtype == jnp.float32
  part, t = latents(single, 2, seed=6), jnp.array([600.0])
  flows = [flow(c, PARAMS, begin(c, s), part, t) for c, s in ((single, a), (half, b))]
  # 8 bits through two blocks and a memory of rounded keys; flows are of order one.
  np.testing.assert_allclose(*flows, atol=0.15)


def test_noise_derives_from_seed_sample_and_chunk_number_alone():
  config = stream_config(steps=(1000, 750, 500))
  two = sample_keys(7, 2)
  noise = draw_noise(config, two, jnp.array([0, 5]))
  assert noise.start.shape == (2, 3, 4, 6, 4) and noise.again.shape == (2, 2, 3, 4, 6, 4)
  later = draw_noise(config, two, jnp.array([1, 5]))
  assert np.abs(later.start[0] - noise.start[0]).max() > 0.1
  np.testing.assert_array_equal(later.start[1], noise.start[1])
  one = draw_noise(config, sample_keys([7], 1), jnp.array([0]))
  np.testing.assert_array_equal(one.start[0], noise.start[0])
  alone = draw_noise(config, two[1:], jnp.array([5]))
  np.testing.assert_array_equal(alone.again[:, 0], noise.again[:, 1])
  draws = np.stack([noise.start, *noise.again]).reshape(6, -1)
  assert np.abs(np.corrcoef(draws) - np.eye(6)).max() < 0.3
  assert np.abs(draws.mean()) < 0.1 and np.abs(draws.std() - 1) < 0.1


def test_a_chunk_is_its_transitions_in_order():
  """From noise through every step to the commit, written out."""
  config = stream_config(steps=(1000, 750, 250))
  state = commit_frames(config, latents(config, 3))
  noise = draw_noise(config, sample_keys(1, 1), state.chunk)
  after, x0 = advance(config, PARAMS, state, noise)
  chunk, x, s = begin(config, state), noise.start, config.schedule
  for i, t in enumerate(config.timesteps):
    t = jnp.full((1,), t)
    clean = s.x0_from_flow(flow(config, PARAMS, chunk, x, t), x, t)
    if i < 2:
      x = s.add_noise(clean, noise.again[i], jnp.full((1,), config.timesteps[i + 1]))
  np.testing.assert_allclose(x0, clean, atol=5e-6)
  assert_trees_close(after, close(config, PARAMS, chunk, clean), 1e-5)


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"window": 8}, r"configuration \(window 9 against 8\)"),
    ({"sink": 2}, r"\(sink 3 against 2\)"),  # the same shapes, and other meanings
    ({"dtype": "bfloat16"}, "dtype float32 against bfloat16"),
    ({"height": 6, "ratio": 0.5}, "height 4 against 6; ratio 0.4 against 0.5"),
    ({"variant": "reference_dense"}, "variant paper against reference_dense"),
    ({"model": dataclasses.replace(MODEL, heads=4)}, "heads 2 against 4"),
  ],
)
def test_a_state_of_another_configuration_is_refused(change, sentence):
  state = fresh_state(stream_config(), PARAMS)
  with pytest.raises(ValueError, match=sentence):
    begin_chunk(stream_config(**change), state)
  if "model" not in change and "dtype" not in change:
    chunk = begin(stream_config(), state)
    other = stream_config(**change)
    with pytest.raises(ValueError, match="begun with another configuration|chunk's latents have"):
      denoise(other, PARAMS, chunk, latents(other, 3), jnp.zeros((1,)))


def test_a_state_that_was_donated_is_refused():
  config = stream_config()
  state = fresh_state(config, PARAMS)
  generate(config, PARAMS, state, sample_keys(0, 1), 1)
  for call in (
    lambda: begin_chunk(config, state),
    lambda: generate(config, PARAMS, state, sample_keys(0, 1), 1),
  ):
    with pytest.raises(ValueError, match="This state is used up"):
      call()


@pytest.mark.parametrize(
  "t", [jnp.zeros(()), jnp.zeros((2,)), jnp.zeros((1, 2)), jnp.zeros((1, 18)), jnp.zeros((1, 1))]
)
def test_times_of_another_shape_are_refused(t):
  config = stream_config()
  chunk = begin(config, fresh_state(config, PARAMS))
  with pytest.raises(ValueError, match="The times have shape"):
    denoise(config, PARAMS, chunk, latents(config, 3), t)


def test_parameters_of_another_model_are_refused():
  config = stream_config()
  chunk = begin(config, fresh_state(config, PARAMS))
  x, t = latents(config, 3), jnp.zeros((1,))
  blocks = PARAMS["blocks"]
  less = {k: v for k, v in blocks["self_attn"].items() if k != "linear_proj"}
  for params, sentence in (
    ({**PARAMS, "blocks": {**blocks, "self_attn": less}}, "linear_proj/kernel is missing"),
    ({**PARAMS, "new": jnp.ones(1)}, "new is not of this model"),
    ({"params": PARAMS}, "is missing"),
    ({}, "is missing; .* and 35 more"),
    (jax.tree.map(lambda p: p.astype(jnp.int8), PARAMS), "is int8"),
    (random_params(dataclasses.replace(MODEL, heads=4)), r"instead of \[2, 2, 16\]"),
  ):
    with pytest.raises(ValueError, match=sentence):
      denoise(config, params, chunk, x, t)


def test_wrong_chunks_are_refused():
  config = stream_config()
  state = fresh_state(config, PARAMS)
  with pytest.raises(ValueError, match="chunk of 4 frames was begun; this geometry takes 1 to 3"):
    begin_chunk(config, state, 4)
  chunk = begin(config, state)
  with pytest.raises(ValueError, match=r"\(1, 2, 4, 6, 4\); the chunk .* \(1, 3, 4, 6, 4\)"):
    denoise(config, PARAMS, chunk, latents(config, 2), jnp.zeros((1,)))
  with pytest.raises(ValueError, match="chunk's latents have shape"):
    commit(config, PARAMS, chunk, latents(config, 3, batch=2))
  with pytest.raises(ValueError, match=r"\(1, 5, 11\)"):
    denoise(config, PARAMS, chunk, latents(config, 3), jnp.zeros((1,)), context()[..., :11])
  noise = ChunkNoise(latents(config, 3), jnp.zeros((3, 1, 3, 4, 6, 4)))
  with pytest.raises(ValueError, match="noise to be added again has shape"):
    chunk_step(config, PARAMS, state, noise)
  with pytest.raises(ValueError, match="is for 2 samples and the latents are for 1"):
    denoise(config, PARAMS, chunk, latents(config, 3), jnp.zeros((1,)), context(2))
  text = wan.text_keys(MODEL, PARAMS, context())
  with pytest.raises(ValueError, match=r"Text keys have shape \(1, 1, 6, 2, 16\)"):
    init_state(config, jax.tree.map(lambda y: y[:1], text))
