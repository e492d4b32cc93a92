"""Name tables against the names and shapes of published checkpoints."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from hfjax.convert import checkpoint, load
from hfjax.convert.recognise import original_name
from hfjax.convert.registry import KINDS
from tests.convert.helpers import convert

MANIFESTS = Path(__file__).resolve().parents[1] / "manifests"
# Tied to shared.weight; a file may hold it as well.
TIED = "encoder.embed_tokens.weight"


def manifest(name, layers=None):
  """(config, shapes by name), with some of the layers only."""
  held = json.loads((MANIFESTS / f"{name}.json").read_text())
  count = held["layers"] if layers is None else layers
  shapes = {
    k.format(i=i) if "{i}" in k else k: tuple(s)
    for k, s in held["tensors"].items()
    for i in range(count if "{i}" in k else 1)
  }
  return held["config"], shapes


def kind_of(name):
  return KINDS[next(k for k in KINDS if k in name)]


NAMES = sorted(p.stem for p in MANIFESTS.glob("*.json"))


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("original")])
def test_original_names_and_shapes_are_the_tables(name):
  cfg, shapes = manifest(name)
  kind = kind_of(name)
  config = kind.infer(shapes, cfg, [])
  assert dict(kind.table(config).shapes) == shapes


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith("original")])
def test_other_names_and_shapes_are_the_tables(name):
  cfg, shapes = manifest(name)
  kind = kind_of(name)
  shapes.pop(TIED, None)
  original = {}
  for theirs, shape in shapes.items():
    original[original_name(kind.name, theirs)] = shape
  config = kind.infer(original, cfg, [])
  table = kind.table(config)
  assert {table.diffusers_name(k): s for k, s in table.shapes.items()} == shapes


def sparse_file(path, shapes, cfg):
  """Safetensors of zeros that take no room on the disk."""
  header, offset = {}, 0
  for name, shape in shapes.items():
    size = 2 * int(np.prod(shape))
    header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
    offset += size
  text = json.dumps(header).encode()
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("wb") as f:
    f.write(len(text).to_bytes(8, "little") + text)
    f.truncate(8 + len(text) + offset)
  (path.parent / "config.json").write_text(json.dumps(cfg))


@pytest.mark.parametrize(
  ("name", "folder"),
  [("hybrid_1.3b_dit.original", "."), ("wan2.1_t2v_1.3b_dit.diffusers", "transformer")],
)
def test_full_width_with_one_layer_converts(tmp_path, name, folder):
  cfg, shapes = manifest(name, layers=1)
  cfg = {**cfg, "num_layers": 1}
  sparse_file(tmp_path / "in" / folder / "diffusion_pytorch_model.safetensors", shapes, cfg)
  assert convert(tmp_path / "in", tmp_path / "ours") == 0
  part = checkpoint.open_parts(tmp_path / "ours")[0]
  assert (part.config.dim, part.config.heads, part.config.layers) == (1536, 12, 1)
  assert part.config.linear == ("hybrid" in name)
  assert sum(t.nbytes for t in part.tensors.values()) == 2 * sum(map(np.prod, shapes.values()))


def test_depth_is_counted(tmp_path):
  """Thirty layers of a narrow model with published names."""
  _, shapes = manifest("hybrid_1.3b_dit.original")
  narrow = {1536: 16, 8960: 24, 4096: 8, 128: 8, 9216: 96, 256: 8}
  shapes = {
    k: tuple(narrow.get(n, n) for n in s) if k != "head.head.bias" else s for k, s in shapes.items()
  }
  cfg = {"dim": 16, "num_heads": 2, "num_layers": 30}
  sparse_file(tmp_path / "in" / "diffusion_pytorch_model.safetensors", shapes, cfg)
  assert convert(tmp_path / "in", tmp_path / "ours") == 0
  config = load(tmp_path / "ours").config
  assert dataclasses.asdict(config) | {"layers": 30, "dim": 16} == dataclasses.asdict(config)
