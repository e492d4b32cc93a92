"""Losses against their formulas in float64, and what must not carry gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfjax.distill import losses

SHAPE = (2, 3, 2, 4, 5)


def draw(seed, shape=SHAPE):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def masks():
  some = np.random.default_rng(9).integers(0, 2, SHAPE).astype(bool)
  frames = np.arange(3).reshape(1, 3, 1, 1, 1) > 0
  return [None, some, frames, np.zeros((1,) * 5, bool)]


def mean(x, mask):
  """Mean of what counts, in float64."""
  x = np.float64(x)
  if mask is None:
    return x.mean()
  x = x[np.broadcast_to(mask, x.shape)]
  return x.mean() if x.size else 0.0


@given(st.integers(0, 999), st.sampled_from([1.0, 5.0, 8.0]))
def test_times_are_shifted_and_kept_from_the_ends(raw, shift):
  u = raw / 1000
  want = np.clip(1000 * shift * u / (1 + (shift - 1) * u), 20, 980)
  np.testing.assert_allclose(losses.score_times(raw, shift), want, rtol=1e-6)


def test_the_difference_of_scores_is_relative_to_the_distance_from_the_teacher():
  image, fake, real = (draw(i) for i in range(3))
  got = losses.score_difference(image, fake, real)
  a, b, c = (np.float64(x) for x in (image, fake, real))
  want = (b - c) / np.abs(a - c).mean(axis=(1, 2, 3, 4), keepdims=True)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  # Each sample is scaled on its own, and nothing depends on the image's scale.
  alone = losses.score_difference(7 * image[1:], 7 * fake[1:], 7 * real[1:])
  np.testing.assert_allclose(got[1:], alone, rtol=1e-5, atol=1e-6)
  for i in range(3):
    sums = jax.grad(lambda *x: losses.score_difference(*x).sum(), i)(image, fake, real)
    assert not np.any(sums)


def test_scores_that_agree_with_the_image_give_no_direction():
  image = draw(0)
  assert not np.any(losses.score_difference(image, image, image))


@pytest.mark.parametrize("mask", masks(), ids=["all", "some", "frames", "none"])
def test_matching_moves_the_image_along_the_direction(mask):
  image, direction = draw(0), draw(1)
  loss, gradient = jax.value_and_grad(losses.matching_loss)(image, direction, mask)
  np.testing.assert_allclose(loss, 0.5 * mean(direction**2, mask), rtol=1e-5, atol=1e-7)
  counts = np.broadcast_to(True if mask is None else mask, SHAPE)
  want = np.where(counts, direction, 0) / max(counts.sum(), 1)
  np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-7)
  assert not np.any(jax.grad(losses.matching_loss, 1)(image, direction, mask))


@pytest.mark.parametrize("mask", masks(), ids=["all", "some", "frames", "none"])
@pytest.mark.parametrize("axes", [0, 1, 2])
def test_denoising_is_flow_matching(mask, axes):
  flow, image, noise = (draw(i) for i in range(3))
  weight = None if not axes else np.float32(draw(3, SHAPE[:axes]) ** 2)
  loss = lambda flow, image: losses.denoising_loss(flow, image, noise, weight, mask)
  error = (np.float64(flow) - (np.float64(noise) - image)) ** 2
  if weight is not None:
    error *= weight.reshape(*weight.shape, *(1,) * (5 - axes))
  np.testing.assert_allclose(loss(flow, image), mean(error, mask), rtol=1e-5, atol=1e-7)
  assert not np.any(jax.grad(loss, 1)(flow, image))


@pytest.mark.parametrize("mask", masks(), ids=["all", "some", "frames", "none"])
def test_regression_is_towards_a_fixed_target(mask):
  got, target = draw(0), draw(1)
  want = mean((np.float64(got) - target) ** 2, mask)
  np.testing.assert_allclose(losses.regression_loss(got, target, mask), want, rtol=1e-5, atol=1e-7)
  assert not np.any(jax.grad(losses.regression_loss, 1)(got, target, mask))


def test_half_precision_is_summed_in_single():
  x = jnp.asarray(draw(0, (1, 8, 16, 16, 16)), jnp.bfloat16)
  zero = jnp.zeros_like(x)
  want = np.float64(np.asarray(x, np.float32) ** 2).mean()
  for got in (losses.regression_loss(x, zero), losses.denoising_loss(x, zero, zero)):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)
