"""The Wan autoencoder: name table, and its architecture from a published configuration."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from hfjax.convert import told
from hfjax.convert.table import Leaf, Table, linear, vector
from hfjax.models import vae
from hfjax.models.vae import VaeConfig


class _Module(NamedTuple):
  """One module: its path, its original name and Diffusers' name, and what it is."""

  path: str
  original: str
  diffusers: str
  kind: str

  @property
  def leaves(self) -> tuple[Leaf, ...]:
    if self.kind in _GAMMA:
      return vector(f"{self.path}/scale", f"{self.original}.gamma", _GAMMA[self.kind])
    return linear(self.path, self.original, _KERNEL[self.kind])


_GAMMA = {"norm": "c 1 1 1 -> c", "norm2d": "c 1 1 -> c"}
_KERNEL = {
  "conv": "o i t y x -> t y x i o",
  "conv2d": "o i y x -> y x i o",
  "point": "o i 1 1 1 -> i o",
  "point2d": "o i 1 1 -> i o",
}


def _residual(path: str, original: str, diffusers: str, shortcut: bool) -> Iterator[_Module]:
  for ours, theirs, kind in (
    ("norm1", "residual.0", "norm"),
    ("conv1", "residual.2", "conv"),
    ("norm2", "residual.3", "norm"),
    ("conv2", "residual.6", "conv"),
  ):
    yield _Module(f"{path}/{ours}", f"{original}.{theirs}", f"{diffusers}.{ours}", kind)
  if shortcut:
    yield _Module(f"{path}/shortcut", f"{original}.shortcut", f"{diffusers}.conv_shortcut", "point")


def _half(config: VaeConfig, half: str) -> Iterator[_Module]:
  """Modules of the encoder or the decoder (spec sections 9 and 11.3)."""
  encoder = half == "encoder"
  yield _Module(f"{half}/conv_in", f"{half}.conv1", f"{half}.conv_in", "conv")
  for i in (0, 1):
    yield from _residual(
      f"{half}/middle/residual_{i}",
      f"{half}.middle.{2 * i}",
      f"{half}.mid_block.resnets.{i}",
      shortcut=False,
    )
  for ours, theirs, kind in (
    ("norm", "norm", "norm2d"),
    ("qkv", "to_qkv", "point2d"),
    ("out", "proj", "point2d"),
  ):
    yield _Module(
      f"{half}/middle/attention/{ours}",
      f"{half}.middle.1.{theirs}",
      f"{half}.mid_block.attentions.0.{theirs}",
      kind,
    )
  # The originals number all blocks in one row, as Diffusers does in the encoder only.
  for i, block in enumerate(config.encoder_blocks if encoder else config.decoder_blocks):
    path = f"{half}/{'down' if encoder else 'up'}/block_{i}"
    original = f"{half}.{'downsamples' if encoder else 'upsamples'}.{i}"
    stage, place = divmod(i, config.num_res_blocks + 2)
    if encoder:
      diffusers = f"encoder.down_blocks.{i}"
    elif block.kind == "residual":
      diffusers = f"decoder.up_blocks.{stage}.resnets.{place}"
    else:
      diffusers = f"decoder.up_blocks.{stage}.upsamplers.0"
    if block.kind == "residual":
      yield from _residual(path, original, diffusers, block.in_dim != block.out_dim)
      continue
    yield _Module(f"{path}/conv", f"{original}.resample.1", f"{diffusers}.resample.1", "conv2d")
    if block.kind.endswith("3d"):
      yield _Module(f"{path}/time_conv", f"{original}.time_conv", f"{diffusers}.time_conv", "conv")
  yield _Module(f"{half}/head/norm", f"{half}.head.0", f"{half}.norm_out", "norm")
  yield _Module(f"{half}/head/conv", f"{half}.head.2", f"{half}.conv_out", "conv")
  if encoder:
    yield _Module("encoder/quant", "conv1", "quant_conv", "point")
  else:
    yield _Module("decoder/post_quant", "conv2", "post_quant_conv", "point")


@functools.cache  # the network is traced for its shapes
def table(config: VaeConfig) -> Table:
  """The name table of an architecture."""
  modules = (*_half(config, "encoder"), *_half(config, "decoder"))
  return Table(
    leaves=tuple(leaf for m in modules for leaf in m.leaves),
    init=lambda: vae.init_params(config, jax.random.key(0)),
    sizes={},
    diffusers={m.original: m.diffusers for m in modules},
  )


def from_original(config: VaeConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Nested parameters from tensors under original names; see `Table.from_original`."""
  return table(config).from_original(tensors)


def to_original(config: VaeConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Tensors under original names; see `Table.to_original`."""
  return table(config).to_original(params)


_WHAT = "autoencoder"
_KEYS = {
  "dim": "dim", "base_dim": "dim", "decoder_base_dim": "dim", "z_dim": "z_dim",
  "dim_mult": "dim_mult", "num_res_blocks": "num_res_blocks",
  "temperal_downsample": "temporal_downsample", "latents_mean": "mean", "latents_std": "std",
}  # fmt: skip
_ONLY = {
  "_class_name": ("AutoencoderKLWan",),
  "attn_scales": ((), None),
  "is_residual": (False, None),
  "in_channels": (3, None),
  "out_channels": (3, None),
  "patch_size": (1, None),
}


def owns(cfg: Mapping[str, Any]) -> bool:
  """Whether a config.json is an autoencoder's."""
  return told.is_of(cfg, _KEYS, "AutoencoderKLWan")


def told_by(cfg: Mapping[str, Any]) -> told.Told:
  """What the keys of Wan's class or of Diffusers' `vae/config.json` tell.

  Raises ValueError on an architecture that hfjax does not have.
  """
  return told.read(_WHAT, cfg, _KEYS, _ONLY)


def config_from_original(cfg: Mapping[str, Any]) -> VaeConfig:
  """Architecture from the keys of Wan's class or of Diffusers' `vae/config.json`.

  The published Wan2.1_VAE.pth has neither: it is `hfjax.models.vae.WAN21`.
  Raises ValueError on a missing key or an architecture that hfjax does not have.
  """
  need = ("dim", "z_dim", "dim_mult", "num_res_blocks", "temporal_downsample", "mean", "std")
  return VaeConfig(**told.values(_WHAT, told_by(cfg), *need))
