"""The tiny autoencoder against one in PyTorch, written from spec section 13 only."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from hfjax.convert import taehv as names
from hfjax.models import taehv
from hfjax.models.taehv import TAEHV, TaehvConfig

# Of pixels in [-1, 1] and latents of up to about 3. Measured: 1e-6.
TOLERANCE = 1e-5

SMALL = TaehvConfig(z_dim=4, encoder_dim=6, decoder_dims=(12, 8, 6, 4))
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def folded(layer, x):
  """A layer of images applied to clips `[b t c y x]`."""
  y = layer(x.flatten(0, 1))
  return y.reshape(*x.shape[:2], *y.shape[1:])


class Mem(nn.Module):
  def __init__(self, width):
    super().__init__()
    conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
    self.conv = nn.Sequential(
      conv(2 * width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width)
    )

  def forward(self, x):
    past = functional.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
    return functional.relu(folded(self.conv, torch.cat([x, past], dim=2)) + x)


class Grow(nn.Module):
  def __init__(self, width, frames):
    super().__init__()
    self.frames, self.conv = frames, nn.Conv2d(width, width * frames, 1, bias=False)

  def forward(self, x):
    return folded(self.conv, x).unflatten(2, (self.frames, -1)).flatten(1, 2)


class Pool(nn.Module):
  def __init__(self, width, frames):
    super().__init__()
    self.frames, self.conv = frames, nn.Conv2d(width * frames, width, 1, bias=False)

  def forward(self, x):
    return folded(self.conv, x.unflatten(1, (-1, self.frames)).flatten(2, 3))


class Clamp(nn.Module):
  def forward(self, x):
    return 3 * torch.tanh(x / 3)


def make(config: TaehvConfig):
  """Encoder and decoder, their layers numbered as published."""
  conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
  e, d = config.encoder_dim, config.decoder_dims
  encoder = [conv(3, e), nn.ReLU()]
  for frames in config.pools:
    encoder += [Pool(e, frames), conv(e, e, stride=2, bias=False)]
    encoder += [Mem(e) for _ in range(config.memory_blocks)]
  encoder.append(conv(e, config.z_dim))
  decoder = [Clamp(), conv(config.z_dim, d[0]), nn.ReLU()]
  for i, frames in enumerate(config.grows):
    decoder += [Mem(d[i]) for _ in range(config.memory_blocks)]
    decoder += [nn.Upsample(scale_factor=2), Grow(d[i], frames), conv(d[i], d[i + 1], bias=False)]
  decoder += [nn.ReLU(), conv(d[-1], 3)]
  return nn.ModuleDict({"encoder": nn.ModuleList(encoder), "decoder": nn.ModuleList(decoder)})


def run(layers, x):
  for layer in layers:
    images = isinstance(layer, (nn.Conv2d, nn.Upsample))
    x = folded(layer, x) if images else layer(x)
  return x


@functools.cache
def build():
  """The model in PyTorch with random weights, and our parameters."""
  model = make(SMALL).eval()
  generator = torch.Generator().manual_seed(3)
  with torch.no_grad():
    for p in model.parameters():
      scale = 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.3
      p.copy_(scale * torch.randn(p.shape, generator=generator))
  tensors = {k: v.numpy() for k, v in model.state_dict().items()}
  return model, jax.tree.map(jnp.asarray, names.from_original(SMALL, tensors))


def test_names():
  for config in (SMALL, TAEHV):
    with torch.device("meta"):
      shapes = {k: tuple(v.shape) for k, v in make(config).state_dict().items()}
    assert names.table(config).shapes == shapes


@pytest.mark.parametrize("frames", [1, 4])
def test_decode(frames):
  model, params = build()
  z = 3 * np.random.default_rng(0).standard_normal((2, frames, 3, 4, 4)).astype(np.float32)
  with torch.no_grad():
    x = run(model["decoder"], torch.from_numpy(z).permute(0, 1, 4, 2, 3))
  theirs = 2 * x.clamp(0, 1)[:, 3:].permute(0, 1, 3, 4, 2).numpy() - 1
  assert (np.abs(theirs) < 1).mean() > 0.1
  ours = np.asarray(fast_jit(taehv.decode)(SMALL, params, z))
  assert ours.shape == theirs.shape == (2, 4 * frames - 3, 24, 32, 3)
  assert np.abs(ours - theirs).max() < TOLERANCE


@pytest.mark.parametrize("frames", [5, 8])
def test_encode(frames):
  model, params = build()
  video = np.random.default_rng(1).uniform(-1, 1, (2, frames, 24, 16, 3)).astype(np.float32)
  x = (torch.from_numpy(video).permute(0, 1, 4, 2, 3) + 1) / 2
  x = torch.cat([x, *[x[:, -1:]] * (-frames % 4)], dim=1)
  with torch.no_grad():
    theirs = run(model["encoder"], x).permute(0, 1, 3, 4, 2).numpy()
  ours = np.asarray(fast_jit(taehv.encode)(SMALL, params, video))
  assert ours.shape == theirs.shape
  assert np.abs(ours - theirs).max() < TOLERANCE
