"""The autoencoder against Diffusers' AutoencoderKLWan (spec sections 9 and 11.3).

Both get the same random weights, by the name table of `hfjax.convert`, and the same inputs, in
float32. Diffusers leaves latents as they are; here they are normalised outside of it.
"""

import dataclasses
import functools
import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from hfjax.convert import vae as names
from hfjax.models import vae
from hfjax.models.vae import WAN21, VaeConfig

# Relative to the largest value. Both sides round the same sums in other orders. Measured: 1e-6 to
# 4e-6.
TOLERANCE = 2e-5

CASES = {
  # The published structure, narrow.
  "narrow": VaeConfig(dim=8, z_dim=4, mean=(0.5, -1.0, 0.0, 2.0), std=(2.0, 0.5, 1.0, 3.0)),
  # Time before space, other depths and widths.
  "other": VaeConfig(
    dim=6, z_dim=3, mean=(0.0, 1.0, -1.0), std=(1.0, 0.7, 1.4), dim_mult=(1, 3, 2),
    num_res_blocks=1, temporal_downsample=(True, False),
  ),
}  # fmt: skip

# Halves the time to compile, which is most of what these tests take.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make_theirs(config: VaeConfig):
  """Diffusers' model of an architecture."""
  return diffusers.AutoencoderKLWan(
    base_dim=config.dim,
    z_dim=config.z_dim,
    dim_mult=list(config.dim_mult),
    num_res_blocks=config.num_res_blocks,
    temperal_downsample=list(config.temporal_downsample),
    latents_mean=list(config.mean),
    latents_std=list(config.std),
  )


@functools.cache
def build(name: str):
  """The case's model of Diffusers with random weights, and our parameters."""
  config = CASES[name]
  model = make_theirs(config).eval()
  generator = torch.Generator().manual_seed(7)
  with torch.no_grad():
    for key, p in model.named_parameters():
      noise = torch.randn(p.shape, generator=generator)
      if key.endswith("gamma"):
        p.copy_(1 + 0.3 * noise)
      elif p.ndim == 1:
        p.copy_(0.3 * noise)
      else:
        p.copy_(noise / math.sqrt(p[0].numel()))
  table, state = names.table(config), model.state_dict()
  tensors = {n: state[table.diffusers_name(n)].numpy() for n in table.shapes}
  return model, jax.tree.map(jnp.asarray, names.from_original(config, tensors))


def difference(actual, desired: torch.Tensor) -> float:
  """Largest difference, relative to the largest desired value; theirs has channels second."""
  desired = np.moveaxis(desired.detach().numpy(), 1, -1)
  assert actual.shape == desired.shape
  return float(np.abs(np.asarray(actual) - desired).max() / np.abs(desired).max())


