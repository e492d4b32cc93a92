"""Checkpoints of small transformers, and the tool in this process."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from hfjax.convert import dit
from tests.helpers import MODEL, random_params

ROOT = Path(__file__).resolve().parents[2]
HYBRID = dataclasses.replace(MODEL, text_len=512)
DENSE = dataclasses.replace(HYBRID, linear=False)
CFG = dit.published_config(HYBRID, "original")


def tensors_of(config=HYBRID, dtype=np.float32):
  params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), random_params(config))
  return dit.to_original(config, params)


TENSORS = tensors_of()


def put(folder, tensors=TENSORS, cfg=CFG, name="diffusion_pytorch_model.safetensors"):
  folder.mkdir(parents=True, exist_ok=True)
  save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / name)
  if cfg is not None:
    (folder / "config.json").write_text(json.dumps(cfg))
  return folder


def convert(*args):
  """The tool in this process: exit status."""
  sys.path.insert(0, str(ROOT / "tools"))
  import convert_checkpoint

  return convert_checkpoint.main([*map(str, args), "--quiet"])


def refused(capsys, *args):
  """Sentence of a conversion that must fail."""
  assert convert(*args) == 2
  error = capsys.readouterr().err
  assert error.startswith("convert_checkpoint: ") and len(error.strip().splitlines()) == 1, error
  return error


def same(a, b):
  assert a.keys() == b.keys()
  for k in a:
    assert a[k].dtype == b[k].dtype and a[k].shape == b[k].shape
    assert a[k].tobytes() == b[k].tobytes(), k


def folders(parent):
  """What lies in a folder, hidden entries too."""
  return sorted(p.name for p in parent.iterdir())


def content(folder):
  """Bytes of what lies below a folder by name, False for folders."""
  return {p.relative_to(folder).as_posix(): p.is_file() and p.read_bytes()
          for p in sorted(folder.rglob("*"))}  # fmt: skip


def flat(tree):
  paths = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {"/".join(k.key for k in p): np.asarray(x) for p, x in paths}
