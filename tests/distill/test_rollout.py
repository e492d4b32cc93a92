"""Training rollouts against plain loops over the streaming functions."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.diffusion.solvers import MultistepSolver
from hfjax.distill.rollout import StreamStudent, roll_out
from hfjax.models import wan
from hfjax.streaming.latent_stream import sample_keys
from hfjax.streaming.state import init_state
from hfjax.streaming.step import draw_noise
from tests.helpers import begin, close, compilations, context, flow, random_params, stream_config

# The window slides and the memory fills within five chunks.
CONFIG = stream_config(steps=(1000, 750, 500), window=6, sink=2, chunk=2, remat=True)
PARAMS = random_params()
TEXT = context(2)
KEYS = sample_keys(0, 2)
LAST, MOST = 2, 5


def noise(number):
  return draw_noise(CONFIG, KEYS, jnp.broadcast_to(number, (2,)))


@functools.partial(jax.jit, static_argnames=("first", "renoise_first"))
def rolled(params, exit_step, chunks, first=False, renoise_first=True):
  student = StreamStudent(CONFIG, TEXT)
  return roll_out(student, params, noise, exit_step, chunks, most=MOST, last=LAST, first=first,
                  renoise_first=renoise_first)  # fmt: skip


def loop(params, exit_step, chunks, first=False, renoise_first=True):
  """Latents of all chunks and predictions of the last ones' first step, one after the other."""
  c, frozen = CONFIG, jax.lax.stop_gradient(params)
  state = init_state(c, wan.text_keys(c.model, frozen, TEXT))
  latents, firsts = [], []
  for number in range(chunks):
    trained = number >= chunks - LAST
    chunk, drawn = begin(c, state), noise(jnp.int32(number))

    def predict(x, i, final, chunk=chunk, trained=trained):
      with_gradient = final and trained
      velocity = flow(c, params if with_gradient else frozen, chunk, x,
                     jnp.full(2, c.timesteps[i]), TEXT if with_gradient else None)  # fmt: skip
      return x - c.sigmas[i] * velocity

    x = drawn.start
    for i in range(exit_step):
      x0 = jax.lax.stop_gradient(predict(x, i, False))
      if i or renoise_first:
        x = (1 - c.sigmas[i + 1]) * x0 + c.sigmas[i + 1] * drawn.again[i]
    x0 = predict(x, exit_step, True)
    latents.append(x0)
    if trained:
      firsts.append(predict(drawn.start, 0, True))
    state = jax.lax.stop_gradient(close(c, frozen, chunk, jax.lax.stop_gradient(x0)))
  return jnp.concatenate(latents, axis=1), jnp.concatenate(firsts, axis=1)


@pytest.mark.parametrize(
  ("exit_step", "chunks", "renoise_first"),
  [pytest.param(0, 5, True, marks=pytest.mark.slow), (2, 4, True), (2, 2, False)],
)
def test_latents_are_those_of_the_stream(exit_step, chunks, renoise_first):
  got = rolled(PARAMS, exit_step, chunks, True, renoise_first)
  latents, firsts = loop(PARAMS, exit_step, chunks, True, renoise_first)
  frames = 2 * chunks
  np.testing.assert_allclose(got.all[:, :frames], latents, atol=2e-5)
  assert not np.any(got.all[:, frames:])
  np.testing.assert_allclose(got.latents, latents[:, -2 * LAST :], atol=2e-5)
  np.testing.assert_allclose(got.first, firsts, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("exit_step", "first"), [(0, True), (2, False)])
def test_gradients_flow_through_the_exit_of_the_last_chunks_only(exit_step, first):
  weights = jax.random.normal(jax.random.key(5), (2, 2 * LAST, *noise(0).start.shape[2:]))

  def scalar(latents, firsts):
    total = (weights * latents).sum()
    return total + (weights**2 * firsts).sum() if first else total

  def got(params):
    r = rolled(params, exit_step, 4, first)
    return scalar(r.latents, r.first)

  def want(params):
    latents, firsts = loop(params, exit_step, 4)
    return scalar(latents[:, -2 * LAST :], firsts)

  for x, y in zip(
    jax.tree.leaves(jax.grad(got)(PARAMS)), jax.tree.leaves(jax.grad(want)(PARAMS)), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=0, atol=2e-4 * max(1, float(np.abs(y).max())))
  # All that is seen without gradients is a constant.
  nothing = jax.grad(lambda p: (rolled(p, exit_step, 4).all).sum())(PARAMS)
  assert not any(np.any(x) for x in jax.tree.leaves(nothing))


def test_one_compilation_serves_all_numbers():
  rolled(PARAMS, 0, 2).latents.block_until_ready()
  with compilations() as compiled:
    for exit_step, chunks in itertools.product(range(3), range(2, 6)):
      rolled(PARAMS, exit_step, chunks)
  assert not compiled


def test_without_a_first_step_none_is_given():
  assert rolled(PARAMS, 0, 2).first is None


def test_what_no_rollout_can_be_of():
  with pytest.raises(ValueError, match="Gradients of 6 of 5 chunks"):
    roll_out(StreamStudent(CONFIG, TEXT), PARAMS, noise, 0, 2, most=5, last=6)
  with pytest.raises(ValueError, match="leave solver and guidance out"):
    StreamStudent(dataclasses.replace(CONFIG, solver=MultistepSolver()), TEXT)