def to_theirs(x: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def statistics(config: VaeConfig):
  """Mean and deviation of latents, to broadcast over Diffusers' layout."""
  return (torch.tensor(x).reshape(1, -1, 1, 1, 1) for x in (config.mean, config.std))


@pytest.mark.parametrize("name", CASES)
def test_names(name):
  model, table = build(name)[0], names.table(CASES[name])
  found = {table.diffusers_name(n): shape for n, shape in table.shapes.items()}
  assert found == {k: tuple(v.shape) for k, v in model.state_dict().items()}


def test_names_and_configuration_of_the_published_model():
  with torch.device("meta"):
    model = diffusers.AutoencoderKLWan()
  table = names.table(WAN21)
  found = {table.diffusers_name(n): shape for n, shape in table.shapes.items()}
  assert len(found) == 194
  assert found == {k: tuple(v.shape) for k, v in model.state_dict().items()}
  assert names.config_from_original(model.config) == WAN21


@pytest.mark.parametrize("name, frames", [("narrow", 1), ("narrow", 9), ("other", 9)])
def test_encode(name, frames):
  config, (model, params) = CASES[name], build(name)
  rng = np.random.default_rng(frames)
  video = rng.uniform(-1, 1, (2, frames, 16, 24, 3)).astype(np.float32)
  mean, std = statistics(config)
  with torch.no_grad():
    theirs = (model.encode(to_theirs(video)).latent_dist.mode() - mean) / std
  ours = fast_jit(vae.encode)(config, params, video)
  assert difference(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("name, frames", [("narrow", 1), ("narrow", 4), ("other", 4)])
def test_decode(name, frames):
  config, (model, params) = CASES[name], build(name)
  z = np.random.default_rng(frames).standard_normal((2, frames, 3, 4, config.z_dim))
  z = z.astype(np.float32)
  mean, std = statistics(config)
  with torch.no_grad():
    theirs = model.decode(to_theirs(z) * std + mean).sample
  assert (theirs.abs() == 1).float().mean() < 0.9
  ours = fast_jit(functools.partial(vae.decode, clamp=True))(config, params, z)
  assert difference(ours, theirs) < TOLERANCE


def test_decode_in_pieces():
  """The streaming decoder against Diffusers' whole clip."""
  config, (model, params) = CASES["narrow"], build("narrow")
  z = np.random.default_rng(5).standard_normal((1, 4, 3, 4, config.z_dim)).astype(np.float32)
  mean, std = statistics(config)
  with torch.no_grad():
    theirs = model.decode(to_theirs(z) * std + mean).sample
  x, cache = fast_jit(vae.decode_first)(config, params, z[:, :1])
  more, _ = fast_jit(vae.decode_chunk)(config, params, cache, z[:, 1:])
  ours = jnp.clip(jnp.concatenate([x, more], axis=1), -1, 1)
  assert difference(ours, theirs) < TOLERANCE


def test_gradients_of_the_decoder():
  """Of every parameter of the decoder and the latents, through the loop over latent frames."""
  config, (model, params) = CASES["other"], build("other")
  rng = np.random.default_rng(6)
  z = rng.standard_normal((1, 3, 3, 4, config.z_dim)).astype(np.float32)
  cotangent = rng.standard_normal((1, 5, 12, 16, 3)).astype(np.float32)
  mean, std = statistics(config)
  given = to_theirs(z).requires_grad_()
  # Their clamp cuts gradients, so what comes before it is taken.
  seen = []
  handle = model.decoder.register_forward_hook(lambda m, i, o: seen.append(o))
  model.decode(given * std + mean)
  handle.remove()
  out = torch.cat(seen, dim=2)
  named = {k: p for k, p in model.named_parameters() if "encoder" not in k and k[:6] != "quant_"}
  found = torch.autograd.grad((out * to_theirs(cotangent)).sum(), [given, *named.values()])

  @fast_jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def gradient(params, z):
    return (vae.decode(config, params, z) * cotangent).sum()

  of_params, of_latents = gradient(params, z)
  assert difference(of_latents, found[0]) < TOLERANCE
  table, ours = names.table(config), names.to_original(config, of_params)
  theirs = dict(zip(named, found[1:], strict=True))
  for name, grad in ours.items():
    if table.diffusers_name(name) in theirs:
      want = theirs.pop(table.diffusers_name(name)).numpy()
      assert np.abs(grad - want).max() < 1e-4 * np.abs(want).max(), name
  assert not theirs


def test_a_larger_batch_and_other_statistics():
  """Latents come normalised: shifting and scaling the statistics does so to the latents."""
  config, (_, params) = CASES["other"], build("other")
  other = dataclasses.replace(config, mean=(2.0, 0.0, 0.0), std=(0.5, 1.0, 2.0))
  z = np.random.default_rng(8).standard_normal((2, 2, 3, 4, 3)).astype(np.float32)
  raw = z * np.asarray(config.std, np.float32) + np.asarray(config.mean, np.float32)
  moved = (raw - np.asarray(other.mean, np.float32)) / np.asarray(other.std, np.float32)
  run = fast_jit(vae.decode)
  np.testing.assert_allclose(run(config, params, z), run(other, params, moved), 0, 1e-4)
