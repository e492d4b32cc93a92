"""Low-rank updates of transformer weights, merged while a checkpoint is read.

An update of a weight W of rank r is `strength * alpha / r * up @ down`; without alpha, alpha is r.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hfjax.convert import source
from hfjax.convert.checkpoint import Part, count_not_finite
from hfjax.convert.source import CheckpointError, Tensor, Tensors

# Ends of names: Diffusers' and PEFT's A and B, original down and up; alpha; whole differences.
_ENDS = {
  ".lora_A.weight": "down", ".lora_down.weight": "down", ".lora_A.default.weight": "down",
  ".lora_B.weight": "up", ".lora_up.weight": "up", ".lora_B.default.weight": "up",
  ".alpha": "alpha", ".diff": "diff", ".diff_b": "diff_b",
}  # fmt: skip
_PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.", "model.", "lora_unet_")


def parse(text: str) -> tuple[Path, float]:
  """File and strength of `FILE[@STRENGTH]`; CheckpointError if it is anything else."""
  match = re.fullmatch(r"(.*\.safetensors)(?:@(.*))?", text, re.DOTALL)
  if match is None:
    raise CheckpointError(
      f"{text!r} names no safetensors file; give FILE.safetensors or FILE.safetensors@STRENGTH."
    )
  path, strength = match[1], "1" if match[2] is None else match[2]
  try:
    value = float(strength)
  except ValueError:
    value = float("nan")
  if not np.isfinite(value):
    raise CheckpointError(f"The strength {strength!r} of {path} is no number; give, say, 0.8.")
  return Path(path), value


def merge(parts: Sequence[Part], path: Path, strength: float = 1.0) -> list[Part]:
  """Parts with the file's updates merged into the transformer.

  Raises CheckpointError if there is no transformer, or if an update fits none of its weights.
  """
  target = next((p for p in parts if p.kind.name == "dit"), None)
  if target is None:
    raise CheckpointError(f"{path} updates a transformer, and the checkpoint holds none.")
  updates = _collect(path, source.read_safetensors(path), target)
  tensors = dict(target.tensors)
  for name, update in updates.items():
    tensors[name] = _merged(name, tensors[name], update, strength, path)
  note = f"Merged {len(updates)} updates of {path.name} at strength {strength:g}."
  merged = dataclasses.replace(
    target,
    tensors=tensors,
    notes=(*target.notes, note),
    origin={**target.origin, "lora": [*target.origin.get("lora", []), [path.name, strength]]},
  )
  return [merged if p is target else p for p in parts]


def _collect(path: Path, tensors: Tensors, part: Part) -> dict[str, dict[str, Tensor]]:
  """Updates by the original name of the weight they change."""
  # Some tools write dots as underscores, so that names are looked up rather than translated.
  known: dict[str, str] = {}
  for name in part.tensors:
    module = name.rpartition(".")[0]
    for alias in (module, part.table.diffusers_name(name).rpartition(".")[0]):
      known[alias] = known[alias.replace(".", "_")] = module
  updates: dict[str, dict[str, Tensor]] = {}
  strange, twice = [], []
  for name, tensor in tensors.items():
    end = next((e for e in _ENDS if name.endswith(e)), None)
    module = known.get(_bare(name.removesuffix(end or "")), "")
    weight = f"{module}.{'bias' if end == '.diff_b' else 'weight'}"
    if end is None or weight not in part.tensors:
      strange.append(name)
    elif _ENDS[end] in updates.setdefault(weight, {}):
      twice.append(name)
    else:
      updates[weight][_ENDS[end]] = tensor
  if twice:
    raise CheckpointError(
      f"{path} updates weights twice, under several names: {', '.join(sorted(twice)[:20])}; keep "
      "one of each."
    )
  if strange or not updates:
    shown = ", ".join(sorted(strange)[:20]) or "nothing"
    raise CheckpointError(
      f"{path} holds {len(strange)} tensors that update no weight of this transformer: {shown}. It "
      "is of another model, or no LoRA."
    )
  return updates


def _bare(name: str) -> str:
  while True:
    prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
    if prefix is None:
      return re.sub(r"\.(base_layer|default)$", "", name)
    name = name.removeprefix(prefix)


def _merged(
  name: str, weight: Tensor, update: dict[str, Tensor], strength: float, path: Path
) -> Tensor:
  shapes = {k: t.shape for k, t in update.items()}
  if shapes.keys() in ({"diff"}, {"diff_b"}):
    fits = weight.shape in shapes.values()
  elif shapes.keys() - {"alpha"} == {"up", "down"}:
    up, down = shapes["up"], shapes["down"]
    fits = (
      len(up) == len(down) == 2
      and up[1] == down[0] > 0
      and (up[0], down[1]) == (weight.shape[0], math.prod(weight.shape[1:]))
      and math.prod(shapes.get("alpha", ())) == 1
    )
  else:
    fits = False
  if not fits:
    has = ", ".join(f"{k} {list(s)}" for k, s in sorted(shapes.items()))
    raise CheckpointError(
      f"{path} updates {name} of shape {list(weight.shape)} with {has}, which does not fit: an "
      "update is up and down, with one alpha or none, or a whole difference."
    )

  def read(row: int | None = None) -> np.ndarray:
    x = weight.read()
    was_finite = not count_not_finite(x)
    parts = {k: t.read().astype(np.float32) for k, t in update.items()}
    with np.errstate(all="ignore"):  # what comes of it is looked at below
      if "up" in parts:
        rank = parts["down"].shape[0]
        alpha = float(parts["alpha"].item()) if "alpha" in parts else rank
        change = strength * alpha / rank * (parts["up"] @ parts["down"]).reshape(x.shape)
      else:
        change = strength * next(iter(parts.values()))
      x = (x.astype(np.float32) + change).astype(weight.dtype)
    bad = count_not_finite(x)
    if bad and was_finite:
      raise CheckpointError(
        f"{path} at strength {strength:g} makes {bad} numbers of {name} NaN or infinite; it is "
        "damaged, or the strength too large."
      )
    return x if row is None else x[row]

  return Tensor(weight.shape, weight.dtype, read)
