"""Names of the autoencoders; the oracles hold them to Diffusers' own."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from hfjax.convert import taehv as tiny_names
from hfjax.convert import vae as names
from hfjax.models import taehv, vae
from hfjax.models.taehv import TAEHV, TaehvConfig
from hfjax.models.vae import WAN21

SMALL = dataclasses.replace(
  WAN21, dim=4, z_dim=2, mean=(0.0, 1.0), std=(1.0, 2.0), num_res_blocks=1
)
TINY = TaehvConfig(z_dim=2, encoder_dim=3, decoder_dims=(8, 6, 4, 5), memory_blocks=2)
CASES = [(names, vae, SMALL), (tiny_names, taehv, TINY)]

# The configuration of the published model, under the keys of Wan's class and of Diffusers.
STATISTICS = {"latents_mean": list(WAN21.mean), "latents_std": list(WAN21.std)}
ORIGINAL = {
  "dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [],
  "temperal_downsample": [False, True, True], **STATISTICS,
}  # fmt: skip
DIFFUSERS = {
  "base_dim": 96, "decoder_base_dim": None, **{k: v for k, v in ORIGINAL.items() if k != "dim"},
  "dropout": 0.0, "is_residual": False, "in_channels": 3, "out_channels": 3, "patch_size": None,
  "scale_factor_temporal": 4, "scale_factor_spatial": 8,
}  # fmt: skip


def random(module, config, dtype=np.float32):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: module.init_params(config, jax.random.key(0)))
  return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(dtype), shapes)


@pytest.mark.parametrize(("convert", "module", "config"), CASES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_there_and_back_is_exact(convert, module, config, dtype):
  params = random(module, config, dtype)
  tensors = convert.to_original(config, params)
  assert {t.dtype for t in tensors.values()} == {np.dtype(dtype)}
  back = convert.from_original(config, tensors)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize(("convert", "module", "config"), CASES)
def test_the_table_covers_every_parameter(convert, module, config):
  paths = [leaf.path for leaf in convert.table(config).leaves]
  assert len(set(paths)) == len(paths)
  assert set(paths) == set(convert.table(config).our_shapes)


def residual(source, i, o):
  """Shapes of a residual block (spec section 9)."""
  yield from ((f"{source}.residual.0.gamma", (i, 1, 1, 1)), (f"{source}.residual.2.bias", (o,)))
  yield from ((f"{source}.residual.3.gamma", (o, 1, 1, 1)), (f"{source}.residual.6.bias", (o,)))
  yield f"{source}.residual.2.weight", (o, i, 3, 3, 3)
  yield f"{source}.residual.6.weight", (o, o, 3, 3, 3)
  if i != o:
    yield from ((f"{source}.shortcut.weight", (o, i, 1, 1, 1)), (f"{source}.shortcut.bias", (o,)))


def conv(source, o, i, *kernel):
  return (f"{source}.weight", (o, i, *kernel)), (f"{source}.bias", (o,))


def published():
  """Names and shapes of the published model, as spec section 9 lists them."""
  for half, ends in (("encoder", (3, 32)), ("decoder", (16, 3))):
    narrow, wide = (96, 384) if half == "encoder" else (384, 96)
    yield from conv(f"{half}.conv1", narrow, ends[0], 3, 3, 3)
    for i in (0, 2):
      yield from residual(f"{half}.middle.{i}", 384, 384)
    yield f"{half}.middle.1.norm.gamma", (384, 1, 1)
    yield from conv(f"{half}.middle.1.to_qkv", 1152, 384, 1, 1)
    yield from conv(f"{half}.middle.1.proj", 384, 384, 1, 1)
    yield f"{half}.head.0.gamma", (wide, 1, 1, 1)
    yield from conv(f"{half}.head.2", ends[1], wide, 3, 3, 3)
  yield from conv("conv1", 32, 32, 1, 1, 1)
  yield from conv("conv2", 16, 16, 1, 1, 1)
  for i, width in ((2, 96), (5, 192), (8, 384)):
    yield from conv(f"encoder.downsamples.{i}.resample.1", width, width, 3, 3)
  for i, width in ((5, 192), (8, 384)):
    yield from conv(f"encoder.downsamples.{i}.time_conv", width, width, 3, 1, 1)
  for i, width in ((3, 384), (7, 384), (11, 192)):
    yield from conv(f"decoder.upsamples.{i}.resample.1", width // 2, width, 3, 3)
  for i in (3, 7):
    yield from conv(f"decoder.upsamples.{i}.time_conv", 768, 384, 3, 1, 1)
  for i, (a, b) in {0: (96, 96), 1: (96, 96), 3: (96, 192), 4: (192, 192), 6: (192, 384),
                    7: (384, 384), 9: (384, 384), 10: (384, 384)}.items():  # fmt: skip
    yield from residual(f"encoder.downsamples.{i}", a, b)
  for i in (0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14):
    a, b = (384, 384) if i < 8 else (192, 192) if i < 12 else (96, 96)
    yield from residual(f"decoder.upsamples.{i}", 192 if i == 4 else a, b)


def test_published_names_and_shapes():
  shapes = names.table(WAN21).shapes
  assert len(shapes) == 194
  assert shapes == dict(published())


@pytest.mark.parametrize(
  ("original", "diffusers"),
  [
    ("conv1.weight", "quant_conv.weight"),
    ("conv2.bias", "post_quant_conv.bias"),
    ("encoder.conv1.weight", "encoder.conv_in.weight"),
    ("decoder.head.0.gamma", "decoder.norm_out.gamma"),
    ("decoder.head.2.weight", "decoder.conv_out.weight"),
    ("encoder.middle.2.residual.0.gamma", "encoder.mid_block.resnets.1.norm1.gamma"),
    ("decoder.middle.1.to_qkv.bias", "decoder.mid_block.attentions.0.to_qkv.bias"),
    ("encoder.downsamples.10.residual.6.bias", "encoder.down_blocks.10.conv2.bias"),
    ("encoder.downsamples.8.time_conv.bias", "encoder.down_blocks.8.time_conv.bias"),
    ("decoder.upsamples.4.shortcut.weight", "decoder.up_blocks.1.resnets.0.conv_shortcut.weight"),
    ("decoder.upsamples.11.resample.1.bias", "decoder.up_blocks.2.upsamplers.0.resample.1.bias"),
    ("decoder.upsamples.14.residual.3.gamma", "decoder.up_blocks.3.resnets.2.norm2.gamma"),
  ],
)
def test_names_of_diffusers(original, diffusers):
  assert names.table(WAN21).diffusers_name(original) == diffusers


@pytest.mark.parametrize("cfg", [ORIGINAL, DIFFUSERS])
def test_the_published_configurations(cfg):
  assert names.config_from_original(cfg) == WAN21


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"dim": None}, "does not tell dim; give"),
    ({"z_dim": None, "latents_std": None}, "does not tell z_dim, std"),
    ({"attn_scales": [0.5]}, r"has attn_scales \[0.5\]"),
    ({"latents_std": [float("nan")] * 16}, "std is .nan, .*; give a tuple of finite numbers"),
    ({"latents_mean": 0}, "mean is 0; give a tuple"),
    ({"dim_mult": [1, 2, 4, "a"]}, "dim_mult is"),
    ({"dim_mult": [1, 0, 4, 4]}, "give numbers from 1 on"),
    ({"temperal_downsample": [1, 0, 1]}, "temporal_downsample is"),
    ({"num_res_blocks": "2"}, "num_res_blocks is '2'"),
    ({"is_residual": True}, "has is_residual True; .* where it is False"),
    ({"decoder_base_dim": 160}, "dim is 96, and decoder_base_dim 160"),
  ],
)
def test_other_configurations_get_a_sentence(change, sentence):
  with pytest.raises(ValueError, match=sentence):
    names.config_from_original({**ORIGINAL, **change})


def test_missing_tensors_are_named():
  tensors = names.to_original(SMALL, random(vae, SMALL))
  tensors.pop("decoder.upsamples.2.time_conv.bias")
  with pytest.raises(ValueError, match=r"1 missing tensor: decoder.upsamples.2.time_conv.bias"):
    names.from_original(SMALL, tensors)


def test_tiny_published_names_and_shapes():
  """Spec section 13."""
  shapes, want = tiny_names.table(TAEHV).shapes, {}

  def add(at, o, i, bias=True, size=3):
    want.update({f"{at}.weight": (o, i, size, size)} | ({f"{at}.bias": (o,)} if bias else {}))

  for half, at, width in (
    *(("decoder", i, 256) for i in (3, 4, 5)), *(("decoder", i, 128) for i in (9, 10, 11)),
    *(("decoder", i, 64) for i in (15, 16, 17)),
    *(("encoder", i, 64) for i in (4, 5, 6, 9, 10, 11, 14, 15, 16)),
  ):  # fmt: skip
    for n, wide in ((0, 2 * width), (2, width), (4, width)):
      add(f"{half}.{at}.conv.{n}", width, wide)
  for at, o, i in ((1, 256, 16), (22, 3, 64)):
    add(f"decoder.{at}", o, i)
  for at, o, i in ((8, 128, 256), (14, 64, 128), (20, 64, 64)):
    add(f"decoder.{at}", o, i, bias=False)
  for at, o, i in ((7, 256, 256), (13, 256, 128), (19, 128, 64)):
    add(f"decoder.{at}.conv", o, i, bias=False, size=1)
  for at, o, i in ((0, 64, 3), (17, 16, 64)):
    add(f"encoder.{at}", o, i)
  for at in (3, 8, 13):
    add(f"encoder.{at}", 64, 64, bias=False)
  for at, i in ((2, 128), (7, 128), (12, 64)):
    add(f"encoder.{at}.conv", 64, i, bias=False, size=1)
  assert shapes == want


def test_tiny_takes_the_last_channels_of_a_wider_growth():
  params = random(taehv, TINY)
  tensors = tiny_names.to_original(TINY, params)
  name = "decoder.6.conv.weight"  # after two blocks and the upsampling
  tensors[name] = np.concatenate([np.zeros_like(tensors[name]), tensors[name]])
  back = tiny_names.from_original(TINY, tensors)
  np.testing.assert_array_equal(
    back["decoder"]["grow_0"]["kernel"], params["decoder"]["grow_0"]["kernel"]
  )
  tensors[name] = tensors[name][:3]
  with pytest.raises(ValueError, match=r"misshapen tensor: decoder.6.conv.weight"):
    tiny_names.from_original(TINY, tensors)
