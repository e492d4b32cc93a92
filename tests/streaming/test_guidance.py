"""Guided streams, and chunks solved from noise, against loops over streams of a single text."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.diffusion.solvers import MultistepSolver
from hfjax.models import wan
from hfjax.streaming.latent_stream import LatentStream, sample_keys
from hfjax.streaming.rollout import generate
from hfjax.streaming.snapshot import from_arrays, to_arrays
from hfjax.streaming.state import begin_chunk, init_state
from hfjax.streaming.step import ChunkNoise, chunk_step, draw_noise
from tests.helpers import (
  MODEL,
  assert_trees_close,
  begin,
  close,
  compilations,
  context,
  flow,
  fresh_state,
  latents,
  random_params,
  stream_config,
)
from tests.reference import unipc_numpy

PARAMS = random_params()
SOLVER = MultistepSolver("unipc", 5, 3.0)
NEGATIVE = context(1, rows=2, seed=40)
SEEDS = [4, 9]


def configured(solver=SOLVER, guidance=3.0, interval=(0, 1000), **kwargs):
  return dataclasses.replace(
    stream_config(**kwargs), solver=solver, guidance=guidance, guidance_interval=interval
  )


def begun(config, batch=2, **kwargs):
  negative = NEGATIVE if config.texts == 2 else None
  return LatentStream(
    config, PARAMS, context(batch), seeds=SEEDS[:batch], negative=negative, **kwargs
  )


class Separate:
  """The oracle: a state for each text, of streams that know of one text only."""

  def __init__(self, config, texts):
    self.config = config
    self.single = dataclasses.replace(config, solver=None, guidance=1.0)
    self.states = [init_state(self.single, wan.text_keys(MODEL, PARAMS, t)) for t in texts]
    self.keys = sample_keys(SEEDS[: texts[0].shape[0]], texts[0].shape[0])

  def denoise(self):
    """Clean latents of the next chunk."""
    chunks = [begin(self.single, state) for state in self.states]
    noise = draw_noise(self.single, self.keys, self.states[0].chunk)

    def velocity(x, t):
      x, t = jnp.asarray(x, jnp.float32), jnp.full(len(x), t, jnp.float32)
      flows = [np.asarray(flow(self.single, PARAMS, c, x, t), np.float64) for c in chunks]
      if len(flows) == 1:
        return flows[0]
      low, high = self.config.guidance_interval
      scale = self.config.guidance if low <= t[0] <= high else 1.0
      return flows[1] + scale * (flows[0] - flows[1])

    solver = self.config.solver
    if solver is not None:
      return unipc_numpy.solve(velocity, noise.start, solver.steps, solver.shift)
    x = np.asarray(noise.start, np.float64)
    for i, t in enumerate(self.config.timesteps):
      x0 = x - self.config.sigmas[i] * velocity(x, t)
      s = self.config.sigmas[i + 1]
      x = (1 - s) * x0 + s * np.asarray(noise.again[i]) if s else x0
    return x

  def commit(self, x0):
    for i, state in enumerate(self.states):
      self.states[i] = close(self.single, PARAMS, begin(self.single, state, x0.shape[1]), x0)

  def joined(self):
    """All states as one, texts behind each other."""
    axis = {"k": 1, "v": 1, "memory": 1, "text": 1}
    return type(self.states[0])(
      **{
        name: jax.tree.map(
          lambda *xs, n=name: np.concatenate(xs, axis=axis.get(n, 0)),
          *(getattr(s, name) for s in self.states),
        )
        for name in self.states[0]._fields
      }
    )

  def follow(self, stream, chunks):
    """Holds the stream's next chunks, and its state after them, against the loop."""
    for _ in range(chunks):
      want, got = self.denoise(), next(stream)
      assert want.std() > 0.5
      # Float32 flows of O(1) are off by 1e-6; another text or step moves them by 1e-2 and more.
      np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
      self.commit(got)  # so that each chunk is compared on its own
    assert_trees_close(stream.state, self.joined(), 1e-5)


