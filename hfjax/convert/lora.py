"""Low-rank updates of transformer weights, merged while a checkpoint is read.

An update of a weight W of rank r is `strength * alpha / r * up @ down`; without alpha, alpha is r.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hfjax.convert import source
from hfjax.convert.checkpoint import Part
from hfjax.convert.source import CheckpointError, Tensor, Tensors

# Ends of names: Diffusers' and PEFT's A and B, original down and up; alpha; whole differences.
_ENDS = {
  ".lora_A.weight": "down", ".lora_down.weight": "down", ".lora_A.default.weight": "down",
  ".lora_B.weight": "up", ".lora_up.weight": "up", ".lora_B.default.weight": "up",
  ".alpha": "alpha", ".diff": "diff", ".diff_b": "diff_b",
}  # fmt: skip
_PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.", "model.", "lora_unet_")


def parse(text: str) -> tuple[Path, float]:
  """File and strength of `FILE[@STRENGTH]`; CheckpointError if the strength is no number."""
  match = re.fullmatch(r"(.*\.safetensors)(?:@(.*))?", text)
  path, strength = (match[1], match[2] or "1") if match else (text, "1")
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
  if not path.is_file():
    raise CheckpointError(f"{path} is not there; give a safetensors file of low-rank updates.")
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
  strange = []
  for name, tensor in tensors.items():
    end = next((e for e in _ENDS if name.endswith(e)), None)
    module = known.get(_bare(name.removesuffix(end or "")), "")
    weight = f"{module}.{'bias' if end == '.diff_b' else 'weight'}"
    if end is None or weight not in part.tensors:
      strange.append(name)
    else:
      updates.setdefault(weight, {})[_ENDS[end]] = tensor
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
  if "diff" in update or "diff_b" in update:
    difference = update.get("diff", update.get("diff_b"))
    shapes = [difference.shape] if difference else []
    fits = shapes == [weight.shape]
  elif {"up", "down"} <= update.keys():
    up, down = update["up"], update["down"]
    fits = (
      len(up.shape) == len(down.shape) == 2
      and up.shape[1] == down.shape[0]
      and int(np.prod(weight.shape)) == up.shape[0] * down.shape[1]
      and up.shape[0] == weight.shape[0]
    )
    shapes = [up.shape, down.shape]
  else:
    fits, shapes = False, [t.shape for t in update.values()]
  if not fits:
    raise CheckpointError(
      f"{path} updates {name} of shape {list(weight.shape)} with {[list(s) for s in shapes]}, "
      "which does not fit; it is of another model."
    )

  def read(row: int | None = None) -> np.ndarray:
    x: Any = weight.read().astype(np.float32)
    parts = {k: t.read().astype(np.float32) for k, t in update.items()}
    if "up" in parts:
      rank = parts["down"].shape[0]
      alpha = float(parts["alpha"].reshape(-1)[0]) if "alpha" in parts else rank
      x = x + strength * alpha / rank * (parts["up"] @ parts["down"]).reshape(x.shape)
    else:
      x = x + strength * next(iter(parts.values()))
    x = x.astype(weight.dtype)
    return x if row is None else x[row]

  return Tensor(weight.shape, weight.dtype, read)
