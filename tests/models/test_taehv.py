"""The tiny autoencoder against a slow one in NumPy, written from spec section 13; streaming."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.convert import taehv as names
from hfjax.models import taehv
from hfjax.models.taehv import TAEHV, TaehvConfig
from tests.helpers import compilations

SMALL = TaehvConfig(z_dim=3, encoder_dim=5, decoder_dims=(8, 6, 4, 5))
# Sums of other shapes round otherwise. Measured: up to 2e-7, of values up to 1.
ATOL = 5e-6

first = jax.jit(taehv.decode_first, static_argnames="dtype")
chunk = jax.jit(taehv.decode_chunk)
decode = jax.jit(taehv.decode, static_argnames="dtype")
encode_chunk = jax.jit(taehv.encode_chunk)
encode = jax.jit(taehv.encode, static_argnames="dtype")


@functools.cache
def tensors():
  """Random weights under published names."""
  rng = np.random.default_rng(0)
  return {
    name: (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) if len(shape) > 1 else 9))
    .astype(np.float32)
    for name, shape in names.table(SMALL).shapes.items()
  }  # fmt: skip


@functools.cache
def params():
  return jax.tree.map(jnp.asarray, names.from_original(SMALL, tensors()))


def latents(frames, batch=1):
  shape = (batch, frames, 2, 3, SMALL.z_dim)
  return jnp.asarray(2 * np.random.default_rng(2).standard_normal(shape), jnp.float32)


def video(frames, batch=1):
  shape = (batch, frames, 16, 24, 3)
  return jnp.asarray(np.random.default_rng(3).uniform(-1, 1, shape), jnp.float32)


# The oracle: one frame [c y x] at a time, in float64.
def conv(x, at, stride=1):
  w, b = tensors()[f"{at}.weight"].astype(np.float64), tensors().get(f"{at}.bias")
  k = w.shape[2]
  x = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2)))
  windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(1, 2))
  y = np.einsum("cyxij,ocij->oyx", windows[:, ::stride, ::stride], w)
  return y if b is None else y + b[:, None, None]


def relu(x):
  return np.maximum(x, 0)


def remember(frames, at):
  out, past = [], np.zeros_like(frames[0])
  for x in frames:
    y = relu(conv(np.concatenate([x, past]), f"{at}.conv.0"))
    out.append(relu(conv(relu(conv(y, f"{at}.conv.2")), f"{at}.conv.4") + x))
    past = x
  return out


def oracle_decode(z):
  frames = [3 * np.tanh(x / 3) for x in np.moveaxis(np.asarray(z, np.float64), -1, 1)]
  frames = [relu(conv(x, "decoder.1")) for x in frames]
  for start, grow in ((3, 1), (9, 2), (15, 2)):
    for at in range(start, start + 3):
      frames = remember(frames, f"decoder.{at}")
    frames = [x.repeat(2, axis=1).repeat(2, axis=2) for x in frames]
    frames = [conv(x, f"decoder.{start + 4}.conv") for x in frames]
    frames = [part for x in frames for part in np.split(x, grow)]
    frames = [conv(x, f"decoder.{start + 5}") for x in frames]
  frames = [np.clip(conv(relu(x), "decoder.22"), 0, 1) for x in frames]
  return np.moveaxis(2 * np.stack(frames[3:]) - 1, 1, -1)


def oracle_encode(video):
  frames = list(np.moveaxis((np.asarray(video, np.float64) + 1) / 2, -1, 1))
  while len(frames) % 4:
    frames.append(frames[-1])
  frames = [relu(conv(x, "encoder.0")) for x in frames]
  for start, pool in ((2, 2), (7, 2), (12, 1)):
    frames = [np.concatenate(frames[i : i + pool]) for i in range(0, len(frames), pool)]
    frames = [conv(conv(x, f"encoder.{start}.conv"), f"encoder.{start + 1}", 2) for x in frames]
    for at in range(start + 2, start + 5):
      frames = remember(frames, f"encoder.{at}")
  return np.moveaxis(np.stack([conv(x, "encoder.17") for x in frames]), 1, -1)


def test_decoding_equals_the_oracle():
  want = oracle_decode(latents(5)[0])
  assert want.shape == (17, 16, 24, 3) and 0.2 < (np.abs(want) < 1).mean() < 1
  got = decode(SMALL, params(), latents(5))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got[0], want, 0, ATOL)


@pytest.mark.parametrize("frames", [16, 17])
def test_encoding_equals_the_oracle(frames):
  want = oracle_encode(video(frames)[0])
  assert want.shape == (-(-frames // 4), 2, 3, 3) and want.std() > 0.05
  got = encode(SMALL, params(), video(frames))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got[0], want, 0, ATOL)


@pytest.mark.parametrize("pieces", [(1, 1, 1, 1), (3, 1), (1, 3)])
def test_decoded_pieces_equal_the_whole(pieces):
  """The first three frames are dropped at the start only."""
  z, at = latents(5), 1
  x, cache = first(SMALL, params(), z[:, :1])
  out = [x]
  for n in pieces:
    x, cache = chunk(SMALL, params(), cache, z[:, at : at + n])
    assert x.shape[1] == 4 * n
    out.append(x)
    at += n
  np.testing.assert_allclose(jnp.concatenate(out, axis=1), decode(SMALL, params(), z), 0, ATOL)


@pytest.mark.parametrize("pieces", [(1, 1, 1, 1), (3, 1)])
def test_encoded_pieces_equal_the_whole(pieces):
  x, at, out = video(16), 0, []
  cache = taehv.init_encoder_cache(SMALL, 1, 2, 3)
  for n in pieces:
    z, cache = encode_chunk(SMALL, params(), cache, x[:, at : at + 4 * n])
    out.append(z)
    at += 4 * n
  np.testing.assert_allclose(jnp.concatenate(out, axis=1), encode(SMALL, params(), x), 0, ATOL)


def test_a_scan_from_zeros_equals_the_whole():
  z = latents(5)

  @jax.jit
  def run(p, z):
    def step(cache, z):
      x, cache = taehv.decode_chunk(SMALL, p, cache, z[:, None])
      return cache, x

    start = taehv.init_decoder_cache(SMALL, 1, 2, 3)
    return jax.lax.scan(step, start, jnp.moveaxis(z, 1, 0))[1]

  x = jnp.moveaxis(run(params(), z), 0, 1).reshape(1, -1, 16, 24, 3)
  np.testing.assert_allclose(x[:, 3:], decode(SMALL, params(), z), 0, ATOL)


def test_two_programs_serve_streams_of_any_length():
  z = latents(6)
  _, cache = first(SMALL, params(), z[:, :1])
  chunk(SMALL, params(), cache, z[:, 1:2])
  with compilations() as seen:
    for n in (3, 6):
      _, cache = first(SMALL, params(), z[:, :1])
      for i in range(1, n):
        _, cache = chunk(SMALL, params(), cache, z[:, i : i + 1])
  assert not [name for name in seen if "code" in name]


def test_caches_keep_their_shapes():
  blank = taehv.init_decoder_cache(SMALL, 2, 2, 3, jnp.bfloat16)
  _, cache = first(SMALL, params(), latents(1, batch=2), dtype=jnp.bfloat16)
  kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), c) for c in (blank, cache)]
  blank = taehv.init_encoder_cache(SMALL, 2, 2, 3, jnp.bfloat16)
  _, cache = encode_chunk(SMALL, params(), blank, video(4, batch=2))
  kinds += [jax.tree.map(lambda x: (x.shape, x.dtype), c) for c in (blank, cache)]
  assert kinds[0] == kinds[1] and kinds[2] == kinds[3]


def test_a_batch_equals_its_members():
  for function, given in ((decode, latents(5, batch=2)), (encode, video(16, batch=2))):
    both = function(SMALL, params(), given)
    alone = jnp.concatenate([function(SMALL, params(), given[i : i + 1]) for i in range(2)])
    np.testing.assert_allclose(both, alone, 0, ATOL)


def test_half_precision_is_near():
  for function, given in ((decode, latents(5)), (encode, video(16))):
    exact = function(SMALL, params(), given)
    half = function(SMALL, params(), given, dtype=jnp.bfloat16)
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - exact).max() < 0.15


def test_sizes_of_the_published_model():
  assert (TAEHV.space_factor, TAEHV.time_factor) == (8, 4)
  shapes = jax.eval_shape(lambda: taehv.init_params(TAEHV, jax.random.key(0)))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == 11_315_539


@pytest.mark.parametrize(
  ("call", "sentence"),
  [
    (lambda p: taehv.encode(SMALL, p, video(4)[:, :, :12]), "12 x 24 pixels; .* multiples of 8"),
    (lambda p: taehv.encode(SMALL, p, video(4)[..., :2]), "3 channels"),
    (lambda p: taehv.decode(SMALL, p, latents(2)[..., :2]), "3 channels"),
    (lambda p: taehv.decode(SMALL, p, latents(2)[:, :0]), "at least one frame"),
    (lambda p: taehv.decode(SMALL, p, latents(2)[:0]), "no empty axis"),
    (lambda p: taehv.encode(SMALL, p, (255 * video(4)).astype(np.uint8)), "dtype uint8; give fl"),
    (lambda p: taehv.decode_chunk(SMALL, p, None, latents(1)), "cache is None; give what"),
    (lambda p: taehv.decode_first(SMALL, p, latents(2)), "got 2 frames"),
    (
      lambda p: taehv.encode_chunk(SMALL, p, taehv.init_encoder_cache(SMALL, 1, 2, 3), video(6)),
      "piece has 6 frames",
    ),
    (
      lambda p: taehv.encode_chunk(SMALL, p, taehv.init_encoder_cache(SMALL, 1, 1, 3), video(4)),
      "cache is of a batch of 1 with frames of 8 x 24, and the piece of 1 with 16 x 24",
    ),
    (
      lambda p: taehv.decode_chunk(SMALL, p, taehv.init_decoder_cache(SMALL, 2, 2, 3), latents(1)),
      "cache is of a batch of 2",
    ),
  ],
)
def test_wrong_clips_get_a_sentence(call, sentence):
  with pytest.raises(ValueError, match=sentence):
    call(params())


@pytest.mark.parametrize(
  ("sizes", "sentence"),
  [
    ({"z_dim": 0}, "size below 1"),
    ({"pools": (2, 1, 1)}, r"merges \(2, 1, 1\) .* makes \(1, 2, 2\)"),
    ({"decoder_dims": (8, 8)}, "2 decoder widths for 3 stages; give 4"),
  ],
)
def test_impossible_sizes_get_a_sentence(sizes, sentence):
  with pytest.raises(ValueError, match=sentence):
    TaehvConfig(**sizes)