@pytest.mark.parametrize(
  ("variant", "solver", "guidance", "interval"),
  [
    ("paper", SOLVER, 3.0, (0, 1000)),
    ("reference_dense", SOLVER, 3.0, (700, 1000)),
    ("paper", SOLVER, 1.0, (0, 1000)),
    ("paper", None, 2.5, (800, 960)),  # of 1000, 937.5 and 833.3
  ],
)
def test_chunks_are_those_of_a_loop_over_one_state_for_each_text(
  variant, solver, guidance, interval
):
  """Six chunks after an image: the window slides, and where there is a memory it fills."""
  config = configured(solver, guidance, interval, variant=variant)
  times = solver.timesteps if solver else config.timesteps
  guided = [interval[0] <= t <= interval[1] for t in times]
  assert all(guided) == (interval == (0, 1000)) and any(guided)
  stream = begun(config)
  # An independent padding: the network pads what it is given.
  negative = jnp.concatenate([NEGATIVE] * 2)
  oracle = Separate(config, [context(2)] + [negative] * (guidance != 1))
  image = latents(config, 1, batch=2)
  stream.extend(image)
  oracle.commit(image)
  oracle.follow(stream, 6)
  rows = 2 * config.texts
  assert stream.state.k.shape[1] == rows and stream.state.position.tolist() == [19] * rows
  absorbed = 16 - 6 if config.has_memory else 0
  assert stream.state.absorbed.tolist() == [absorbed] * rows


def test_another_prompt_is_for_the_rows_of_prompts_alone():
  """All latents are kept, so that the state is that of streams with these texts from the start."""
  config = configured()
  stream = begun(config, kept=100)
  for _ in range(4):
    next(stream)
  stream.set_context(context(2, seed=9))
  oracle = Separate(config, [context(2, seed=9), jnp.concatenate([NEGATIVE] * 2)])
  for piece in stream.history.last:
    oracle.commit(piece)
  oracle.follow(stream, 2)


def test_generate_equals_stepping():
  config = configured()
  stream = begun(config)
  stepped = np.concatenate([next(stream) for _ in range(5)], axis=1)
  texts = [context(2), jnp.concatenate([NEGATIVE] * 2)]
  # Rows of zeros behind the text are those that the network pads with.
  texts = jnp.concatenate([jnp.pad(t, ((0, 0), (0, 6 - t.shape[1]), (0, 0))) for t in texts])
  state = init_state(config, wan.text_keys(MODEL, PARAMS, texts))
  with pytest.raises(ValueError, match="keys is for 4 samples and the latents are for 2"):
    generate(config, PARAMS, state, sample_keys(0, 4), 5)
  keys = sample_keys(SEEDS, 2)
  state, x = generate(config, PARAMS, state, keys, 5)
  assert x.shape == (2, 15, 4, 6, 4)
  np.testing.assert_allclose(x, stepped, atol=1e-5)
  assert_trees_close(state, stream.state, 1e-5)


def test_nothing_compiles_after_warming_up_and_that_leaves_no_trace():
  config = configured()
  warm, cold = begun(config), begun(config)
  warm.warm_up()
  with compilations() as compiled:
    for i in range(7):
      if i == 3:
        warm.set_context(context(2, seed=9), blend=2, share=0.5)
      x = next(warm)
    warm.set_context(context(2, rows=3, seed=10))
    jax.block_until_ready((x, next(warm)))
  big = [c for c in compiled if any(n in c for n in ("advance", "context_step", "restart", "text"))]
  assert big == [], big
  for i in range(7):
    if i == 3:
      cold.set_context(context(2, seed=9), blend=2, share=0.5)
    y = next(cold)
  np.testing.assert_array_equal(x, y)


