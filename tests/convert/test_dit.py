import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from hfjax.convert import CheckpointError, dit
from hfjax.models import wan
from hfjax.models.presets import PRESETS
from tests.helpers import MODEL, random_params

IMAGE = dataclasses.replace(MODEL, image_dim=8)
CONFIGS = [MODEL, dataclasses.replace(MODEL, linear=False), IMAGE]


@pytest.mark.parametrize("config", CONFIGS)
def test_there_and_back_is_exact(config):
  params = jax.tree.map(np.asarray, random_params(config))
  tensors = dit.to_original(config, params)
  back = dit.from_original(config, tensors)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  again = dit.to_original(config, back)
  assert again.keys() == tensors.keys()
  assert all(np.array_equal(again[k], tensors[k]) for k in tensors)


def test_dtypes_stay_as_they_are():
  import ml_dtypes

  half = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), random_params())
  tensors = dit.to_original(MODEL, half)
  assert {t.dtype for t in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
  back = dit.from_original(MODEL, tensors)
  jax.tree.map(np.testing.assert_array_equal, back, half)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_table_covers_every_parameter(config):
  shapes = jax.eval_shape(lambda k: wan.init_params(config, k), jax.random.key(0))
  paths = jax.tree_util.tree_flatten_with_path(shapes)[0]
  assert {"/".join(k.key for k in p) for p, _ in paths} == {
    x.path for x in dit.table(config).leaves
  }


def test_published_names_and_shapes():
  """Spec section 11.1."""
  config = dataclasses.replace(IMAGE, layers=1)
  shapes = {k: v.shape for k, v in dit.to_original(config, random_params(config)).items()}
  d, f = 32, 48
  assert shapes["patch_embedding.weight"] == (d, 4, 1, 2, 2)
  assert shapes["time_projection.1.weight"] == (6 * d, d)
  assert shapes["blocks.0.modulation"] == (1, 6, d)
  assert shapes["blocks.0.self_attn.linear_proj.weight"] == (16, 16)
  assert shapes["blocks.0.ffn.0.weight"] == (f, d) and shapes["blocks.0.ffn.2.bias"] == (d,)
  assert shapes["head.head.weight"] == (16, d) and shapes["head.modulation"] == (1, 2, d)
  assert shapes["img_emb.proj.1.weight"] == (8, 8)
  assert shapes["blocks.0.cross_attn.norm_k_img.weight"] == (d,)


def test_rotary_rows_pair_neighbours_there_and_halves_here():
  tensors = dit.to_original(MODEL, random_params())
  ours = dit.from_original(MODEL, tensors)["blocks"]["self_attn"]
  theirs = tensors["blocks.1.self_attn.k.weight"]
  # Head 1 has rows 16 to 31 there; its pair 3 is rows 22 and 23, here channels 3 and 11.
  np.testing.assert_array_equal(ours["qkv"]["kernel"][1, :, 1, 1, 3], theirs[22])
  np.testing.assert_array_equal(ours["qkv"]["kernel"][1, :, 1, 1, 11], theirs[23])
  # Values are not rotated, so theirs stay in order.
  values = tensors["blocks.1.self_attn.v.weight"]
  np.testing.assert_array_equal(ours["qkv"]["kernel"][1, :, 2, 1, 3], values[19])


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    (lambda t: t.pop("head.head.bias"), "has 1 missing tensor: head.head.bias"),
    (lambda t: t.update(extra=np.zeros(1)), "has 1 unexpected tensor: extra"),
    (
      lambda t: t.update({"head.head.bias": np.zeros(5)}),
      r"head.head.bias \[5\] instead of \[16\]",
    ),
    (lambda t: [t.pop(k) for k in list(t) if "blocks" in k], "58 missing tensors: .* and 38 more"),
  ],
)
def test_other_tensors_than_expected_are_listed(change, sentence):
  tensors = dit.to_original(MODEL, random_params())
  change(tensors)
  with pytest.raises(ValueError, match=sentence):
    dit.from_original(MODEL, tensors)


