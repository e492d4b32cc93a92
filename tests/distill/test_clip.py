"""The end of a rollout as a clip, against decoding and encoding whole clips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.distill import clip
from hfjax.models import vae
from tests.helpers import compilations, drawn_params

CONFIG = vae.VaeConfig(
  dim=4, z_dim=3, mean=(0.5, -1.0, 0.25), std=(2.0, 0.5, 1.5), dim_mult=(1, 2, 2),
  num_res_blocks=1, temporal_downsample=(True, True),
)  # fmt: skip
PARAMS = drawn_params(vae.init_params, CONFIG)
CHUNK, LAST, MOST = 2, 2, 5
ALL = jax.random.normal(jax.random.key(1), (2, MOST * CHUNK, 2, 3, 3))

decode, encode = (jax.jit(x, static_argnums=0) for x in (vae.decode, vae.encode))


@jax.jit
def first(latents, chunks):
  return clip.first_of_clip(CONFIG, PARAMS, latents, chunks, CHUNK, LAST, jnp.float32)


@pytest.mark.parametrize("chunks", [3, 5])
def test_the_first_latent_is_the_frame_at_its_place_encoded_alone(chunks):
  frames = chunks * CHUNK
  latents = ALL.at[:, frames:].set(jnp.nan)  # nothing of it is read
  end = frames - LAST * CHUNK + 1
  pixels = decode(CONFIG, PARAMS, ALL[:, :end])
  want = encode(CONFIG, PARAMS, jnp.clip(pixels[:, -1:], -1, 1))
  np.testing.assert_allclose(first(latents, chunks), want, atol=1e-5)


@pytest.mark.parametrize(("decoded", "begin"), [(1, 4), (2, 2), (3, 0), (9, 0)])
def test_so_many_chunks_before_the_clip_are_decoded(decoded, begin):
  end = (MOST - LAST) * CHUNK + 1
  latents = ALL.at[:, :begin].set(jnp.nan)  # nothing of it is read
  got = jax.jit(clip.first_of_clip, static_argnums=(0, 4, 5, 6, 7))(
    CONFIG, PARAMS, latents, MOST, CHUNK, LAST, jnp.float32, decoded
  )
  pixels = decode(CONFIG, PARAMS, ALL[:, begin:end])
  want = encode(CONFIG, PARAMS, jnp.clip(pixels[:, -1:], -1, 1))
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_clip_that_is_all_there_is_stays_as_it_is():
  np.testing.assert_array_equal(first(ALL, LAST), ALL[:, :1])


def test_one_compilation_serves_all_lengths():
  first(ALL, LAST).block_until_ready()
  with compilations() as compiled:
    for chunks in range(LAST, MOST + 1):
      first(ALL, chunks).block_until_ready()
  assert not compiled


def test_gradients_are_those_of_the_other_latents():
  def total(latents):
    one = clip.first_of_clip(CONFIG, PARAMS, latents, 4, CHUNK, LAST, jnp.float32)
    return clip.as_clip(latents[:, 4:8], one).sum()

  got = np.asarray(jax.jit(jax.grad(total))(ALL))
  want = np.zeros_like(got)
  want[:, 5:8] = 1
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("chunks", "want"), [(2, [1, 1, 1, 1]), (4, [0, 0, 1, 1])])
def test_the_chunk_that_was_encoded_anew_does_not_count(chunks, want):
  assert list(clip.mask_of_clip(chunks, CHUNK, LAST).ravel()) == want
