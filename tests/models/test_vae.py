"""The Wan autoencoder: streaming, and what it refuses. The goldens and Diffusers judge numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.models import vae
from hfjax.models.vae import WAN21, VaeConfig
from tests.helpers import assert_trees_close, compilations

# 4 pixels a side and 4 frames to a latent, but for the first frame.
SMALL = VaeConfig(
  dim=4, z_dim=3, mean=(0.5, -1.0, 0.25), std=(2.0, 0.5, 1.5), dim_mult=(1, 2, 2),
  num_res_blocks=1, temporal_downsample=(True, True),
)  # fmt: skip
# Two frames to a latent, in the decoder's first resampling.
HALF = dataclasses.replace(SMALL, dim=6, dim_mult=(1, 1, 2), temporal_downsample=(False, True))

# Sums of other shapes round otherwise. Measured: up to 4e-6, of values up to 3.
ATOL = 2e-5

first = jax.jit(vae.decode_first, static_argnames="dtype")
chunk = jax.jit(vae.decode_chunk)
decode = jax.jit(vae.decode, static_argnames=("dtype", "clamp"))
encode_first = jax.jit(vae.encode_first, static_argnames="dtype")
encode_chunk = jax.jit(vae.encode_chunk)
encode = jax.jit(vae.encode, static_argnames="dtype")


@functools.cache
def params(config=SMALL):
  """Parameters none of which is zero or one throughout."""
  rng = np.random.default_rng(0)

  def draw(path, x):
    noise = rng.standard_normal(x.shape).astype(np.float32)
    if path[-1].key == "kernel":
      return jnp.asarray(noise / np.sqrt(np.prod(x.shape[:-1])))
    return jnp.asarray(0.1 * noise + (path[-1].key == "scale"))

  shapes = jax.eval_shape(lambda: vae.init_params(config, jax.random.key(0)))
  return jax.tree_util.tree_map_with_path(draw, shapes)


def latents(frames, batch=1, config=SMALL):
  shape = (batch, frames, 2, 3, config.z_dim)
  return jnp.asarray(np.random.default_rng(2).standard_normal(shape), jnp.float32)


def video(frames, batch=1):
  shape = (batch, frames, 8, 12, 3)
  return jnp.asarray(np.random.default_rng(3).uniform(-1, 1, shape), jnp.float32)


def stream(begin, go_on, config, x, pieces, size):
  """`x` given to a stream in pieces of so many latent frames, after the first frame."""
  y, cache = begin(config, params(config), x[:, :1])
  out, at = [y], 1
  for n in pieces:
    y, cache = go_on(config, params(config), cache, x[:, at : at + n * size])
    at += n * size
    out.append(y)
  assert at == x.shape[1]
  return jnp.concatenate(out, axis=1)


@pytest.mark.parametrize("pieces", [(1, 1, 1, 1), (3, 1), (1, 3)])
def test_decoded_pieces_equal_the_whole(pieces):
  z = latents(5)
  whole = decode(SMALL, params(), z)
  assert whole.shape == (1, 17, 8, 12, 3) and whole.dtype == jnp.float32
  np.testing.assert_allclose(stream(first, chunk, SMALL, z, pieces, 1), whole, 0, ATOL)


@pytest.mark.parametrize("pieces", [(1, 1, 1, 1), (3, 1), (1, 3)])
def test_encoded_pieces_equal_the_whole(pieces):
  x = video(17)
  whole = encode(SMALL, params(), x)
  assert whole.shape == (1, 5, 2, 3, 3) and whole.dtype == jnp.float32
  np.testing.assert_allclose(
    stream(encode_first, encode_chunk, SMALL, x, pieces, 4), whole, 0, 2e-6
  )


def test_resampling_in_time_at_one_stage_only():
  z = latents(4, config=HALF)
  whole = decode(HALF, params(HALF), z)
  assert whole.shape == (1, 7, 8, 12, 3)
  np.testing.assert_allclose(stream(first, chunk, HALF, z, (3,), 1), whole, 0, ATOL)
  assert jax.eval_shape(encode, HALF, params(HALF), video(7)).shape == (1, 4, 2, 3, 3)


def test_a_scan_over_pieces_equals_the_whole():
  """From a cache of zeros, which holds the place until the first frame gives another."""

  @jax.jit
  def run(p, z):
    def step(carry, z):
      cache, begun = carry
      x, cache = jax.lax.cond(
        begun,
        lambda: vae.decode_chunk(SMALL, p, cache, z),
        lambda: (lambda x, c: (jnp.pad(x, ((0, 0), (3, 0), *3 * ((0, 0),))), c))(
          *vae.decode_first(SMALL, p, z)
        ),
      )
      return (cache, True), x

    start = (vae.init_decoder_cache(SMALL, 1, 2, 3), False)
    return jax.lax.scan(step, start, jnp.moveaxis(z, 1, 0)[:, :, None])[1]

  z = latents(5)
  x = jnp.moveaxis(run(params(), z), 0, 1).reshape(1, -1, 8, 12, 3)
  np.testing.assert_allclose(x[:, 3:], decode(SMALL, params(), z), 0, ATOL)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_half_precision_is_near_and_caches_keep_their_shapes(half):
  """What comes out is float32; a cache of zeros has the shapes of any other."""
  if half == "decoder":
    blank = vae.init_decoder_cache(SMALL, 2, 2, 3, jnp.bfloat16)
    whole, given, begin, go_on = decode, latents(5, batch=2), first, chunk
    size = 1
  else:
    blank = vae.init_encoder_cache(SMALL, 2, 2, 3, jnp.bfloat16)
    whole, given, begin, go_on = encode, video(17, batch=2), encode_first, encode_chunk
    size = 4
  x, cache = begin(SMALL, params(), given[:, :1], dtype=jnp.bfloat16)
  y, later = go_on(SMALL, params(), cache, given[:, 1 : 1 + 2 * size])
  kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), c) for c in (blank, cache, later)]
  assert kinds[0] == kinds[1] == kinds[2]
  assert {x.dtype for x in jax.tree.leaves(blank)} == {jnp.dtype(jnp.bfloat16)}
  assert not any(np.any(x) for x in jax.tree.leaves(blank))
  assert x.dtype == y.dtype == jnp.float32
  both = np.concatenate([x, y], axis=1)
  exact = np.asarray(whole(SMALL, params(), given))[:, : both.shape[1]]
  assert 0 < np.abs(both - exact).max() < 0.05 * np.abs(exact).max()


def test_two_programs_serve_streams_of_any_length():
  z, x = latents(6), video(21)
  stream(first, chunk, SMALL, z[:, :2], (1,), 1)
  stream(encode_first, encode_chunk, SMALL, x[:, :5], (1,), 4)
  with compilations() as seen:
    for n in (3, 6):
      _, cache = first(SMALL, params(), z[:, :1])
      for i in range(1, n):
        _, cache = chunk(SMALL, params(), cache, z[:, i : i + 1])
      _, cache = encode_first(SMALL, params(), x[:, :1])
      for i in range(1, n - 1):
        _, cache = encode_chunk(SMALL, params(), cache, x[:, 4 * i - 3 : 4 * i + 1])
  assert not [name for name in seen if "code" in name]


def test_frames_do_not_see_later_ones():
  z = latents(5)
  whole = decode(SMALL, params(), z)
  changed = decode(SMALL, params(), z.at[:, 2:].add(1.0))
  np.testing.assert_array_equal(whole[:, :5], changed[:, :5])
  assert not np.allclose(whole[:, 5], changed[:, 5])
  x = video(17)
  changed = encode(SMALL, params(), x.at[:, 5:].add(1.0))
  np.testing.assert_array_equal(encode(SMALL, params(), x)[:, :2], changed[:, :2])


def test_a_batch_equals_its_members():
  z, x = latents(5, batch=2), video(17, batch=2)
  for function, given in ((decode, z), (encode, x)):
    both = function(SMALL, params(), given)
    alone = jnp.concatenate([function(SMALL, params(), given[i : i + 1]) for i in range(2)])
    np.testing.assert_allclose(both, alone, 0, ATOL)


def test_latents_are_normalized_in_float32():
  mu = jnp.asarray([[[[[2.5, -0.5, 1.75]]]]], jnp.bfloat16)
  z = vae.normalize(SMALL, mu)
  np.testing.assert_allclose(np.ravel(z), [1.0, 1.0, 1.0], 1e-6)
  assert z.dtype == vae.denormalize(SMALL, mu).dtype == jnp.float32
  np.testing.assert_allclose(vae.denormalize(SMALL, z), mu.astype(jnp.float32), 1e-6)


def test_clamping_is_an_option():
  z, loud = latents(1), jax.tree.map(lambda x: x, params())
  loud["decoder"]["head"]["conv"]["kernel"] *= 5
  raw, cut = (decode(SMALL, loud, z, clamp=c) for c in (False, True))
  assert np.abs(raw).max() > 1
  np.testing.assert_array_equal(np.clip(raw, -1, 1), cut)


def test_gradients_of_the_norm_are_finite_at_zero():
  scale = {"params": {"scale": jnp.ones(4)}}
  grad = jax.grad(lambda x: vae.Norm().apply(scale, x).sum())(jnp.zeros((2, 4)))
  assert np.isfinite(grad).all()


@pytest.mark.parametrize("function", [vae.decode, vae.encode])
def test_memory_does_not_grow_with_length(function):
  """But for the clip itself, which is kept twice at most."""
  config = dataclasses.replace(SMALL, dim_mult=(1, 1), temporal_downsample=(True,))
  given = {vae.decode: latents, vae.encode: video}[function]
  weights = params(config)
  of = lambda n: jax.jit(function).lower(config, weights, given(n)).compile().memory_analysis()
  short, long = of(5), of(21)
  ends = lambda m: m.argument_size_in_bytes + m.output_size_in_bytes
  assert long.temp_size_in_bytes - short.temp_size_in_bytes <= 2 * (ends(long) - ends(short))


def test_sizes_of_the_published_model():
  """Spec sections 1 and 9."""
  assert (WAN21.space_factor, WAN21.time_factor) == (8, 4)
  assert [b.kind for b in WAN21.encoder_blocks].index("down3d") == 5
  widths = [(b.in_dim, b.out_dim) for b in WAN21.decoder_blocks]
  assert widths[3:5] == [(384, 192), (192, 384)] and widths[11] == (192, 96)
  shapes = jax.eval_shape(lambda: vae.init_params(WAN21, jax.random.key(0)))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == 126_892_531
  cache = jax.eval_shape(lambda: vae.init_decoder_cache(WAN21, 1, 60, 104, jnp.bfloat16))
  assert len(jax.tree.leaves(cache)) == 32
  assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) < 2**31


@pytest.mark.parametrize(
  ("call", "sentence"),
  [
    (lambda p: vae.encode(SMALL, p, video(8)), "has 8 frames; .* Cut it to 5, .* up to 9"),
    (lambda p: vae.encode(SMALL, p, video(5)[:, :, :6]), "6 x 12 pixels; .* of 4. Crop .* 4 x 12"),
    (lambda p: vae.encode(SMALL, p, video(5)[..., :2]), "shape .*2.; .* 3 channels"),
    (lambda p: vae.encode(SMALL, p, video(5)[:, :0]), "at least one frame"),
    (lambda p: vae.encode(SMALL, p, video(5)[:, :, :0]), "no empty axis"),
    (lambda p: vae.encode(SMALL, p, (255 * video(5)).astype(np.uint8)), "dtype uint8; give float"),
    (lambda p: vae.decode_chunk(SMALL, p, {}, latents(1)), "without conv_in; give what the call"),
    (lambda p: vae.encode_first(SMALL, p, video(5)), "got 5 frames; give it one"),
    (lambda p: vae.decode(SMALL, p, latents(2)[..., :2]), "shape .*2.; .* 3 channels"),
    (lambda p: vae.decode(SMALL, p, latents(2)[0]), "takes .batch, frames, rows, columns"),
    (lambda p: vae.decode_first(SMALL, p, latents(2)), "got 2 frames; give it one"),
    (
      lambda p: vae.encode_chunk(SMALL, p, vae.init_encoder_cache(SMALL, 1, 2, 3), video(6)),
      "piece has 6 frames; .* multiples of 4",
    ),
    (
      lambda p: vae.encode_chunk(SMALL, p, vae.init_encoder_cache(SMALL, 1, 3, 3), video(4)),
      "cache is of a batch of 1 with frames of 12 x 12, and the piece of 1 with 8 x 12",
    ),
    (
      lambda p: vae.decode_chunk(SMALL, p, vae.init_decoder_cache(SMALL, 2, 2, 3), latents(1)),
      "cache is of a batch of 2 .* piece of 1 with",
    ),
  ],
)
def test_wrong_clips_get_a_sentence(call, sentence):
  with pytest.raises(ValueError, match=sentence):
    call(params())


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"dim": 0}, "dim is 0; make it at least 1"),
    ({"mean": (1.0,)}, "1 latent means and 3 deviations for 3 latent channels"),
    ({"std": (1.0, 0.0, 1.0)}, "deviation is 0.0"),
    ({"temporal_downsample": (True,)}, "3 stages and 1 entries .* give 2"),
    ({"dim": 5, "dim_mult": (1, 2, 3)}, "15 wide; .* make dim even"),
  ],
)
def test_impossible_sizes_get_a_sentence(change, sentence):
  with pytest.raises(ValueError, match=sentence):
    dataclasses.replace(SMALL, **change)


def test_caches_do_not_leak_between_streams():
  z = latents(3)
  _, cache = first(SMALL, params(), z[:, :1])
  kept = jax.tree.map(np.asarray, cache)
  once, _ = chunk(SMALL, params(), cache, z[:, 1:])
  again, _ = chunk(SMALL, params(), cache, z[:, 1:])
  np.testing.assert_array_equal(once, again)
  assert_trees_close(kept, cache, 0)
