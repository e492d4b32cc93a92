"""The loop around all stages: steps, figures, checkpoints, videos, and how it ends."""

import collections
import contextlib
import dataclasses
import fcntl
import math
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import FrozenConfigDict

from hfjax import parallel
from hfjax.convert import runs
from hfjax.convert.source import CheckpointError
from hfjax.data.rejects import DataError
from hfjax.distill.objectives import Frozen
from hfjax.training import autoencoder, lora, validation, weights
from hfjax.training import config as configs
from hfjax.training.checkpoints import CheckpointFailed, Checkpoints
from hfjax.training.config import ConfigError
from hfjax.training.defaults import default_config
from hfjax.training.feed import Feed
from hfjax.training.items import items_of, models_of, parts_of
from hfjax.training.metrics import Metrics
from hfjax.training.plan import Plan
from hfjax.training.progress import Progress
from hfjax.training.stages import Stage
from hfjax.training.update import COUNTS, Part, init_part

# What earlier versions could set and this one cannot, and what it was by default.
_GONE = {"distill.last_step_only": False}
# What a run may change when it goes on.
_FREE = (
  "steps", "most_skipped", "init", "init_ema", "data.prefetch", "text.device",
  "flow.guidance", "flow.guidance_interval", "flow.solver_steps",  # of validation videos
)  # fmt: skip
_FREE_GROUPS = ("checkpoint", "log", "validation", "compute")


class TrainingStopped(RuntimeError):  # noqa: N818  it says what happened
  """Training cannot go on; its text is a sentence, and what was reached is saved."""


class Stop:
  """Whether the process was asked to end, by SIGTERM or Ctrl-C; a second one ends it at once.

  number: of the signal. In a run of several processes all stop where one of them is asked to.
  """

  def __init__(self, say: Callable[[str], None]):
    self.number: int | None = None
    self._say, self._before = say, dict[int, Any]()

  def __enter__(self) -> "Stop":
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._ask)
    return self

  def __exit__(self, *exception):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _ask(self, number, frame):
    if self.number is not None:
      raise KeyboardInterrupt
    self.number = number
    self._say("Stopping after this step, and saving; once more stops at once.")

  def asked(self) -> bool:
    """Whether to end now."""
    if jax.process_count() == 1:
      return self.number is not None
    flags = multihost_utils.process_allgather(np.array([self.number or 0]))
    self.number = int(np.max(flags)) or None
    return self.number is not None


def train(plan: Plan, workdir: Path, quiet: bool = False) -> int:
  """Trains, or goes on with, the run in `workdir`; the exit status.

  0 when all steps are made, and after SIGTERM, when the state is saved; 130 after Ctrl-C.

  Raises ConfigError, CheckpointError, DataError, CheckpointFailed and TrainingStopped, with a
  sentence each.
  """
  bar: list[Progress] = []
  main = jax.process_index() == 0

  def say(words: str):
    if not main:
      return
    bar[0].say(words) if bar else print(words, file=sys.stderr, flush=True)

  with contextlib.ExitStack() as stack:
    stack.enter_context(claim(workdir))
    stop = stack.enter_context(Stop(say))
    checkpoints = Checkpoints(workdir / "checkpoints", plan.config.checkpoint.keep, say)
    stack.callback(_close, checkpoints, say)
    c, last = plan.config, checkpoints.steps()
    _check_config(c, workdir, checkpoints.note())
    if last and last[-1] >= c.steps:
      say(f"{workdir} has made {last[-1]} steps, and steps is {c.steps}; raise it to go on.")
      return 0
    if main:
      configs.write(c, workdir / "config.json")
    metrics = stack.enter_context(Metrics(
      workdir, c.log.tensorboard, c.log.wandb or None, c.to_dict(), say, active=main
    ))  # fmt: skip
    stack.enter_context(_told(say))  # until the end: data are read all the while
    if not quiet:
      say("Loading data and networks.")
    run = Run(plan, workdir, checkpoints, metrics, stop, say, quiet)
    if stop.asked():
      return run.ended()
    with Progress(c.steps, run.step, quiet or not main, samples=c.batch) as progress:
      bar.append(progress)
      if not quiet:
        say("Compiling; the first step of each network takes a while.")
      try:
        run.go(progress)
      finally:
        bar.clear()
    return run.ended()


