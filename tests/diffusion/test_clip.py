"""Whole clips against a NumPy solver around the network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.diffusion import guidance
from hfjax.diffusion.clip import sample_clip
from hfjax.diffusion.solvers import MultistepSolver
from hfjax.models import wan
from tests.helpers import MODEL, compilations, context, random_params
from tests.reference import unipc_numpy

PARAMS = random_params()
SOLVER = MultistepSolver("unipc", 5, 3.0)
NOISE = jax.random.normal(jax.random.key(5), (2, 4, 4, 6, 4))
NEGATIVE = context(2, rows=2, seed=40)
predict = jax.jit(wan.predict_flow, static_argnums=0)


def loop(texts, guidance, interval=(0, 1000)):
  """Each text in forwards of its own, NumPy between them."""

  def velocity(x, t):
    x, t = jnp.asarray(x, jnp.float32), jnp.full(len(x), t, jnp.float32)
    flows = [np.asarray(predict(MODEL, PARAMS, x, t, text), np.float64) for text in texts]
    scale = guidance if interval[0] <= t[0] <= interval[1] else 1.0
    return flows[-1] + scale * (flows[0] - flows[-1])

  return unipc_numpy.solve(velocity, NOISE, SOLVER.steps, SOLVER.shift)


def test_a_clip_is_that_of_a_loop_over_the_network():
  plain = sample_clip(MODEL, PARAMS, context(2), NOISE, SOLVER)
  assert plain.shape == NOISE.shape and plain.dtype == jnp.float32
  # Float32 flows of O(1) are off by 1e-6; another text or step moves them by 1e-2 and more.
  np.testing.assert_allclose(plain, loop([context(2)], 1.0), rtol=0, atol=1e-5)
  for negative in (NEGATIVE, NEGATIVE[:1]):
    got = sample_clip(MODEL, PARAMS, context(2), NOISE, SOLVER, 4.0, negative)
    rows = jnp.broadcast_to(negative, NEGATIVE.shape)
    want = loop([context(2), rows], 4.0)
    assert want.std() > 0.5 and np.abs(want - plain).max() > 0.3
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_guidance_in_an_interval_of_times():
  interval = (400, 900)  # of 999, 922, 817, 666 and 428: neither the first two nor none
  assert [400 <= t <= 900 for t in SOLVER.timesteps] == [False, False, True, True, True]
  make = functools.partial(sample_clip, MODEL, PARAMS, context(2), NOISE, SOLVER, 4.0, NEGATIVE)
  got = make(interval=interval)
  np.testing.assert_allclose(got, loop([context(2), NEGATIVE], 4.0, interval), rtol=0, atol=1e-5)
  assert np.abs(got - make()).max() > 0.01


def test_ends_of_an_interval_count_and_roundings_of_times_do_not():
  times = jnp.float32([599.99994, 600, 599, 900.00006, 901])
  scale = guidance.scale_at(4.0, (600, 900), times)
  assert scale.shape == (5, 1, 1, 1, 1) and scale.ravel().tolist() == [4, 4, 1, 4, 1]
  assert guidance.scale_at(4.0, (0.0, 1000.0), times) == 4.0
  each = guidance.scale_at(2.0, (600, 1000), jnp.float32([[700, 500, 600]]))
  assert each.shape == (1, 3, 1, 1, 1) and each.ravel().tolist() == [2, 1, 2]


def test_steps_scales_and_prompts_share_one_compilation_and_inputs_stay():
  seen = []
  run = functools.partial(sample_clip, MODEL, PARAMS)
  run(context(2), NOISE, SOLVER, 4.0, NEGATIVE, progress=seen.append)
  assert seen == [1, 2, 3, 4, 5]
  with compilations() as compiled:
    run(context(2, rows=3, seed=8), NOISE, SOLVER, 2, NEGATIVE).block_until_ready()
  assert [c for c in compiled if "step" in c] == []
  assert bool(jnp.isfinite(NOISE).all())  # not donated


def test_half_precision_stays_near_single():
  single, half = (
    sample_clip(MODEL, PARAMS, context(2), NOISE, SOLVER, dtype=d)
    for d in (jnp.float32, jnp.bfloat16)
  )
  assert half.dtype == jnp.float32
  assert 0 < np.abs(half - single).max() < 0.3


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"solver": 50}, "The solver is a int; give a MultistepSolver"),
    ({"guidance": 5.0}, "Guidance 5 needs a negative text"),
    ({"negative": NEGATIVE}, "A negative text was given, which guidance 1 does not use"),
    ({"guidance": float("nan")}, "The guidance is nan; it must be a number from 0 to 100"),
    ({"interval": (900, 400)}, "from time 900 up to 400; give the lower first"),
    ({"interval": 500}, "interval of guidance is 500; give two times"),
    ({"interval": (0, 2000)}, "time of the interval of guidance is 2000; it must be"),
    ({"guidance": 5.0, "negative": context(3)}, "negative text is for 3 samples"),
    ({"context": context(1)}, "text context is for 1 samples and the latents are for 2"),
    ({"context": jnp.zeros((2, 5, 7))}, r"text context has shape \(2, 5, 7\)"),
    ({"noise": NOISE[..., :3]}, "with 4 channels"),
    ({"noise": NOISE[:, :, :3]}, "3 rows, which the patch of 2 does not divide"),
    ({"params": {}}, "parameters are not those of this configuration"),
    ({"config": dataclasses.replace(MODEL, in_dim=9)}, "takes 9 channels .* text-to-video"),
  ],
)
def test_what_does_not_fit_is_refused(change, sentence):
  arguments = {
    "config": MODEL, "params": PARAMS, "context": context(2), "noise": NOISE, "solver": SOLVER,
  }  # fmt: skip
  with pytest.raises(ValueError, match=sentence):
    sample_clip(**{**arguments, **change})