CFG = {
  "model_type": "t2v", "patch_size": [1, 2, 2], "text_len": 512, "in_dim": 16, "dim": 1536,
  "ffn_dim": 8960, "freq_dim": 256, "text_dim": 4096, "out_dim": 16, "num_heads": 12,
  "num_layers": 30, "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip


def test_architecture_from_a_published_config():
  assert dit.config_from_original(CFG, linear=False) == PRESETS["wan-1.3b"]
  assert dit.config_from_original(CFG, linear=True) == PRESETS["hybrid-1.3b"]


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"dim": None, "num_heads": None}, "does not tell dim, heads"),
    ({"qk_norm": False}, "has qk_norm False; .* where it is True"),
    ({"cross_attn_norm": False}, "has cross_attn_norm False"),
    ({"model_type": "flf2v"}, "By its model_type this is Wan 2.1 FLF2V"),
    ({"model_type": "ti2v"}, "By its model_type this is Wan 2.2 TI2V, .* only Wan 2.1's text-to"),
    ({"model_type": "vace"}, "model_type 'vace'; .* 't2v' or 'i2v'"),
    ({"_class_name": "FluxTransformer2DModel"}, "is of a FluxTransformer2DModel"),
    ({"in_channels": 36}, "contradicts itself: in_dim is 16, and in_channels 36"),
    ({"num_attention_heads": 12, "attention_head_dim": 64}, "attention_head_dim 768"),
    ({"eps": float("nan")}, "eps is nan; it must be a number"),
    ({"patch_size": [2, 2, 2]}, "one frame deep"),
  ],
)
def test_other_architectures_are_refused(change, sentence):
  cfg = {k: v for k, v in {**CFG, **change}.items() if v is not None}
  with pytest.raises(ValueError, match=sentence):
    dit.config_from_original(cfg, linear=False)


@pytest.mark.parametrize(
  ("names", "sizes", "sentence"),
  [
    (["img_emb.proj.0.weight", "img_emb.emb_pos"], (5120, 36, 16), "this is Wan 2.1 FLF2V"),
    (["condition_embedder.image_embedder.pos_embed"], (5120, 36, 16), "this is Wan 2.1 FLF2V"),
    ([], (5120, 36, 16), "this is Wan 2.2 I2V, .* hfjax has only Wan 2.1's"),
    ([], (3072, 48, 48), "this is Wan 2.2 TI2V"),
    (["img_emb.proj.0.weight"], (5120, 36, 16), None),
    ([], (5120, 16, 16), None),
  ],
)
def test_models_of_the_family_that_are_not_there_are_named(names, sizes, sentence):
  expect = pytest.raises(CheckpointError, match=sentence) if sentence else contextlib.nullcontext()
  with expect:
    dit.check_family(names, *sizes)


@pytest.mark.parametrize(
  ("cfg", "owned"),
  [
    (CFG, True),
    ({"_class_name": "WanTransformer3DModel"}, True),
    ({"_class_name": "CausalWanModel"}, True),
    ({"model_type": "ti2v"}, True),
    ({"dim": 1536, "num_layers": 30}, True),
    ({"model_type": "llama", "num_hidden_layers": 30, "num_attention_heads": 12}, False),
    ({"lr": 1e-4, "eps": 1e-8, "model_type": None}, False),
    ({}, False),
  ],
)
def test_configurations_of_other_programs_are_told_apart(cfg, owned):
  assert dit.owns(cfg) == owned


def test_diffusers_names():
  """Spec section 11.3; the affine norm and the other one swap numbers."""
  table = dit.table(IMAGE)
  names = {
    "blocks.7.norm3.weight": "blocks.7.norm2.weight",
    "blocks.0.self_attn.o.bias": "blocks.0.attn1.to_out.0.bias",
    "blocks.12.cross_attn.norm_k_img.weight": "blocks.12.attn2.norm_added_k.weight",
    "blocks.3.modulation": "blocks.3.scale_shift_table",
    "head.modulation": "scale_shift_table",
    "time_projection.1.weight": "condition_embedder.time_proj.weight",
  }
  for original, diffusers in names.items():
    assert table.diffusers_name(original) == diffusers
  with pytest.raises(KeyError):
    table.diffusers_name("blocks.0.other.weight")
