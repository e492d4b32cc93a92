"""Distillation of real networks and with a real autoencoder, against plain loops over them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.distill.inputs import Texts
from hfjax.distill.objectives import Distillation, Frozen
from hfjax.models import vae, wan
from hfjax.models.geometry import Geometry
from hfjax.models.presets import WanConfig
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.state import init_state
from hfjax.streaming.step import draw_noise
from tests.distill.stand_ins import drawn_params, find_key, sigma
from tests.helpers import begin, close, flow

MODEL = WanConfig(
  dim=8, ffn_dim=8, heads=1, layers=1, in_dim=3, out_dim=3, text_dim=4, text_len=2, freq_dim=4,
  patch=(1, 1),
)  # fmt: skip
STREAM = StreamConfig(
  MODEL, Geometry(2, 2, chunk=2, window=4, sink=1, patch=(1, 1), variant="reference_dense"),
  steps=(1000, 500), remat=True,
)  # fmt: skip
VAE = vae.VaeConfig(
  dim=2, z_dim=3, mean=(0.5, -1.0, 0.25), std=(2.0, 0.5, 1.5), dim_mult=(1, 1),
  num_res_blocks=1, temporal_downsample=(False,),
)  # fmt: skip
O = Distillation(STREAM, MODEL, MODEL, VAE, most=3, last=2, reflow_weight=0.2, reflow_steps=2)  # noqa: E741
STUDENT, CRITIC, TEACHER = (drawn_params(MODEL, seed) for seed in range(3))
VAE_PARAMS = jax.tree.map(
  lambda x: jnp.asarray(0.3 * np.random.default_rng(x.size).normal(size=x.shape), x.dtype),
  jax.eval_shape(lambda: vae.init_params(VAE, jax.random.key(0))),
)
DRAWN = np.random.default_rng(4).normal(size=(3, 2, 4)).astype(np.float32)
TEXTS = Texts(jnp.asarray(DRAWN[1:]), jnp.asarray(DRAWN[:1]))
SHIFTED = (1.0, 5 / 6, 0.0)  # noise levels of the steps 1000 and 500, and behind them

sees = jax.jit(functools.partial(wan.predict_flow, MODEL))
decode = jax.jit(functools.partial(vae.decode, VAE))
encode = jax.jit(functools.partial(vae.encode, VAE))


def loss_of(who, o, params, key):
  """The code under test; `params` are those in training."""
  frozen = Frozen(TEACHER, VAE_PARAMS)
  if who == "generator":
    return o.generator_loss(params, CRITIC, frozen, TEXTS, key)[0]
  return o.critic_loss(params, STUDENT, frozen, TEXTS, key)[0]


def rolled(params, key, chunks, exit_step):
  """Latents of all chunks, and the noise that each starts from."""
  frozen, context = jax.lax.stop_gradient(params), TEXTS.context
  keys = jnp.stack([jax.random.fold_in(key, row) for row in range(2)])
  state, latents, starts = init_state(STREAM, wan.text_keys(MODEL, frozen, context)), [], []
  for number in range(chunks):
    chunk, drawn = begin(STREAM, state), draw_noise(STREAM, keys, jnp.full(2, number))
    x, weights = drawn.start, frozen
    for i in range(exit_step + 1):
      last = i == exit_step
      if last and number >= chunks - O.last:
        weights = params
      t = jnp.full(2, 1000 * SHIFTED[i], jnp.float32)
      x0 = x - SHIFTED[i] * flow(STREAM, weights, chunk, x, t, context)
      if not last:
        x = (1 - SHIFTED[i + 1]) * x0 + SHIFTED[i + 1] * drawn.again[i]
    latents.append(x0)
    starts.append(drawn.start)
    state = close(STREAM, frozen, chunk, jax.lax.stop_gradient(x0))
  return jnp.concatenate(latents, axis=1), jnp.concatenate(starts, axis=1)


def by_hand(who, o, params, key, chunks, exit_step):
  """The same as `loss_of`, one thing after the other."""
  stop = jax.lax.stop_gradient
  _, noise_key, score_key = jax.random.split(key, 3)
  student = params if who == "generator" else STUDENT
  latents, starts = rolled(student, noise_key, chunks, exit_step)
  first, clip = 2 * (chunks - 2), latents[:, -4:]
  image = clip
  if first and o.vae is not None:
    pixels = decode(VAE_PARAMS, stop(latents[:, : first + 1]))
    again = encode(VAE_PARAMS, jnp.clip(pixels[:, -1:], -1, 1))
    image = jnp.concatenate([again, clip[:, 1:]], axis=1)
  t, noise = o.draw_score_times(score_key, image)
  level = jnp.asarray(sigma(np.asarray(t)), jnp.float32).reshape(2, 1, 1, 1, 1)
  noisy = stop((1 - level) * image + level * noise)
  negative = jnp.concatenate([TEXTS.negative] * 2)
  if who == "critic":
    return ((sees(params, noisy, t, TEXTS.context) - stop(noise - image)) ** 2).mean()
  fake = noisy - level * sees(CRITIC, noisy, t, TEXTS.context)
  good, bad = (noisy - level * sees(TEACHER, noisy, t, c) for c in (TEXTS.context, negative))
  real = good + 3.0 * (good - bad)
  direction = (fake - real) / jnp.abs(image - real).mean(axis=(1, 2, 3, 4), keepdims=True)
  counted = slice(2 if first else 0, None)
  loss = 0.5 * ((image - stop(image - direction))[:, counted] ** 2).mean()
  if exit_step == 0 and o.reflow_weight:
    x = starts[:, -4:]
    for now, then in zip((1.0, 5 / 6), (5 / 6, 0.0), strict=True):
      good, bad = (
        sees(TEACHER, x, jnp.full(2, 1000 * now, jnp.float32), c) for c in (TEXTS.context, negative)
      )
      x = x + (then - now) * (bad + 3.5 * (good - bad))
    loss += o.reflow_weight * ((clip - stop(x))[:, counted] ** 2).mean()
  return loss


@functools.cache
def program(who, o):
  return jax.jit(lambda params, key: loss_of(who, o, params, key))


@functools.cache
def gradient(who, o):
  return jax.jit(jax.grad(lambda params, key: loss_of(who, o, params, key)))


WITHOUT = dataclasses.replace(O, vae=None, reflow_weight=0.0)


@pytest.mark.parametrize(
  ("who", "o", "chunks", "exit_step"),
  [
    ("generator", WITHOUT, 3, 1), ("generator", WITHOUT, 2, 0),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ("generator", O, 3, 1), ("generator", O, 2, 0), ("generator", O, 3, 0),
        ("critic", O, 3, 1), ("critic", WITHOUT, 3, 0),
      )
    ),
  ],
)  # fmt: skip
def test_the_loss_is_that_of_plain_loops(who, o, chunks, exit_step):
  params, key = STUDENT if who == "generator" else CRITIC, find_key(o, chunks, exit_step)
  want = by_hand(who, o, params, key, chunks, exit_step)
  np.testing.assert_allclose(program(who, o)(params, key), want, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("o", [O, WITHOUT], ids=["with-vae", "without"])
@pytest.mark.parametrize(
  ("who", "chunks", "exit_step"), [("generator", 3, 1), ("generator", 2, 0), ("critic", 3, 1)]
)
def test_the_gradient_is_that_of_plain_loops(who, o, chunks, exit_step):
  params, key = STUDENT if who == "generator" else CRITIC, find_key(o, chunks, exit_step)
  got = gradient(who, o)(params, key)
  want = jax.grad(lambda p: by_hand(who, o, p, key, chunks, exit_step))(params)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=3e-4 * max(1, float(np.abs(y).max())))
  assert sum(bool(np.any(x)) for x in jax.tree.leaves(want)) > 20
