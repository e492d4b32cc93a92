"""Distillation with stand-ins for its networks, against formulas in float64."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.distill import objectives
from hfjax.distill.objectives import Distillation, Frozen
from hfjax.distill.rollout import Rollout
from tests.distill import stand_ins
from tests.distill.stand_ins import (
  CRITIC,
  CRITIC_PARAMS,
  STREAM,
  STUDENT_PARAMS,
  TEACHER,
  TEACHER_PARAMS,
  VAE,
  VAE_PARAMS,
  ByHand,
  find_key,
  texts,
)  # fmt: skip

LAST, MOST = 2, 4
PLAIN = Distillation(STREAM, CRITIC, TEACHER, None, most=MOST, last=LAST)
GUIDED = dataclasses.replace(
  PLAIN, guidance=2.0, guidance_form="unconditional", critic_guidance=0.7, reflow_weight=0.3,
  guided_below=700, reflow_steps=4, reflow_guidance=1.5, vae=VAE,
)  # fmt: skip
# As published, and reflow of a trajectory that ends early, in every rollout.
PUBLISHED = dataclasses.replace(
  PLAIN, renoise_first=False, noisy_context=True, score_shift=8.0, reflow_weight=0.05,
  reflow_steps=5, reflow_stop=3, reflow_always=True,
)  # fmt: skip
f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
STUDENT, CRITIC_ = f32(STUDENT_PARAMS), f32(CRITIC_PARAMS)
FROZEN = Frozen(f32(TEACHER_PARAMS), f32(VAE_PARAMS))


@pytest.fixture(scope="module", autouse=True)
def networks_are_stand_ins():
  with pytest.MonkeyPatch.context() as patch:
    stand_ins.install(patch)
    yield


@functools.cache
def graded(o, who):
  """Loss, figures, and gradients by the network in training, the other one and what is frozen."""
  loss = o.generator_loss if who == "generator" else o.critic_loss
  return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def generator(o, key):
  return graded(o, "generator")(STUDENT, CRITIC_, FROZEN, texts(), key)


def critic(o, key):
  return graded(o, "critic")(CRITIC_, STUDENT, FROZEN, texts(), key)


def close(got, want, rtol=3e-5, atol=2e-6):
  np.testing.assert_allclose(np.float64(got), want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("o", [PLAIN, GUIDED, PUBLISHED], ids=["plain", "guided", "published"])
@pytest.mark.parametrize(("chunks", "exit_step"), [(LAST, 0), (MOST, 2), (3, 1), (MOST, 0)])
def test_the_generators_loss_and_gradient(o, chunks, exit_step):
  key = find_key(o, chunks, exit_step)
  (loss, figures), (gradient, *others) = generator(o, key)
  hand = ByHand(o, 2, key, chunks, exit_step)
  matching, matching_gradient, size = hand.matching()
  want, want_gradient = matching, matching_gradient
  names = {"matching_loss", "score_gradient", "chunks", "exit_step"}
  if o.reflow_weight:
    reflow, reflow_gradient = hand.reflow()
    want = want + o.reflow_weight * np.nan_to_num(reflow)
    want_gradient = want_gradient + o.reflow_weight * reflow_gradient
    names.add("reflow_loss")
    close(figures["reflow_loss"], reflow)
  assert set(figures) == names
  close(loss, want)
  close(gradient, want_gradient)
  close(figures["matching_loss"], matching)
  close(figures["score_gradient"], size)
  assert (figures["chunks"], figures["exit_step"]) == (chunks, exit_step)
  assert want_gradient[:4].all() and not want_gradient[4]  # history is a constant
  assert not any(np.any(x) for x in jax.tree.leaves(others))


@pytest.mark.parametrize("o", [PLAIN, PUBLISHED], ids=["plain", "published"])
@pytest.mark.parametrize(("chunks", "exit_step"), [(LAST, 0), (MOST, 2)])
def test_the_critics_loss_and_gradient(o, chunks, exit_step):
  key = find_key(o, chunks, exit_step)
  (loss, figures), (gradient, *others) = critic(o, key)
  want, want_gradient = ByHand(o, 2, key, chunks, exit_step).critic()
  close(loss, want)
  close(gradient, want_gradient)
  assert {k: int(x) for k, x in figures.items()} == {"chunks": chunks, "exit_step": exit_step}
  assert not any(np.any(x) for x in jax.tree.leaves(others))


def test_each_option_changes_the_loss():
  # Else the cases above would say nothing of it.
  chunks, exit_step = 3, 1
  key = find_key(PLAIN, chunks, exit_step)
  of = lambda **fields: dataclasses.replace(PLAIN, **fields)
  options = [
    of(guidance=1.5), of(guidance_form="unconditional"), of(critic_guidance=0.7),
    of(guided_below=700), of(renoise_first=False), of(noisy_context=True), of(score_shift=8.0),
    of(vae=VAE),
  ]  # fmt: skip
  hand = lambda o: ByHand(o, 2, key, chunks, exit_step)
  plain = hand(PLAIN).matching()[0]
  for o in options:
    assert abs(hand(o).matching()[0] / plain - 1) > 1e-4, o
  early, late = (
    hand(of(reflow_always=True, reflow_steps=5, reflow_stop=stop)).reflow()[0] for stop in (3, None)
  )
  assert abs(early / late - 1) > 1e-4


@pytest.mark.parametrize("reflow", [0.0, 0.3])
def test_regression_adds_to_the_generators_loss(monkeypatch, reflow):
  seen = []

  def loss(o, params, trajectory, words, key):
    seen.append((o.stream, o.forcing, trajectory, key))
    return jnp.float32(0.7), {}

  monkeypatch.setattr(objectives.Regression, "loss", loss)
  plain = dataclasses.replace(PLAIN, reflow_weight=reflow)
  key, given = find_key(plain, LAST, 0), (STUDENT, CRITIC_, FROZEN, texts())
  without, figures = plain.generator_loss(*given, key)
  o = dataclasses.replace(plain, regression_weight=2.0)
  total, more = o.generator_loss(*given, key, "trajectory")
  np.testing.assert_allclose(total, without + 2.0 * 0.7, rtol=1e-6)
  assert {*more} - {*figures} == {"regression_loss"} and more["regression_loss"] == np.float32(0.7)
  ((stream, forcing, trajectory, own),) = seen
  assert (stream, forcing, trajectory) == (PLAIN.stream, "stream", "trajectory")
  assert own != key  # steps are drawn apart from what else is random
  with pytest.raises(ValueError, match="needs trajectories"):
    o.generator_loss(*given, key)


def test_steering_covers_all_rollouts_alike():
  keys = jax.random.split(jax.random.key(0), 3000)
  for first, exits in ((0, (0, 1, 2)), (1, (1, 2)), (2, (2,))):
    o = dataclasses.replace(PLAIN, first_exit=first)
    chunks, steps = jax.vmap(o.steer)(keys)
    pairs, counts = np.unique(np.stack([chunks, steps]), axis=1, return_counts=True)
    want = list(itertools.product(range(LAST, MOST + 1), exits))
    assert [tuple(x) for x in pairs.T] == want
    np.testing.assert_allclose(counts, 3000 / len(want), rtol=0.25)


def test_one_draw_of_the_steering_serves_the_batch():
  (_, figures), _ = jax.eval_shape(
    graded(PLAIN, "generator"), STUDENT, CRITIC_, FROZEN, texts(3), jax.random.key(0)
  )
  assert all(x.shape == () for x in figures.values())


def test_noise_is_each_samples_own(monkeypatch):
  def drawn(student, params, noise, exit_step, chunks, **options):
    assert options["first"] is False  # reflow takes the latents for the first step's predictions
    return noise(jnp.int32(1)), noise(jnp.int32(2))

  monkeypatch.setattr(objectives, "roll_out", drawn)
  roll = jax.jit(lambda t, c: GUIDED.roll(STUDENT, t, jax.random.key(5), c, 1, True))
  (one, two), start = roll(texts(3), 3)
  np.testing.assert_array_equal(start, jnp.concatenate([one.start, two.start], axis=1))
  rows = np.concatenate([one.start, two.start, *one.again, *two.again]).reshape(18, -1)
  assert np.abs(np.corrcoef(rows) - np.eye(18)).max() < 0.6
  np.testing.assert_allclose([rows.mean(), rows.std()], [0, 1], atol=0.1)
  # A sample is the same in any batch.
  short = texts(3)
  alone, start_alone = roll(short._replace(context=short.context[:1]), 3)
  np.testing.assert_array_equal(start_alone[0], start[0])
  np.testing.assert_array_equal(alone[1].again[:, 0], two.again[:, 0])


def test_times_and_noise_of_scores():
  draw = jax.jit(lambda key, o: o.draw_score_times(key, image), static_argnums=1)
  image = jnp.zeros((4000, 1, 2, 1, 1))
  t, noise = draw(jax.random.key(1), PLAIN)
  u = np.arange(1000) / 1000
  grid = np.clip(1000 * 5 * u / (1 + 4 * u), 20, 980)
  assert t.shape == (4000,) and noise.shape == image.shape
  assert len(set(t[:8].tolist())) > 5  # each sample has its own
  nearest = np.abs(np.float64(t)[:, None] - grid).min(axis=1)
  assert nearest.max() < 1e-3
  # By the spec 0.5 % of draws are kept from one end and 9.2 % from the other.
  assert (t.min(), t.max()) == (20, 980)
  np.testing.assert_allclose(np.mean(t == 980), 0.092, atol=0.02)
  np.testing.assert_allclose(np.mean(t == 20), 0.005, atol=0.005)
  np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.05)
  assert abs(np.corrcoef(t, noise[:, 0, 0, 0, 0])[0, 1]) < 0.06
  t, _ = draw(jax.random.key(1), dataclasses.replace(PLAIN, lowest=300, highest=400))
  assert (t.min(), t.max()) == (300, 400)
  t, _ = draw(jax.random.key(1), dataclasses.replace(PLAIN, highest=1000, times_shift=12.0))
  # Half of them are above 12 / 13, by the formula.
  np.testing.assert_allclose(np.mean(t > 12000 / 13), 0.5, atol=0.03)
  assert t.max() > 995


def test_clips_are_float32_and_as_they_lie_without_an_autoencoder():
  latents = jax.random.normal(jax.random.key(0), (1, 4, 2, 3, 3), jnp.bfloat16)
  got = PLAIN.as_clip(Rollout(latents, None, latents), None, jnp.int32(MOST))
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, latents.astype(jnp.float32))


def test_networks_compute_in_the_dtype_that_was_asked_for(monkeypatch):
  seen = []

  def flow(config, params, x, t, context, **options):
    seen.append((config, options))
    return stand_ins.predict_flow(config, params, x, t, context)

  monkeypatch.setattr(objectives.wan, "predict_flow", flow)
  o = dataclasses.replace(PLAIN, dtype="bfloat16", remat=False, unroll=2)
  jax.eval_shape(o.generator_loss, STUDENT, CRITIC_, FROZEN, texts(), jax.random.key(0))
  options = {"dtype": jnp.bfloat16, "remat": False, "unroll": 2}
  assert seen == [(c, options) for c in (CRITIC, TEACHER)]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"critic": dataclasses.replace(CRITIC, text_dim=5)}, "The critic takes .* than the student"),
    ({"teacher": dataclasses.replace(TEACHER, in_dim=4)}, "The teacher takes .* one family"),
    ({"teacher": dataclasses.replace(TEACHER, patch=(2, 1))}, "The teacher takes"),
    ({"last": 5}, "Gradients of 5 of 4 chunks"),
    ({"last": 0}, "ask for 1 to 4"),
    ({"guidance_form": "cfg"}, "'cfg'; choose one of conditional, unconditional"),
    ({"first_exit": 3}, "steps from 3 on, of 3 that are counted from 0; give 0 to 2"),
    ({"first_exit": -1}, "steps from -1 on"),
    ({"guided_below": 1001}, "guided up to timestep 1001; give 0 to 1000"),
    ({"times_shift": 0.5}, "shift of times of scores is 0.5; give at least 1"),
    ({"lowest": 500, "highest": 500}, "from timestep 500 to 500"),
    ({"lowest": -1}, "that ascend, from 0 to 1000"),
    ({"highest": 1001}, "timestep 20.0 to 1001"),
    ({"lowest": float("nan")}, "timestep nan"),
    ({"vae": dataclasses.replace(VAE, z_dim=2, mean=(0.0,) * 2, std=(1.0,) * 2)},
     "latents of 3 channels, and the autoencoder has 2"),
    ({"reflow_weight": -0.1}, "weight of -0.1 and 25 steps"),
    ({"reflow_steps": 0}, "and 0 steps"),
    ({"regression_weight": -1.0}, "weight of regression is -1.0; give at least 0"),
    ({"regression_weight": float("nan")}, "weight of regression is nan"),
    ({"regression_weight": float("inf")}, "weight of regression is inf"),
    ({"reflow_stop": 26}, "stop after 26 of 25 steps"),
    ({"reflow_stop": 0}, "stop after 0 of 25 steps"),
  ],
)  # fmt: skip
def test_what_cannot_work_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(PLAIN, **fields)


def test_options_at_their_bounds_are_taken():
  dataclasses.replace(PLAIN, last=MOST, lowest=0, highest=1000, reflow_steps=1, reflow_stop=1)
