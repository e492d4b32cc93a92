import dataclasses
import math

import jax
import ml_dtypes
import numpy as np
import pytest

from hfjax.convert import umt5 as names
from hfjax.models import umt5
from hfjax.models.umt5 import PRESETS, Umt5Config

MODEL = Umt5Config(vocab=50, dim=24, dim_attn=32, dim_ffn=40, heads=4, layers=2)
XXL = PRESETS["umt5-xxl"]


def random_params(dtype=np.float32):
  shapes = jax.eval_shape(lambda: umt5.init_params(MODEL, jax.random.key(0)))
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(dtype), shapes)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_there_and_back_is_exact(dtype):
  params = random_params(dtype)
  tensors = names.to_original(MODEL, params)
  assert {t.dtype for t in tensors.values()} == {np.dtype(dtype)}
  back = names.from_original(MODEL, tensors)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  again = names.to_original(MODEL, back)
  assert again.keys() == tensors.keys()
  assert all(np.array_equal(again[k], tensors[k]) for k in tensors)


def test_the_table_covers_every_parameter():
  table = names.table(MODEL)
  assert set(table.our_shapes) == {x.path for x in table.leaves}


def test_published_names_and_shapes():
  """Spec section 10; the vocabulary cut, since it is a gigabyte of rows."""
  shapes = names.table(dataclasses.replace(XXL, vocab=9)).shapes
  expected = {"token_embedding.weight": (9, 4096), "norm.weight": (4096,)}
  for i in range(24):
    expected |= {f"blocks.{i}.norm{n}.weight": (4096,) for n in (1, 2)}
    expected |= {f"blocks.{i}.attn.{x}.weight": (4096, 4096) for x in "qkvo"}
    expected |= {f"blocks.{i}.ffn.{x}.weight": (10240, 4096) for x in ("gate.0", "fc1")}
    expected[f"blocks.{i}.ffn.fc2.weight"] = (4096, 10240)
    expected[f"blocks.{i}.pos_embedding.embedding.weight"] = (32, 64)
  assert shapes == expected and len(shapes) == 242


def test_published_number_of_parameters():
  assert sum(math.prod(s) for s in names.table(XXL).our_shapes.values()) == 5_680_910_336


def test_heads_and_gate_go_where_they_belong():
  tensors = names.to_original(MODEL, random_params())
  blocks = names.from_original(MODEL, tensors)["blocks"]
  # Head 2 has rows 16 to 23 of a projection, and the same columns of the output's.
  np.testing.assert_array_equal(
    blocks["attn"]["qkv"]["kernel"][1, :, 1, 2, 3], tensors["blocks.1.attn.k.weight"][19]
  )
  np.testing.assert_array_equal(
    blocks["attn"]["out"]["kernel"][1, 2, 3], tensors["blocks.1.attn.o.weight"][:, 19]
  )
  for n, source in enumerate(("gate.0", "fc1")):
    np.testing.assert_array_equal(
      blocks["ffn"]["in"]["kernel"][0, :, n], tensors[f"blocks.0.ffn.{source}.weight"].T
    )


def test_transformers_names():
  """Spec section 11.3."""
  table = names.table(MODEL)
  layer = "encoder.block.17.layer"
  expected = {
    "token_embedding.weight": "shared.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
    "blocks.17.norm1.weight": f"{layer}.0.layer_norm.weight",
    "blocks.17.attn.o.weight": f"{layer}.0.SelfAttention.o.weight",
    "blocks.17.pos_embedding.embedding.weight":
      f"{layer}.0.SelfAttention.relative_attention_bias.weight",
    "blocks.17.norm2.weight": f"{layer}.1.layer_norm.weight",
    "blocks.17.ffn.gate.0.weight": f"{layer}.1.DenseReluDense.wi_0.weight",
    "blocks.17.ffn.fc1.weight": f"{layer}.1.DenseReluDense.wi_1.weight",
    "blocks.17.ffn.fc2.weight": f"{layer}.1.DenseReluDense.wo.weight",
  }  # fmt: skip
  assert {k: table.diffusers_name(k) for k in expected} == expected
  with pytest.raises(KeyError):
    table.diffusers_name("blocks.0.attn.bias.weight")


def test_other_tensors_than_expected_are_listed():
  tensors = names.to_original(MODEL, random_params())
  tensors.pop("norm.weight")
  with pytest.raises(ValueError, match=r"has 1 missing tensor: norm\.weight"):
    names.from_original(MODEL, tensors)


ORIGINAL = {
  "vocab": 256384, "dim": 4096, "dim_attn": 4096, "dim_ffn": 10240, "num_heads": 64,
  "num_layers": 24, "num_buckets": 32, "shared_pos": False,
}  # fmt: skip
TRANSFORMERS = {
  "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
  "num_heads": 64, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
  "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-06,
}  # fmt: skip


def test_architecture_from_a_published_config():
  assert names.config_from_original(ORIGINAL) == XXL
  assert names.config_from_transformers(TRANSFORMERS) == XXL


@pytest.mark.parametrize(
  ("read", "cfg", "sentence"),
  [
    (names.config_from_original, {"dim": 3}, "does not tell vocab, dim_attn, dim_ffn, heads"),
    (names.config_from_original, ORIGINAL | {"shared_pos": True}, "has shared_pos True"),
    (names.config_from_transformers, {}, "does not tell vocab, dim, dim_attn"),
    (names.config_from_transformers, TRANSFORMERS | {"model_type": "bert"}, "model_type 'bert'"),
    (names.config_from_transformers, TRANSFORMERS | {"layer_norm_epsilon": "a"}, "eps is 'a'"),
    (names.config_from_transformers, TRANSFORMERS | {"num_layers": 2.5}, "layers is 2.5"),
    (
      names.config_from_transformers,
      TRANSFORMERS | {"feed_forward_proj": "relu"},
      "feed_forward_proj 'relu'; .* where it is 'gated-gelu'",
    ),
  ],
)
def test_other_architectures_are_refused(read, cfg, sentence):
  with pytest.raises(ValueError, match=sentence):
    read(cfg)
