"""Batches of a stage, from its data to the devices."""

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hfjax.data import contexts, loading, made, shapes, sources, trajectories
from hfjax.data.rejects import NAMED, DataError
from hfjax.data.resident import Resident
from hfjax.distill.inputs import Texts
from hfjax.distill.reconstruction import Reconstruction
from hfjax.training.plan import Plan
from hfjax.training.progress import Progress
from hfjax.training.stages import Batch, Tokens, array_of, put, put_negative
from hfjax.training.weights import Encoder, TrainedText, load_teacher

# What data are called, by what they hold beside prompts.
_KINDS = {"video": "clips", "latents": "videos", "trajectory": "trajectories", None: "prompts"}


class Feed:
  """Batches without end, as `Stage.step` fetches them; see `hfjax.data.loading`.

  rejected: examples that were left out so far.
  """

  def __init__(self, plan: Plan, encode: Encoder | None, workdir: Path, say, quiet: bool = False):
    """encode: None where there are no prompts, in the stage vae.

    Raises DataError if there are no data, or other ones than the stage needs.
    """
    self.plan, self.encode = plan, encode
    c, processes = plan.config, jax.process_count()
    if c.batch % processes:
      raise DataError(
        f"A batch of {c.batch} does not divide among {processes} processes; make it a multiple."
      )
    source = _open(plan, encode, workdir, say, quiet)
    name = array_of(plan)
    self._opened = source
    self.source = source
    if c.data.resident:
      fill = functools.partial(loading.filled, text_len=plan.student.text_len)
      self.source = Resident(source, name, plan.mesh, fill)
    self._say, self._cut = say, set[str]()
    where = {"process_index": jax.process_index(), "process_count": processes}
    if isinstance(self.source, Resident):
      self._batches = loading.indices(
        len(self.source), c.batch // processes, c.seed,
        identity=getattr(source, "identity", None), **where,
      )  # fmt: skip
    else:
      self._batches = loading.batches(
        self.source, c.batch // processes, c.seed, prefetch=c.data.prefetch,
        text_len=plan.student.text_len, **where,
      )  # fmt: skip
    if encode is None:
      return
    encode.remember([c.text.negative])
    self._negative: tuple[Any, ...]
    if isinstance(encode.encode, TrainedText):
      tokens = encode.encode.tokenizer([c.text.negative])
      self._negative = put_negative(plan, tokens.ids), put_negative(plan, tokens.length)
    else:
      self._negative = (put_negative(plan, encode([c.text.negative])),)
    if isinstance(self.source, Resident):
      self._keep_texts(self.source)

  def __call__(self) -> Batch:
    name, raw = array_of(self.plan), next(self._batches)
    if isinstance(self.source, Resident):
      return self._fetched(self.source, raw)
    texts = None if self.plan.stage == "vae" else self._texts(raw)
    return put(self.plan, {} if name is None else {name: raw[name]}, texts)

  def _fetched(self, source: Resident, index: np.ndarray) -> Batch:
    """The batch of these examples, `[b]`."""
    batch: Batch = source.fetch(index.reshape(self.plan.config.accumulate, -1))
    if "ids" in batch:
      return batch | {"texts": Tokens(batch.pop("ids"), batch.pop("length"), *self._negative)}
    if "context" in batch:
      return batch | {"texts": Texts(batch.pop("context"), *self._negative)}
    if self.plan.stage != "vae":
      examples = [source[i] for i in index]
      raw: dict[str, Any] = {"prompt": [x["prompt"] for x in examples]}
      if "context" in examples[0]:
        raw["context"] = np.stack([x["context"] for x in examples])
      texts = self._texts(raw)
      batch |= put(self.plan, {}, texts)
    return batch

  def _keep_texts(self, source: Resident):
    """Keeps what prompts become, too; beside arrays, where that takes no more room than they."""
    assert self.encode is not None
    student, prompts = self.plan.student, [source[i]["prompt"] for i in range(len(source))]
    if isinstance(self.encode.encode, TrainedText):
      self._tell_of_long(prompts)
      ids, length = self.encode.encode.tokenizer(prompts)
      source.add("ids", ids)
      source.add("length", length)
      return
    room = len(prompts) * student.text_len * student.text_dim * 4
    if array_of(self.plan) is not None and room > source.nbytes:
      return
    if self.has_contexts:
      source.add("context", self._checked(np.stack(source.pop("context"))))
      return
    self._tell_of_long(prompts)
    n = self.plan.config.batch
    parts = [contexts.filled(prompts[i : i + n], n) for i in range(0, len(prompts), n)]
    encoded = np.concatenate([np.asarray(self.encode(part)) for part in parts])
    source.add("context", encoded[: len(prompts)])

  def _texts(self, raw: dict[str, Any]) -> Texts | Tokens:
    """Of a batch of examples, with the negative prompt."""
    assert self.encode is not None
    context = raw.get("context")
    if isinstance(self.encode.encode, TrainedText):
      self._tell_of_long(raw["prompt"])
      tokens = self.encode.encode.tokenizer(raw["prompt"])
      return Tokens(tokens.ids, tokens.length, *self._negative)
    if context is None:
      self._tell_of_long(raw["prompt"])
      context = self.encode(raw["prompt"])
    return Texts(self._checked(context), *self._negative)

  def _checked(self, context: Any) -> Any:
    """The same `[... w]`, if the student takes it."""
    if context.shape[-1] != self.plan.student.text_dim:
      raise DataError(
        f"The contexts of the data are {context.shape[-1]} wide, and the student takes "
        f"{self.plan.student.text_dim}; embed the prompts with the text encoder of the student."
      )
    return context

  def _tell_of_long(self, prompts: list[str]):
    """Prompts that are cut are counted, and the first ten named."""
    assert self.encode is not None
    for prompt in prompts:
      if prompt in self._cut or not (surplus := self.encode.surplus(prompt)):
        continue
      self._cut.add(prompt)
      if len(self._cut) <= NAMED:
        self._say(f"The last {surplus} tokens of {prompt[:60]!r} are cut off.")

  @property
  def cut(self) -> int:
    """Different prompts that were too long so far."""
    return len(self._cut)

  @property
  def has_contexts(self) -> bool:
    """Whether batches need no text encoder."""
    kept = isinstance(self.source, Resident) and "context" in self.source
    return kept or "context" in getattr(self._opened, "shapes", {})

  @property
  def rejected(self) -> int:
    """Examples that were left out so far."""
    rejects = getattr(self.source, "rejects", None)
    return 0 if rejects is None else rejects.count

  def clips(self, count: int) -> list[np.ndarray]:
    """The first clips of the data that can be read, or all if these are fewer."""
    found: list[np.ndarray] = []
    for i in range(len(self._opened)):
      if len(found) == count:
        break
      with contextlib.suppress(DataError):  # which batches tell of
        found.append(self._opened[i]["video"])
    return found

  def state(self) -> list[dict[str, Any]]:
    """Where each process's next batch lies; JSON-able."""
    return [json.loads(text) for text in _gather(json.dumps(self._batches.get_state()))]

  def restore(self, states: list[dict[str, Any]]):
    """Goes on there; with another number of processes, or other data, they begin anew."""
    try:
      if len(states) != jax.process_count():
        raise DataError(f"There were {len(states)} processes, and now {jax.process_count()}.")
      self._batches.set_state(states[jax.process_index()])
    except DataError as e:
      self._say(f"The data begin anew: {e}")