class Run:
  """One run: its networks, data and position."""

  def __init__(
    self,
    plan: Plan,
    workdir: Path,
    checkpoints: Checkpoints,
    metrics: Metrics,
    stop: Stop,
    say: Callable[[str], None],
    quiet: bool = False,
  ):
    self.plan, self.workdir, self.checkpoints = plan, workdir, checkpoints
    self.metrics, self.stop, self.say = metrics, stop, say
    self.encode = weights.Encoder(plan) if plan.stage != "vae" else None
    self.feed = Feed(plan, self.encode, workdir, say, quiet)
    self.autoencoder = None
    if self.encode is not None:
      self.autoencoder = weights.load_autoencoder(plan)
      if plan.config.validation.every and self.autoencoder is not None:
        self.encode.remember(plan.config.validation.prompts)
      if self.feed.has_contexts:
        self.encode.let_go()
      self.encode.keep_tokenizer(workdir)
    self.step = 0
    self.saved: int | None = None
    self.hopeless = ""  # why training cannot go on
    frozen = Frozen(
      weights.load_teacher(plan) if plan.distills else None,
      None if self.autoencoder is None else self.autoencoder.params,
    )
    parts, base = self._restore() or self._begin()
    self.stage = Stage(plan, parts, base, frozen)
    self._window: dict[str, list[float]] = collections.defaultdict(list)

  def go(self, progress: Progress):
    """Makes all steps that are left; TrainingStopped if too many cannot be made."""
    plan, c = self.plan, self.plan.config
    pending: tuple[int, Mapping[str, Any]] | None = None
    while self.step < c.steps and not self.hopeless and not self.stop.asked():
      try:
        figures = self.stage.step(self.step, self.feed)
      except DataError:  # what was learnt until then is kept
        if pending is not None:
          self._take(*pending, progress)
        self.save(last=True)
        self.checkpoints.wait()
        raise
      self.step += 1
      # Of the step before, so that the device is not waited for.
      if pending is not None:
        self._take(*pending, progress)
      pending = self.step, figures
      last = self.step == c.steps
      validates = c.validation.every and (self.step % c.validation.every == 0 or last)
      if last or validates or self.step % c.checkpoint.every == 0:
        self._take(*pending, progress)
        pending = None
        with progress.paused():
          self.save(last)  # before videos too, which take their time
          if validates and (self.autoencoder is not None or plan.stage == "vae"):
            self.validate()
    if pending is not None:
      self._take(*pending, progress)
    self.save(last=True)
    self.checkpoints.wait()
    if self.hopeless:
      raise TrainingStopped(
        f"{self.hopeless} Training stopped after step {self.step}, which is saved in "
        f"{self.workdir}. Lower the learning rate, or look at the data."
      )

  def ended(self) -> int:
    """The exit status, and a sentence on what there is."""
    done = self.step >= self.plan.config.steps
    if done:
      self.say(f"All {self.step} steps are made; {self.workdir} holds the run.")
      return 0
    if self.saved is None:
      self.say("Stopped before the first step; the same command begins anew.")
    else:
      self.say(f"Stopped after step {self.step}, which is saved; the same command goes on.")
    return 130 if self.stop.number == signal.SIGINT else 0

  def validate(self):
    """Writes videos."""
    if jax.process_count() > 1:
      self.say("Validation videos are made by runs of one process only; convert a checkpoint.")
      return
    try:
      if self.encode is None:
        kinds = {"raw": False} | ({"ema": True} if self.plan.average else {})
        autoencoder.validate(
          self.plan, {k: self.stage.trained("autoencoder", x) for k, x in kinds.items()},
          self.feed.clips(len(self.plan.config.validation.prompts)), self.step, self.workdir,
          self.metrics, self.say,
        )  # fmt: skip
        return
      assert self.autoencoder is not None
      validation.make_videos(
        self.plan, self.stage, self.encode, self.autoencoder, self.step, self.workdir,
        self.metrics, self.say, self.stop.asked,
      )  # fmt: skip
    except ValueError as e:  # is no reason to end training
      self.say(f"There are no validation videos: {e}")

  def save(self, last: bool = False):
    """Begins to save a checkpoint, unless there is one of this step; a failure is told of.

    last: whether training ends, and a failure is raised, as nothing could be saved later.
    """
    if self.saved == self.step:
      return
    try:
      self.checkpoints.wait()
    except CheckpointFailed as e:  # of the one before, which is no reason to leave this one out
      self.say(str(e) if last else f"{e} Training goes on.")
    plan = self.plan
    note = {
      "format": runs.FORMAT,
      "step": self.step,
      "architecture": dataclasses.asdict(plan.student),
      "variant": plan.stream.geometry.variant if plan.causal else None,
      "preset": _preset(plan),
      "models": models_of(plan),
      "lora": None if plan.low is None else dataclasses.asdict(plan.low),
      "config": plan.config.to_dict(),
      "data": self.feed.state(),
    }
    if note["variant"] is None:
      note["variant"] = "paper" if plan.student.linear else "reference_dense"
    if plan.stage == "vae":
      note["models"] |= self._measured()
    try:
      self.checkpoints.save(self.step, items_of(plan, self.stage.parts, self.stage.base), note)
      self.saved = self.step
      if plan.low is not None and jax.process_count() == 1:
        path = self.workdir / "adapters.safetensors"
        adapters = jax.device_get(self.stage.trained("student"))
        lora.save(path, plan.student, adapters, plan.low.alpha)
    except (CheckpointFailed, CheckpointError) as e:
      if last:
        raise
      self.say(f"{e} Training goes on.")

  def _measured(self) -> dict[str, Any]:
    """The autoencoder and its average, with statistics of what they make of the first clips.

    With decoder_only, the statistics of the autoencoder that training began with stay.
    """
    plan, c, found = self.plan, self.plan.config, {}
    names = ("vae", "vae_ema") if plan.average else ("vae",)
    if c.autoencoder.decoder_only:
      if (last := self.checkpoints.note()) is not None:
        return {name: last["models"][name] for name in names}
      if (kept := weights.statistics(plan)) is not None:
        return {name: dataclasses.asdict(kept) for name in names}
    clips = self.feed.clips(autoencoder.MEASURED)
    assert plan.vae is not None
    for name in names:
      params = self.stage.trained("autoencoder", name == "vae_ema")
      mean, std = autoencoder.statistics(plan.vae, params, clips, plan.stream.compute_dtype)
      found[name] = dataclasses.asdict(dataclasses.replace(plan.vae, mean=mean, std=std))
    return found

  def _begin(self) -> tuple[dict[str, Part], Any]:
    """Parts of a run that begins, and the weights below adapters."""
    plan = self.plan
    self.metrics.resume(0)  # of a run that was killed before its first checkpoint
    trained = {name: weights.load_trained(plan, name) for name in plan.parts}
    base = None
    if plan.low is not None:
      base, trained["student"] = trained["student"], weights.init_adapters(plan)
    return {name: _part(plan, name, params) for name, params in trained.items()}, base

  def _restore(self) -> tuple[dict[str, Part], Any] | None:
    """The same of the newest checkpoint, if there is one."""
    plan = self.plan
    like = {name: plan.part_shapes(name) for name in plan.parts}
    base = plan.shapes(plan.student) if plan.low is not None else None
    found = self.checkpoints.restore(items_of(plan, like, base))
    if found is None:
      return None
    self.step = self.saved = found.step
    self.feed.restore(found.note["data"])
    self.metrics.resume(found.step)
    self.say(f"Going on after step {found.step}.")
    parts = parts_of(plan, like, found.items)
    return parts, None if base is None else found.items["student"]

  def _take(self, step: int, figures: Mapping[str, Mapping[str, Any]], progress: Progress):
    """Figures of a step that is made: seen, logged, and looked at for what is not finite."""
    c, host = self.plan.config, jax.device_get(figures)
    shown = {name: float(x["loss"]) for name, x in host.items()}
    progress.update(step, shown)
    for part, values in host.items():
      for name, value in values.items():
        if name in COUNTS:
          self._window[f"{part}/{name}"] = [int(value)]  # the last
        elif name != "finite" and not (values["finite"] and math.isnan(value)):
          self._window[f"{part}/{name}"].append(float(value))
    if step % c.log.every == 0 or step == c.steps:
      rates = {f"{name}/learning_rate": _rate(self.plan, name, x) for name, x in host.items()}
      means = {name: sum(x) / len(x) for name, x in self._window.items()}
      stats = jax.local_devices()[0].memory_stats() or {}
      memory = {"peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10}
      if stats:
        memory["peak_memory_bytes"] = stats["peak_bytes_in_use"]
      self.metrics.write(step, {
        **means, **rates, **progress.figures(), **memory, "data/rejected": self.feed.rejected,
        "data/cut_prompts": self.feed.cut,
      })  # fmt: skip
      self._window.clear()
    for part, values in host.items():
      if not values["finite"]:
        self._skip(step, part, values["in_row"], values["skipped"])

  def _skip(self, step: int, name: str, row: int, skipped: int):
    """Tells of an update that was left out, and remembers if there were too many."""
    self.say(
      f"Step {step}: a loss or gradient of the {name} was not finite, and its update was left out "
      f"({row} in a row, {skipped} in all)."
    )
    if row >= self.plan.config.most_skipped:
      self.hopeless = f"{row} updates of the {name} in a row were not finite."


def _part(plan: Plan, name: str, params: Any) -> Part:
  """A part that was not updated yet, where it shall lie."""
  make = lambda p: init_part(p, plan.optimizer_of(name), plan.average_of(name))
  where = parallel.shardings(plan.mesh, plan.part_shapes(name))
  return jax.jit(make, out_shardings=where, donate_argnums=0)(params)


def _rate(plan: Plan, name: str, figures: Mapping[str, Any]) -> float:
  """Of the update that gave these figures."""
  chosen = plan.critic_optimizer if name == "critic" else plan.optimizer
  assert chosen is not None
  before = int(figures["updates"]) - int(figures["finite"])
  rate: Any = chosen.learning_rate(plan.updates(name))(before)
  return float(rate)


def _preset(plan: Plan) -> str | None:
  """How the student is meant to be sampled, where a preset says so."""
  if plan.stage == "vae" or not plan.causal:
    return "wan"
  if plan.stage == "flow":
    return None
  return "hybrid" if plan.student.linear else "self_forcing"


def _check_config(config: FrozenConfigDict, workdir: Path, note: Mapping[str, Any] | None):
  """ConfigError if a run is to go on under another config than its newest checkpoint's."""
  before = (note or {}).get("config")
  if not isinstance(before, dict):
    return
  # What a run of an earlier version could not set is what it is by default.
  then, now, default = (configs.leaves(x) for x in (before, config, default_config()))
  same = {key for key in now.keys() - then.keys() if now[key] == default.get(key)}
  same |= {key for key in then.keys() - now.keys() if then[key] == _GONE.get(key, ...)}
  changed = [
    key
    for key in configs.differences(before, config)
    if key not in _FREE and key.partition(".")[0] not in _FREE_GROUPS and key not in same
  ]
  if changed:
    changed.sort(key=lambda key: key != "stage")
    more = f" and {len(changed) - 10} more" if len(changed) > 10 else ""
    raise ConfigError(
      f"The run in {workdir} was begun with another config, which differs in "
      f"{', '.join(changed[:10])}{more}; go on with the same, or give another --workdir."
    )


@contextlib.contextmanager
def claim(workdir: Path) -> Iterator[None]:
  """The folder, made, and for this process alone; ConfigError if that cannot be."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index():
      yield
      return
    with (workdir / ".lock").open("a") as lock:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as e:
        raise ConfigError(
          f"Another process trains in {workdir}; wait for it, or give another --workdir."
        ) from e
      yield
  except OSError as e:
    if e.filename is None or not str(e.filename).startswith(str(workdir)):
      raise
    raise ConfigError(f"{workdir} cannot be written ({e.strerror}); give another --workdir.") from e


@contextlib.contextmanager
def _told(say: Callable[[str], None]) -> Iterator[None]:
  """Warnings of what is loaded, as sentences, each of them once."""
  before, told = warnings.showwarning, set[str]()

  def show(message, category, filename, lineno, file=None, line=None):
    if category is not UserWarning:
      before(message, category, filename, lineno, file, line)
    elif str(message) not in told:
      told.add(str(message))
      say(str(message))

  with warnings.catch_warnings():
    warnings.simplefilter("always", UserWarning)
    warnings.showwarning = show
    yield


def _close(checkpoints: Checkpoints, say: Callable[[str], None]):
  try:
    checkpoints.close()
  except CheckpointFailed as e:
    say(str(e))