def test_a_saved_stream_goes_on_with_the_same_bits():
  config = configured()
  stream = begun(config, kept=12)
  stream.extend(latents(config, 4, batch=2))
  for _ in range(3):
    next(stream)
  stream.set_context(context(2, seed=7), blend=3)
  next(stream)  # so that it is saved in the middle of a change
  saved = to_arrays(stream)
  again = from_arrays(config, PARAMS, saved)
  for _ in range(3):
    np.testing.assert_array_equal(next(stream), next(again))
  for s in (stream, again):
    s.set_context(context(2, seed=8))
  np.testing.assert_array_equal(next(stream), next(again))
  same = jax.tree.map(np.array_equal, to_arrays(stream), to_arrays(again))
  assert all(same.values()) and np.array_equal(saved["negative"], NEGATIVE)
  with pytest.raises(ValueError, match="A negative text was given, which guidance 1"):
    from_arrays(dataclasses.replace(config, guidance=1.0), PARAMS, saved)
  del saved["negative"]
  with pytest.raises(ValueError, match="Guidance 3 needs a negative text"):
    from_arrays(config, PARAMS, saved)


def test_a_solver_starts_from_the_noise_of_few_steps():
  config = configured(guidance=1.0, steps=(1000, 750, 500))
  keys, chunk = sample_keys(SEEDS, 2), jnp.array([0, 5])
  few = draw_noise(dataclasses.replace(config, solver=None), keys, chunk)
  one = draw_noise(config, keys, chunk)
  two = draw_noise(dataclasses.replace(config, guidance=2.0), keys, jnp.tile(chunk, 2))
  assert few.again.shape[0] == 2 and one.again.shape == two.again.shape == (0, 2, 3, 4, 6, 4)
  for noise in (one, two):
    np.testing.assert_array_equal(noise.start, few.start)
  with pytest.raises(ValueError, match=r"added again .* a solver need \(0, 2, 3, 4, 6, 4\)"):
    jax.eval_shape(lambda: chunk_step(config, PARAMS, fresh_state(config, PARAMS, 2), few))


@pytest.mark.parametrize(
  ("guidance", "negative", "sentence"),
  [
    (3.0, None, "Guidance 3 needs a negative text; give one"),
    (1.0, NEGATIVE, "A negative text was given, which guidance 1 does not use; leave it out"),
    (3.0, context(3), "negative text is for 3 samples and the text for 2; give as many"),
    (3.0, jnp.zeros((1, 5, 7)), r"text context has shape \(1, 5, 7\)"),
    (3.0, context(1, rows=7), "text context has 7 rows; the model takes at most 6"),
  ],
)
def test_negative_texts_that_do_not_fit_are_refused(guidance, negative, sentence):
  with pytest.raises(ValueError, match=sentence):
    LatentStream(configured(guidance=guidance), PARAMS, context(2), negative=negative)


def test_wrong_batches_are_refused():
  guided, plain = configured(), configured(guidance=1.0)
  text = functools.partial(wan.text_keys, MODEL, PARAMS)
  with pytest.raises(ValueError, match="two texts for each sample, and the state would have 3"):
    init_state(guided, text(context(3)))
  with pytest.raises(ValueError, match="two texts for each sample, and the state would have 1"):
    jax.eval_shape(lambda: begin_chunk(guided, init_state(plain, text(context(1)))))
  stream, x = begun(guided), latents(guided, 3, batch=4)
  with pytest.raises(ValueError, match=r"\(4, 3, 4, 6, 4\); the chunk .* takes \(2, 3, 4, 6, 4\)"):
    stream.extend(x)
  with pytest.raises(ValueError, match=r"\(4, 3, 4, 6, 4\); the chunk .* takes \(2, 3, 4, 6, 4\)"):
    noise = ChunkNoise(x, jnp.zeros((0, *x.shape)))
    jax.eval_shape(lambda: chunk_step(guided, PARAMS, stream.state, noise))
