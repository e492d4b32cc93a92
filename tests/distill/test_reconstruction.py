"""The autoencoder's loss: against NumPy, given what encoder and decoder say, and with networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.distill.reconstruction import Reconstruction
from hfjax.models import vae
from hfjax.models.vae import VaeConfig
from tests.models.test_vae import ATOL, SMALL, params, video

# Two pixels a side and two frames to a latent, but for the first frame.
PLAIN = VaeConfig(
  dim=4, z_dim=3, mean=(0.0,) * 3, std=(1.0,) * 3, dim_mult=(1, 2), num_res_blocks=1,
  temporal_downsample=(True,),
)  # fmt: skip
KEY = jax.random.key(5)


class Told(Reconstruction):
  """Its networks say what the parameters say; what comes back depends on the latents drawn."""

  def encode(self, params, x):
    return params["moments"]

  def decode(self, params, z):
    return params["pixels"] + 0.1 * z.mean(axis=(1, 2, 3))[:, None, None, None]


def told(log_variances=(-2, 2)):
  """Parameters, and clips of two frames by three by four pixels."""
  r = np.random.default_rng(0)
  mean, low = r.normal(size=(2, 2, 2, 3, 3)), r.uniform(*log_variances, (2, 2, 2, 3, 3))
  arrays = {
    "moments": np.concatenate([mean, low], axis=-1),
    "pixels": r.uniform(-1, 1, (2, 2, 3, 4, 3)),
  }
  return jax.tree.map(jnp.float32, arrays), r.integers(0, 256, (2, 2, 3, 4, 3), np.uint8)


def test_the_loss_is_that_of_numpy():
  given, pixels = told()
  o = Told(PLAIN, 5, kl=0.3, square=0.7, edges=1.9)
  loss, figures = jax.device_get(jax.jit(o.loss)(given, pixels, KEY))
  mean, low = np.split(np.float64(given["moments"]), 2, axis=-1)
  noise = np.float64(jax.random.normal(KEY, mean.shape))
  back = np.float64(given["pixels"])
  shift = 0.1 * (mean + np.sqrt(np.exp(low)) * noise).mean(axis=(1, 2, 3))
  error = back + shift[:, None, None, None] - (pixels / 127.5 - 1)
  rows, columns = error[:, :, 1:] - error[:, :, :-1], error[..., 1:, :] - error[..., :-1, :]
  want = {
    "distance": np.abs(error).mean(),
    "edges": np.abs(rows).mean() + np.abs(columns).mean(),
    "divergence": (mean**2 + np.exp(low) - 1 - low).mean() / 2,
    "latent_power": (mean**2).mean(),
    "psnr": 20 * np.log10(2 / np.sqrt((error**2).mean())),
  }
  assert figures.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_allclose(figures[name], value, rtol=2e-6, err_msg=name)
  parts = (want["distance"], 0.7 * (error**2).mean(), 1.9 * want["edges"], 0.3 * want["divergence"])
  np.testing.assert_allclose(loss, sum(parts), rtol=2e-6)


@pytest.mark.parametrize(("mean", "deviation"), [(0, 1), (1.5, 0.3), (-0.4, 2.5)])
def test_the_divergence_is_the_integral(mean, deviation):
  x, step = np.linspace(-40, 40, 200_001, retstep=True)
  density = lambda m, s: np.exp(-(((x - m) / s) ** 2) / 2) / (s * np.sqrt(2 * np.pi))
  p, log_ratio = density(mean, deviation), (x**2 - ((x - mean) / deviation) ** 2) / 2
  want = step * np.sum(p * (log_ratio - np.log(deviation)))
  given, pixels = told()
  low = 2 * np.log(deviation)
  moments = jnp.broadcast_to(jnp.float32([mean] * 3 + [low] * 3), (2, 2, 2, 3, 6))
  _, figures = Told(PLAIN, 5).loss(given | {"moments": moments}, pixels, KEY)
  np.testing.assert_allclose(figures["divergence"], want, rtol=1e-5, atol=1e-7)


def test_what_comes_back_as_it_was_is_no_infinity():
  given, pixels = told((-80, -70))  # so that nothing is drawn
  moments = given["moments"].at[..., :3].set(0)
  given |= {"pixels": pixels.astype(np.float32) / 127.5 - 1, "moments": moments}
  loss, figures = Told(PLAIN, 5, kl=0).loss(given, pixels, KEY)
  assert figures["distance"] < 1e-6 and loss < 1e-6
  np.testing.assert_allclose(figures["psnr"], 10 * np.log10(4e10), rtol=1e-6)


def test_variances_beyond_all_bounds_do_not_break_it():
  given, pixels = told()
  wild = given["moments"].at[..., 3].set(1e4).at[..., 4].set(-1e4)
  loss = lambda x: Told(PLAIN, 5).loss(given | {"moments": x}, pixels, KEY)[0]
  slope = jax.jit(jax.grad(loss))(wild)
  assert np.all(np.isfinite(slope)) and not slope[..., 3:5].any() and slope[..., 5].all()


def clips(rows=4, columns=6):
  return np.random.default_rng(1).integers(0, 256, (2, 5, rows, columns, 3), np.uint8)


@pytest.mark.parametrize("remat", [False, True])
def test_halves_are_computed_anew_if_that_is_asked_for(remat):
  run = jax.make_jaxpr(Reconstruction(PLAIN, 5, remat=remat).loss)
  steps = [eqn.primitive.name for eqn in run(params(PLAIN), clips(), KEY).eqns]
  assert sum("remat" in name or "checkpoint" in name for name in steps) == 2 * remat


@pytest.mark.slow
def test_an_encoder_that_stays_gets_no_gradients():
  clips = jax.random.randint(KEY, (1, 5, 4, 6, 3), 0, 256, jnp.uint8)
  weights = vae.init_params(PLAIN, jax.random.key(1))
  both, one = (
    jax.grad(Reconstruction(PLAIN, 5, decoder_only=only).loss, has_aux=True)(weights, clips, KEY)[0]
    for only in (False, True)
  )
  assert all(not np.any(x) for x in jax.tree.leaves(one["encoder"]))
  assert all(np.any(x) for x in jax.tree.leaves(both["encoder"]))
  for a, b in zip(*map(jax.tree.leaves, (both["decoder"], one["decoder"])), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_halves_are_those_that_sample():
  o, x = Reconstruction(PLAIN, 5), video(5, 2)
  moments = jax.jit(o.encode)(params(PLAIN), x)
  want = jax.jit(vae.encode, static_argnums=0)(PLAIN, params(PLAIN), x)
  assert moments.shape == (*want.shape[:-1], 6)
  np.testing.assert_allclose(moments[..., :3], want, rtol=0, atol=ATOL)
  back = jax.jit(o.decode)(params(PLAIN), want)
  wanted = jax.jit(vae.decode, static_argnums=0)(PLAIN, params(PLAIN), want)
  assert back.shape == x.shape
  np.testing.assert_allclose(back, wanted, rtol=0, atol=ATOL)


def test_half_precision_is_of_the_networks_alone():
  o = Reconstruction(PLAIN, 5, dtype="bfloat16")
  for act, x in ((o.encode, video(5)), (o.decode, jnp.zeros((1, 3, 2, 3, 3)))):
    made = jax.make_jaxpr(act)(params(PLAIN), x)
    assert made.out_avals[0].dtype == jnp.float32 and "bf16" in str(made)


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"frames": 4}, "clips of 4 frames; give 1 and a multiple of 2, at least 3"),
    ({"frames": 1}, "clips of 1 frames"),
    ({"frames": 8}, "clips of 8 frames"),
    ({"kl": -1}, "are -1, 1.0 and 1.0; give at least 0"),
    ({"square": -0.5}, "are 0.0001, -0.5 and 1.0"),
    ({"edges": -2}, "give at least 0"),
    ({"vae": SMALL}, "start with means of 0 and deviations of 1"),
    ({"vae": dataclasses.replace(PLAIN, std=(1.0, 1.0, 2.0))}, "are normalised by statistics"),
  ],
)
def test_what_cannot_be_learnt_is_refused(change, sentence):
  with pytest.raises(ValueError, match=sentence):
    Reconstruction(**{"vae": PLAIN} | change)
