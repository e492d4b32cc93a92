"""The UMT5 text encoder: name table, and its architecture from a published configuration."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from hfjax.convert.table import Leaf, Table, vector
from hfjax.models import umt5
from hfjax.models.umt5 import Umt5Config

_HEAD_ROWS = "(h d) i -> i h d"
_ROWS = "o i -> i o"
_ATTN, _FFN = "blocks.{i}.attn", "blocks.{i}.ffn"

_LEAVES: tuple[Leaf, ...] = (
  *vector("token_embedding", "token_embedding.weight", "v o -> v o"),
  *vector("blocks/norm1/scale", "blocks.{i}.norm1.weight"),
  Leaf(
    "blocks/attn/qkv/kernel",
    (f"{_ATTN}.q.weight", f"{_ATTN}.k.weight", f"{_ATTN}.v.weight"),
    (_HEAD_ROWS,) * 3,
    axis=1,
  ),
  *vector(
    "blocks/attn/position", "blocks.{i}.pos_embedding.embedding.weight", "bucket h -> bucket h"
  ),
  *vector("blocks/attn/out/kernel", f"{_ATTN}.o.weight", "o (h d) -> h d o"),
  *vector("blocks/norm2/scale", "blocks.{i}.norm2.weight"),
  Leaf(
    "blocks/ffn/in/kernel", (f"{_FFN}.gate.0.weight", f"{_FFN}.fc1.weight"), (_ROWS,) * 2, axis=1
  ),
  *vector("blocks/ffn/out/kernel", f"{_FFN}.fc2.weight", _ROWS),
  *vector("norm/scale", "norm.weight"),
)

_LAYER = "encoder.block.{i}.layer"

# Module names of Transformers' UMT5EncoderModel, by original module name; shapes are the same.
TRANSFORMERS: dict[str, str] = {
  "token_embedding": "shared",
  "norm": "encoder.final_layer_norm",
  "blocks.{i}.norm1": f"{_LAYER}.0.layer_norm",
  **{f"{_ATTN}.{x}": f"{_LAYER}.0.SelfAttention.{x}" for x in "qkvo"},
  "blocks.{i}.pos_embedding.embedding": f"{_LAYER}.0.SelfAttention.relative_attention_bias",
  "blocks.{i}.norm2": f"{_LAYER}.1.layer_norm",
  f"{_FFN}.gate.0": f"{_LAYER}.1.DenseReluDense.wi_0",
  f"{_FFN}.fc1": f"{_LAYER}.1.DenseReluDense.wi_1",
  f"{_FFN}.fc2": f"{_LAYER}.1.DenseReluDense.wo",
}


def table(config: Umt5Config) -> Table:
  """The name table of an architecture; its Diffusers names are those of Transformers."""
  return Table(
    leaves=_LEAVES,
    init=lambda: umt5.init_params(config, jax.random.key(0)),
    sizes={"h": config.heads},
    diffusers=TRANSFORMERS,
    layers=config.layers,
  )


def tied_to(name: str) -> str:
  """The Transformers name that holds a tensor's values: another one for a tied copy, else its own.

  A file may hold the token embedding under either name or both.
  """
  return "shared.weight" if name == "encoder.embed_tokens.weight" else name


def from_original(config: Umt5Config, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Nested parameters from tensors under original names; see `Table.from_original`."""
  return table(config).from_original(tensors)


def to_original(config: Umt5Config, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Tensors under original names; see `Table.to_original`."""
  return table(config).to_original(params)


def config_from_original(cfg: Mapping[str, Any]) -> Umt5Config:
  """Architecture from the arguments of the original encoder.

  Raises ValueError on a missing key or an architecture that hfjax does not have.
  """
  _need(cfg, "vocab", "dim", "dim_attn", "dim_ffn", "num_heads", "num_layers", "num_buckets")
  if cfg.get("shared_pos", False):
    raise ValueError(
      "The text encoder shares one position bias among its layers; UMT5 has one for each layer, "
      "and hfjax supports only this."
    )
  return Umt5Config(
    vocab=cfg["vocab"],
    dim=cfg["dim"],
    dim_attn=cfg["dim_attn"],
    dim_ffn=cfg["dim_ffn"],
    heads=cfg["num_heads"],
    layers=cfg["num_layers"],
    buckets=cfg["num_buckets"],
    max_distance=cfg.get("max_distance", 128),
    eps=cfg.get("eps", 1e-6),
  )


def config_from_transformers(cfg: Mapping[str, Any]) -> Umt5Config:
  """Architecture from the keys of a Transformers `config.json`.

  Raises ValueError on a missing key or an architecture that hfjax does not have.
  """
  _need(cfg, "vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers")
  if cfg.get("feed_forward_proj", "gated-gelu") != "gated-gelu":
    raise ValueError(
      f"The text encoder's feed-forward is {cfg['feed_forward_proj']}; hfjax has gated-gelu only, "
      "as UMT5."
    )
  return Umt5Config(
    vocab=cfg["vocab_size"],
    dim=cfg["d_model"],
    dim_attn=cfg["num_heads"] * cfg["d_kv"],
    dim_ffn=cfg["d_ff"],
    heads=cfg["num_heads"],
    layers=cfg["num_layers"],
    buckets=cfg.get("relative_attention_num_buckets", 32),
    max_distance=cfg.get("relative_attention_max_distance", 128),
    eps=cfg.get("layer_norm_epsilon", 1e-6),
  )


def _need(cfg: Mapping[str, Any], *keys: str):
  missing = [k for k in keys if k not in cfg]
  if missing:
    raise ValueError(
      f"The text encoder's configuration lacks {', '.join(missing)}; give that of a UMT5 encoder."
    )
