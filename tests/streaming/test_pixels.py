"""Latents to bytes of frames while a stream goes on, against whole clips at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.models import taehv, vae
from hfjax.models.clips import to_uint8
from hfjax.streaming.pixels import Autoencoder, FrameDecoder, from_bytes
from tests.helpers import compilations, drawn_params

VAE = vae.VaeConfig(
  dim=4, z_dim=3, mean=(0.5, -1.0, 0.25), std=(2.0, 0.5, 1.5), dim_mult=(1, 2, 2),
  num_res_blocks=1, temporal_downsample=(True, True),
)  # fmt: skip
TAEHV = taehv.TaehvConfig(
  z_dim=3, encoder_dim=4, decoder_dims=(8, 6, 4, 4), pools=(2, 2, 1), memory_blocks=1
)


def autoencoder(kind):
  config = {"vae": VAE, "taehv": TAEHV}[kind]
  network = {"vae": vae, "taehv": taehv}[kind]
  params = drawn_params(network.init_params, config)
  return Autoencoder(kind, config, params, jnp.float32), network


def whole(act, a, x):
  """What a network makes of a clip at once, compiled."""
  return jax.jit(act, static_argnums=0)(a.config, a.params, jnp.asarray(x))


def latents(frames, batch=1):
  return jax.random.normal(jax.random.key(1), (batch, frames, 2, 3, 3))


@pytest.mark.parametrize("kind", ["vae", "taehv"])
@pytest.mark.parametrize("sizes", [(3, 3, 1), (1, 6), (7,), (1, 1, 2, 3)])
def test_decoding_in_pieces_gives_the_frames_of_the_whole(kind, sizes):
  a, network = autoencoder(kind)
  z = latents(7, batch=2)
  decoder, pieces, start = FrameDecoder(a), [], 0
  for size in sizes:
    pieces.append(np.asarray(decoder(z[:, start : start + size])))
    start += size
  got = np.concatenate(pieces, axis=1)
  want = np.asarray(whole(network.decode, a, z))
  want = np.round(np.clip(want.astype(np.float64), -1, 1) * 127.5 + 127.5)
  factor = a.config.space_factor
  assert got.dtype == np.uint8 and got.shape == (2, 25, 2 * factor, 3 * factor, 3)
  off = np.abs(got.astype(int) - want)
  assert off.max() <= 1 and (off > 0).mean() < 1e-3
  assert len(np.unique(got)) > 20


def test_a_stream_of_pieces_compiles_once():
  a, _ = autoencoder("vae")
  decoder = FrameDecoder(a)
  for _ in range(2):
    decoder(latents(3)).block_until_ready()
  with compilations() as compiled:
    for _ in range(3):
      decoder(latents(3)).block_until_ready()
  assert compiled == []


def test_streams_do_not_disturb_each_other():
  a, _ = autoencoder("taehv")
  one, two = FrameDecoder(a), FrameDecoder(a)
  z = latents(6)
  one(z[:, :3])
  two(z[:, 3:])
  alone = FrameDecoder(a)
  alone(z[:, :3])
  np.testing.assert_array_equal(one(z[:, 3:]), alone(z[:, 3:]))


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
@pytest.mark.parametrize("kind", ["vae", "taehv"])
def test_clips_of_any_length_are_encoded(kind, frames):
  a, network = autoencoder(kind)
  x = np.random.default_rng(0).integers(0, 256, (1, frames, 8 * 2, 8 * 3, 3), np.uint8)
  got = a.encode(jnp.asarray(x))
  longer = np.concatenate([x, np.repeat(x[:, -1:], (1 - frames) % 4, axis=1)], axis=1)
  pixels = longer.astype(np.float32) / 127.5 - 1
  if kind == "taehv":
    pixels = np.concatenate([np.repeat(pixels[:, :1], 3, axis=1), pixels], axis=1)
  want = whole(network.encode, a, pixels)
  assert got.shape[1] == -(-(frames - 1) // 4) + 1
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_bytes_come_back():
  x = jnp.arange(256, dtype=jnp.uint8)[:, None].repeat(3, axis=1)
  np.testing.assert_array_equal(to_uint8(from_bytes(x)), x)
