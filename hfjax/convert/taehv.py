"""TAEHV: name table, and parameters from published tensors (spec section 13)."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from hfjax.convert.table import Leaf, Table, linear, vector
from hfjax.models import taehv
from hfjax.models.taehv import TaehvConfig

_CONV = "o i y x -> y x i o"
_POINT = "o i 1 1 -> i o"


def _memory(path: str, source: str) -> Iterator[Leaf]:
  for ours, theirs in enumerate((0, 2, 4)):
    yield from linear(f"{path}/conv_{ours}", f"{source}.conv.{theirs}", _CONV)


def _kernel(path: str, source: str, layout: str = _CONV) -> tuple[Leaf, ...]:
  return vector(f"{path}/kernel", f"{source}.weight", layout)


def _encoder(config: TaehvConfig) -> Iterator[Leaf]:
  yield from linear("encoder/conv_in", "encoder.0", _CONV)
  at = 2  # after the activation
  for i in range(len(config.pools)):
    yield from _kernel(f"encoder/pool_{i}", f"encoder.{at}.conv", _POINT)
    yield from _kernel(f"encoder/down_{i}", f"encoder.{at + 1}")
    at += 2
    for n in range(config.memory_blocks):
      yield from _memory(f"encoder/memory_{i}_{n}", f"encoder.{at}")
      at += 1
  yield from linear("encoder/conv_out", f"encoder.{at}", _CONV)


def _grow(config: TaehvConfig, stage: int) -> str:
  """Original name of the convolution that makes several frames of one."""
  # Clamp, convolution and activation first; then blocks, upsampling, growth, convolution.
  return f"decoder.{4 + stage * (config.memory_blocks + 3) + config.memory_blocks}.conv.weight"


def _decoder(config: TaehvConfig) -> Iterator[Leaf]:
  yield from linear("decoder/conv_in", "decoder.1", _CONV)
  at = 3
  for i in range(len(config.grows)):
    for n in range(config.memory_blocks):
      yield from _memory(f"decoder/memory_{i}_{n}", f"decoder.{at}")
      at += 1
    yield from vector(f"decoder/grow_{i}/kernel", _grow(config, i), _POINT)
    yield from _kernel(f"decoder/up_{i}", f"decoder.{at + 2}")
    at += 3
  yield from linear("decoder/conv_out", f"decoder.{at + 1}", _CONV)


@functools.cache  # the network is traced for its shapes
def table(config: TaehvConfig) -> Table:
  """The name table of an architecture; Diffusers has none."""
  return Table(
    leaves=(*_encoder(config), *_decoder(config)),
    init=lambda: taehv.init_params(config, jax.random.key(0)),
    sizes={},
    diffusers={},
  )


def grown_rows(config: TaehvConfig) -> dict[str, int]:
  """Rows that the model needs of the tensors that make several frames of one, by original name.

  Checkpoints may make more frames than that: the last rows are the model's.
  """
  shapes = table(config).shapes
  return {name: shapes[name][0] for name in (_grow(config, i) for i in range(len(config.grows)))}


def from_original(config: TaehvConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Nested parameters from tensors under original names; see `Table.from_original`."""
  rows = grown_rows(config)
  last = {name: tensors[name][-n:] for name, n in rows.items() if name in tensors}
  return table(config).from_original({**tensors, **last})


def to_original(config: TaehvConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Tensors under original names; see `Table.to_original`."""
  return table(config).to_original(params)
