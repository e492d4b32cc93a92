"""Low-rank adapters of a transformer's linear layers: which layers there are, and their names.

Adapters are `{target: {"down": [l ... r], "up": [l r ...]}}`, where the dots are the axes of inputs
and of outputs as the layer's kernel has them, and r is the rank.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hfjax.convert import dit
from hfjax.models.presets import WanConfig


class Target(NamedTuple):
  """A linear layer of blocks.

  module: its original name in a block. path: of its kernel's layer in a block's parameters.
  part: which of several matrices of a fused kernel it is. inputs: axes of its inputs in the kernel.
  """

  module: str
  path: str
  part: int | None = None
  inputs: int = 1


TARGETS = {
  "q": Target("self_attn.q", "self_attn/qkv", 0),
  "k": Target("self_attn.k", "self_attn/qkv", 1),
  "v": Target("self_attn.v", "self_attn/qkv", 2),
  "o": Target("self_attn.o", "self_attn/out", inputs=2),
  "linear_proj": Target("self_attn.linear_proj", "self_attn/linear_proj"),
  "cross_q": Target("cross_attn.q", "cross_attn/q"),
  "cross_k": Target("cross_attn.k", "cross_attn/kv", 0),
  "cross_v": Target("cross_attn.v", "cross_attn/kv", 1),
  "cross_o": Target("cross_attn.o", "cross_attn/out", inputs=2),
  "cross_k_img": Target("cross_attn.k_img", "cross_attn/image_kv", 0),
  "cross_v_img": Target("cross_attn.v_img", "cross_attn/image_kv", 1),
  "ffn_in": Target("ffn.0", "ffn_in"),
  "ffn_out": Target("ffn.2", "ffn_out"),
}


class Factors(NamedTuple):
  """The two factors of one layer's update `up @ down` in published order."""

  down: np.ndarray  # [r i]
  up: np.ndarray  # [o r]


def to_original(config: WanConfig, adapters: Mapping[str, Any]) -> dict[str, Factors]:
  """Factors by original module name ("blocks.0.self_attn.q")."""
  table, factors = dit.table(config), {}
  for name, pair in adapters.items():
    target, layout = TARGETS[name], _layout(config, name)
    down, up = np.asarray(pair["down"]), np.asarray(pair["up"])
    for i in range(config.layers):
      # A layout of kernels serves the factor that has its folded axes: r stands for the other side.
      if target.inputs == 1:
        factor = Factors(np.ascontiguousarray(down[i].T), table.unfold(up[i], layout))
      else:
        factor = Factors(table.unfold(down[i], layout), np.ascontiguousarray(up[i].T))
      factors[f"blocks.{i}.{target.module}"] = factor
  return factors


def from_original(config: WanConfig, factors: Mapping[str, Factors]) -> dict[str, Any]:
  """Adapters from factors by original module name; the inverse of `to_original`.

  Raises KeyError if a layer of a module is missing, and ValueError on unequal ranks.
  """
  table, adapters = dit.table(config), {}
  for name, target in TARGETS.items():
    modules = [f"blocks.{i}.{target.module}" for i in range(config.layers)]
    if not any(module in factors for module in modules):
      continue
    layout, pairs = _layout(config, name), [factors[module] for module in modules]
    if target.inputs == 1:
      folded = [(p.down.T, table.fold(p.up, layout)) for p in pairs]
    else:
      folded = [(table.fold(p.down, layout), p.up.T) for p in pairs]
    down, up = zip(*folded, strict=True)
    adapters[name] = {"down": np.stack(down), "up": np.stack(up)}
  return adapters


def _layout(config: WanConfig, name: str) -> str:
  """Layout of a target's kernel in the name table; KeyError if the architecture lacks it."""
  weight = f"blocks.{{i}}.{TARGETS[name].module}.weight"
  for leaf in dit.table(config).leaves:
    if weight in leaf.sources:
      return leaf.layouts[leaf.sources.index(weight)]
  raise KeyError(name)