def _gather(text: str) -> list[str]:
  """What each process has, in their order."""
  if jax.process_count() == 1:
    return [text]
  data = np.frombuffer(text.encode(), np.uint8)
  lengths = np.asarray(multihost_utils.process_allgather(np.array([data.size]))).ravel()
  padded = np.zeros(int(lengths.max()), np.uint8)
  padded[: data.size] = data
  rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
  return [bytes(row[:n]).decode() for row, n in zip(rows, lengths, strict=True)]


def _open(plan: Plan, encode: Encoder | None, workdir: Path, say, quiet: bool) -> Any:
  c = plan.config
  if c.data.path == "made":
    if plan.stage == "vae":
      return made.MadeClips(*_clip_shape(plan), count=c.data.made, seed=c.seed)
    prompts = (made.made_prompts() * -(-c.data.made // len(made.made_prompts())))[: c.data.made]
    if plan.stage == "flow":
      return made.made_latents(*plan.latent_shape, count=c.data.made, seed=c.seed)
    if plan.trajectory_shape is None:
      return sources.Prompts(prompts)
    assert encode is not None
    path = _make_trajectories(plan, encode, workdir, prompts, say, quiet)
  elif c.data.path == "shapes":
    return _shapes(plan)
  else:
    path = Path(c.data.path)
  expect: dict[str, Any] = {}
  if plan.stage == "vae":
    expect = {"video": (None, *_clip_shape(plan)[1:])}
  elif plan.stage == "flow":
    expect = {"latents": (None, *plan.latent_shape[1:])}
  elif plan.trajectory_shape is not None:
    expect = {"trajectory": plan.trajectory_shape}
  name = array_of(plan)
  source = loading.open_source(_KINDS[name], path, on_bad=c.data.on_bad, expect=expect)
  if plan.trajectory_shape is not None:
    _check_times(plan, path, getattr(source, "about", {}))
  if plan.stage in ("vae", "flow"):  # the autoencoder is causal: beginnings are clips, too
    key, frames = "flow.frames", plan.frames
    if plan.stage == "vae":
      key, frames = "autoencoder.frames", _clip_shape(plan)[0]
    assert name is not None
    held = getattr(source, "shapes", {}).get(name, (None,))[0]
    if held is not None and held < frames:
      raise DataError(
        f"The clips in {path} have {held} frames, and {key} is {frames}; give longer clips, or set "
        "it to fewer."
      )
    return source if held == frames else sources.Beginnings(source, name, frames)
  return source


def _clip_shape(plan: Plan) -> tuple[int, int, int, int]:
  """Of clips of pixels: frames, rows, columns, colours."""
  g, o = plan.stream.geometry, plan.objective
  assert isinstance(o, Reconstruction)
  return (o.frames, g.height * o.vae.space_factor, g.width * o.vae.space_factor, 3)


def _shapes(plan: Plan) -> Any:
  """Clips or captions of the shapes world."""
  c = plan.config
  if array_of(plan) is None:
    return sources.Prompts(shapes.prompts("train", c.data.made, c.seed))
  if plan.stage != "vae":
    kind = _KINDS[array_of(plan)]
    raise DataError(
      f"The stage {plan.stage} is to have {kind}, and the shapes world gives pixels and captions "
      f"alone; make them with {sources.TOOLS[kind]}, and give their folder."
    )
  if _clip_shape(plan)[1:3] != (shapes.SIZE, shapes.SIZE):
    raise DataError(
      f"Clips of the shapes world are {shapes.SIZE} pixels wide and high; set geometry.height and "
      "geometry.width to them in latents."
    )
  return shapes.Shapes("train", c.data.made, c.seed, _clip_shape(plan)[0])


def _check_times(plan: Plan, path: Path, about: dict[str, Any]):
  have, want = about.get("times"), [*plan.stream.timesteps, 0.0]
  if have is not None and not np.allclose(have, want, rtol=0, atol=0.01):
    raise DataError(
      f"The trajectories in {path} are at the timesteps {[round(t, 2) for t in have]}, and the "
      f"student's are {[round(t, 2) for t in want]}; make them with the same steps and shift."
    )


def _make_trajectories(plan: Plan, encode: Encoder, workdir: Path, prompts, say, quiet) -> Path:
  """A few trajectories of the teacher, in the run's own folder."""
  c, folder = plan.config, workdir / "trajectories"
  if jax.process_count() > 1:
    raise DataError(
      "Trajectories cannot be made on the spot by several processes; make them with "
      "tools/make_trajectories.py, and give their folder as data.path."
    )
  teacher, shape = plan.teacher, plan.trajectory_shape
  assert teacher is not None and shape is not None
  recipe = trajectories.Recipe(
    shape[1:], plan.stream.steps, c.data.teacher_steps, c.denoising.shift, seed=c.seed
  )

  @functools.cache  # where all are there already, the teacher is not loaded
  def tracer():
    return trajectories.tracer(
      teacher, load_teacher(plan), recipe, encode([c.text.negative]), plan.stream.compute_dtype
    )

  with Progress(len(prompts), quiet=quiet, warmup=1) as bar:
    trajectories.write(
      folder, prompts, encode, lambda *x: tracer()(*x), recipe, batch=min(4, len(prompts)),
      model=c.teacher.weights, negative=c.text.negative,
      progress=lambda done, total: bar.update(done, {}),
    )  # fmt: skip
  say(f"Trajectories of the teacher are in {folder}.")
  return folder
