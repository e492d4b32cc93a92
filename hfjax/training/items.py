"""What a checkpoint of training holds (see `convert.runs`), from what is trained and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from hfjax.streaming.trees import named
from hfjax.training.plan import Plan
from hfjax.training.update import COUNTS, Part


def items_of(plan: Plan, parts: Mapping[str, Part], base: Any) -> dict[str, Any]:
  """Items by name, of arrays or of their shapes. base: the student below adapters."""
  items = {} if base is None else {"student": base}
  for name, part in parts.items():
    items |= _split(plan, name, part.params)
    if part.ema is not None:
      items |= {averages_of(k): x for k, x in _split(plan, name, part.ema).items()}
  items["optimizers"] = {
    name: {**_flat(part.opt), **{k: getattr(part, k) for k in COUNTS}}
    for name, part in parts.items()
  }
  return items


def parts_of(plan: Plan, like: Mapping[str, Part], items: Mapping[str, Any]) -> dict[str, Part]:
  """The inverse of `items_of`. like: shapes of the parts."""
  parts = {}
  for name, part in like.items():
    arrays = items["optimizers"][name]
    leaves = [arrays[k] for k in _flat(part.opt)]
    opt = jax.tree.unflatten(jax.tree.structure(part.opt), leaves)
    names = [*_split(plan, name, part.params)]
    join = lambda found, name=name: _join(plan, name, found)
    params = join([items[k] for k in names])
    ema = None if part.ema is None else join([items[averages_of(k)] for k in names])
    parts[name] = Part(params, opt, ema, **{k: arrays[k] for k in COUNTS})
  return parts


def averages_of(item: str) -> str:
  """Name of the item that holds averages of another one."""
  return "ema" if item in ("student", "adapters") else f"{item}_ema"


def models_of(plan: Plan) -> dict[str, Any]:
  """Architectures of what is trained beside transformers, by item, for the note."""
  trained = {"umt5": plan.text, "vae": plan.vae if plan.stage == "vae" else None}
  return {name: dataclasses.asdict(c) for name, c in trained.items() if c is not None}


def _split(plan: Plan, name: str, trained: Any) -> dict[str, Any]:
  """What is trained of a part, by item."""
  if name == "student" and plan.text is not None:
    return {"student": trained["student"], "umt5": trained["text"]}
  if name == "student" and plan.low is not None:
    return {"adapters": trained}
  return {{"autoencoder": "vae"}.get(name, name): trained}


def _join(plan: Plan, name: str, found: list[Any]) -> Any:
  both = name == "student" and plan.text is not None
  return {"student": found[0], "text": found[1]} if both else found[0]


def _flat(opt: Any) -> dict[str, Any]:
  """An optimizer's state by names, as its own classes are none that files have."""
  return {f"opt.{name.replace('/', '.')}": x for name, x in named(opt).items()}
