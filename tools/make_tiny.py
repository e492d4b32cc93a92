"""Trains the model of the shapes world from nothing: `python tools/make_tiny.py --work runs/tiny`.

Tokenizer; autoencoder, on short clips and then on long ones; latents of clips; teacher with its
text encoder, on their beginnings and then on all of them; a causal teacher, which begins with it,
and its trajectories; the student through `ode`, stage 1 and stage 2, by configs/tiny_*.py. The last
is packed as hfjax/assets/tiny, and all are scored. The same command goes on where it was stopped,
inside a stage too; what an earlier version of this code began wants a new folder. --minutes stops
it after a time, saving what there is. With several --devices, training uses all of them, and so
many --processes share encoding and trajectories. --smoke goes through all of it in minutes on a
processor, with next to no training.
"""

import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

ROOT = Path(__file__).resolve().parent.parent
STEPS = (
  "tokenizer", "vae", "vae_long", "clips", "teacher_short", "teacher", "causal", "trajectories",
  "ode", "stage1", "stage2", "pack", "score", "report",
)  # fmt: skip
TRAINED = ("vae", "vae_long", "teacher_short", "teacher", "causal", "ode", "stage1", "stage2")
SCORES = (
  "student_accuracy", "teacher_accuracy", "causal_accuracy", "ode_accuracy", "stage1_accuracy",
  "vae_accuracy", "judge_accuracy",
)  # fmt: skip
VOCAB = 320
SPINS = 0.35  # of the clips: what turns is learnt last
FRAMES = 81
# Of the causal teacher.
CHUNK, STEPS_OF_TEACHER = 3, 24
GUIDANCE = ("--guidance", 3.0, "--guidance_interval", 500, 1000)
# What is changed of the configs so that everything runs, and nothing is learnt; as much alike as
# can be, so that what one stage compiles serves the next.
_SMOKE = {
  "vae": {"autoencoder.frames": 5, "autoencoder.edges": 2.0, "data.made": 4},
  "teacher": {"flow.frames": 6},
  "ode": {"ode.frames": 6},
  "stage1": {"distill.last": 2, "distill.most": 2, "ode.frames": 6},
}
_SMOKE |= {
  "vae_long": _SMOKE["vae"], "teacher_short": _SMOKE["teacher"], "causal": _SMOKE["teacher"],
  "stage2": _SMOKE["stage1"],
}  # fmt: skip
_SMOKE_ALL = {
  "steps": 2, "batch": 2, "validation.every": 0, "log.every": 1, "compute.dtype": "float32",
  "ema.start": 0, "ema.decay": 0.5, "optimizer.rate": 1e-4, "optimizer.schedule": "constant",
  "optimizer.warmup": 0, "compute.unroll": 1,
}  # fmt: skip


class Stopped(Exception):  # noqa: N818  it says what happened
  """A step did not end well; its text is a sentence."""


class Chain:
  """The steps, each of which does nothing if it is done."""

  def __init__(self, args: argparse.Namespace):
    self.args, self.work = args, Path(args.work)
    self.weights = self.work / "weights"
    self.end = time.monotonic() + 60 * args.minutes if args.minutes else None
    # Several processes of a device: this one must not hold its memory.
    self.apart = max(args.devices, args.processes) > 1
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    self.places = (seen if seen != [""] else [str(i) for i in range(args.devices)])[: args.devices]

  def tokenizer(self):
    target = self.weights / "tokenizer" / "spiece.model"
    if not target.exists():
      from hfjax.data import shapes, vocabulary

      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(vocabulary.train(shapes.prompts("train", 4000), VOCAB))

  def vae(self):
    self.train("vae")
    self.convert("vae", self.weights / "vae")

  def vae_long(self):
    self.train("vae_long", init=self.weights / "vae")
    self.convert("vae_long", self.weights / "vae_long")

  def clips(self):
    few = self.args.smoke
    count = 4 if few else self.args.clips
    self.tool(
      "encode_videos", "--weights", self.weights / "vae_long", "--shapes", count, "--spins", SPINS,
      "--frames",
      21 if few else FRAMES, "--batch", 2 if few else 32, "--workers", 1 if few else 4,
      "--dtype", "float32" if few else "bfloat16", "--out", self.work / "clips", shared=True,
    )  # fmt: skip

  def teacher_short(self):
    self.train(
      "teacher_short", **{
        "data.path": self.work / "clips", "text.tokenizer": self.weights / "tokenizer",
        "vae.weights": self.weights / "vae_long",
      },
    )  # fmt: skip
    self.convert("teacher_short", self.weights / "teacher_short")

  def teacher(self):
    self._go_on("teacher", "teacher_short", "clips")

  def causal(self):
    self._go_on("causal", "teacher", "clips")

  def trajectories(self):
    from hfjax.data import shapes

    few = self.args.smoke
    prompts = self.work / "prompts.txt"
    count = 4 if few else self.args.trajectories
    prompts.write_text("\n".join(shapes.prompts("train", count, 1, SPINS)) + "\n")
    self.tool(
      "make_trajectories", "--weights", self.weights / "causal", "--prompts", prompts,
      "--size", "128x128", "--frames", 6 if few else 21, "--chunk", CHUNK, "--teacher_steps",
      4 if few else STEPS_OF_TEACHER, *GUIDANCE, "--negative_prompt", "", "--shift", 3,
      "--batch", 2 if few else 250, "--per_shard", 2 if few else 250,
      "--dtype", "float32" if few else "bfloat16",
      "--out", self.work / "trajectories", shared=True,
    )  # fmt: skip

  def ode(self):
    self._go_on("ode", "causal", "trajectories")

  def _go_on(self, name: str, before: str, data: str):
    """Trains what begins with other weights, and takes text and autoencoder of these."""
    keys = ("init", "text.weights", "vae.weights")
    settings: dict[str, object] = dict.fromkeys(keys, self.weights / before)
    self.train(name, **settings | {"data.path": self.work / data})
    self.convert(name, self.weights / name)

  def stage1(self):
    self._distill("stage1", "ode")

  def stage2(self):
    self._distill("stage2", "stage1")

  def _distill(self, name: str, before: str):
    keys = ("critic.weights", "teacher.weights", "text.weights", "vae.weights")
    teacher = self.weights / "teacher"
    self.train(
      name, init=self.weights / before,
      **dict.fromkeys(keys, teacher) | {"data.path": self.work / "trajectories"},
    )  # fmt: skip
    self.convert(name, self.weights / name)

  def score(self):
    few, out = self.args.smoke, self.args.out
    common = ["--workers", 0 if few else os.cpu_count() or 1, "--out", Path(out) / "results.json"]
    common += ["--commit", self.args.commit] if self.args.commit else []
    if few:
      common += ["--prompts", 1, "--batch", 1, "--dtype", "float32", "--frames", 33]
    of = lambda name, weights, *rest: (
      "--name", name, "--weights", self.weights / weights, *rest, *common
    )  # fmt: skip
    all_ = [
      of("teacher_accuracy", "teacher", *(("--steps", 2) if few else ())),
      of("causal_accuracy", "causal", *(("--steps", 2) if few else ())),
      of("ode_accuracy", "ode"),
      of("stage1_accuracy", "stage1"),
      of("student_accuracy", "stage2"),
      of("vae_accuracy", "vae_long", "--vae", "--prompts", 1 if few else 500),
      ("--name", "judge_accuracy", "--truth", *common),
    ]
    if not few:  # the longest first
      all_.insert(0, of("student_accuracy", "stage2", "--prompts", 100, "--at", 60, 600))
    chosen = [words for words in all_ if words[1] in self.args.scores]
    self.tools("score_shapes", chosen, self.places)

  def pack(self):
    self.tool(
      "convert_checkpoint", self.weights / "stage2", self.args.assets, "--dtype", "bf16",
      "--overwrite",
    )  # fmt: skip

  def report(self):
    """Logs, thinned, and sheets of every stage, and plots of them."""
    import plot_shapes

    out = Path(self.args.out)
    for name in TRAINED:
      log = self.work / name / "metrics.jsonl"
      if log.is_file():
        lines = log.read_text().splitlines()
        kept = lines[:: max(1, len(lines) // 300)]
        (out / "logs").mkdir(parents=True, exist_ok=True)
        (out / "logs" / f"{name}.jsonl").write_text("\n".join(kept) + "\n")
      sheets = sorted((self.work / name / "videos").glob("*-ema-*.png"))
      for sheet in sheets[-4:]:
        (out / "sheets").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sheet, out / "sheets" / f"{name}-validation-{sheet.stem[-1]}.png")
    self.run("plot_shapes", plot_shapes.main, [str(out)])

  def train(self, name: str, **settings: object):
    """Trains by configs/tiny_NAME.py, or goes on with it."""
    if (self.weights / name / "whole").exists():
      return
    if self.args.smoke:
      settings |= _SMOKE_ALL | _SMOKE[name]
    own = [x.removeprefix(f"{name}.") for x in self.args.set if x.startswith(f"{name}.")]
    settings |= dict(x.split("=", 1) for x in own)
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    config = ROOT / "configs" / f"tiny_{name}.py"
    argv = [f"--config={config}", f"--workdir={self.work / name}", *flags]
    if self.apart:
      # Autoencoders had gradients that were not finite on several GPUs (benchmarks/shapes).
      place = self.places[0] if name.startswith("vae") else ",".join(self.places)
      act = lambda argv: _apart([["-m", "hfjax.train", *argv]], [place])
    else:
      from hfjax.train import main as act
    self.run(f"training {name}", act, argv)
    # After SIGTERM, too, training ends well.
    left = _left(self.work / name)
    if left:
      raise Stopped(f"Training {name} has {left} steps left; the same command goes on.")

  def convert(self, name: str, target: Path):
    """Takes a run's averages, and what the student needs beside them of the models before it."""
    if (target / "whole").exists():
      return
    shutil.rmtree(target, ignore_errors=True)
    preset = {
      "teacher": "shapes_teacher", "causal": "shapes_causal", "ode": "shapes_dense",
      "stage1": "shapes_dense", "stage2": "shapes",
    }.get(name)  # fmt: skip
    self.tool(
      "convert_checkpoint", self.work / name, target, "--ema", "--dtype", "bf16",
      *(["--preset", preset] if preset else []),
    )  # fmt: skip
    if not name.startswith("vae"):
      shutil.copytree(self.weights / "vae_long" / "vae", target / "vae")
    if not name.startswith(("vae", "teacher")):
      for part in ("umt5", "google"):
        shutil.copytree(self.weights / "teacher" / part, target / part)
    (target / "whole").touch()

  def tool(self, name: str, *words: object, shared: bool = False):
    """Runs a tool of this folder; shared: its processes may share the work."""
    count = self.args.processes if shared else 1
    parts = [["--process", f"{i}/{count}"] if count > 1 else [] for i in range(count)]
    places = [self.places[i % len(self.places)] for i in range(count)]
    self.tools(name, [[*words, *part] for part in parts], places)

  def tools(self, name: str, calls: Sequence[Sequence[object]], places: Sequence[str]):
    """Runs a tool several times, in each place one at a time, or one after the other."""
    quiet = ["--quiet"] if self.args.quiet else []
    argvs = [[str(word) for word in words] + quiet for words in calls]
    if not self.apart:
      for argv in argvs:
        self.run(name, __import__(name).main, argv)
      return
    commands = [[str(ROOT / "tools" / f"{name}.py"), *argv] for argv in argvs]
    self.run(name, lambda _: _apart(commands, places), argvs[0])

  def run(self, what: str, act: Callable[[list[str]], int], argv: list[str]):
    """Raises Stopped unless it ends well, and before the time is over."""
    print(f"make_tiny: {what}: {' '.join(argv)}", file=sys.stderr, flush=True)
    begin, timer = time.monotonic(), None
    if self.end is not None:
      left = self.end - begin
      if left <= 0:
        raise Stopped(f"The time is over before {what}; the same command goes on.")
      timer = threading.Timer(left, os.kill, (os.getpid(), signal.SIGTERM))
      timer.daemon = True
      timer.start()
    try:
      status = act(argv)
    finally:
      if timer is not None:
        timer.cancel()
    took = time.monotonic() - begin
    print(f"make_tiny: {what} took {took:.0f} s.", file=sys.stderr, flush=True)
    if status:
      raise Stopped(f"{what} ended with status {status}; the same command goes on.")
    if self.end is not None and time.monotonic() >= self.end:
      raise Stopped(f"The time is over in {what}; the same command goes on.")


def _apart(commands: Sequence[list[str]], places: Sequence[str]) -> int:
  """Runs Python in processes until all have ended; the first status that is not 0, if there is one.

  places: GPUs that a process sees, each of one process at a time. Ctrl-C and SIGTERM are passed on
  to all, and no more are begun.
  """
  children: list[subprocess.Popen] = []
  asked: list[int] = []
  free: queue.SimpleQueue[str] = queue.SimpleQueue()

  def forward(number, _):
    asked.append(number)
    for child in children:
      if child.poll() is None:
        child.send_signal(number)

  found = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
  memory = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.9))
  share = memory / max(map(places.count, places))
  own = {
    **os.environ, "PYTHONPATH": os.pathsep.join(found),
    "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.2f}",
  }  # fmt: skip

  def one(command: list[str]) -> int:
    place = free.get()
    try:
      if asked:  # what was not begun has not done its share
        return 128 + asked[0]
      # In a session of its own a terminal's Ctrl-C does not come twice.
      child = subprocess.Popen(
        [sys.executable, *command], env=own | {"CUDA_VISIBLE_DEVICES": place},
        start_new_session=True,
      )  # fmt: skip
      children.append(child)
      if asked:  # meanwhile
        child.send_signal(asked[0])
      return child.wait()
    finally:
      free.put(place)

  for place in places:
    free.put(place)
  before = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGINT)}
  try:
    with ThreadPoolExecutor(len(places)) as pool:
      # All of them, whatever becomes of the first.
      statuses = list(pool.map(one, commands))
    return next((x for x in statuses if x), 0)
  finally:
    for n, handler in before.items():
      signal.signal(n, handler)


def _left(run: Path) -> int:
  """Steps that a run has not saved yet."""
  wanted = json.loads((run / "config.json").read_text())["steps"]
  saved = [int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit()]
  return wanted - max(saved, default=0)


def main(argv: list[str] | None = None) -> int:
  """Command line; the exit status: 0 when all steps are done, 1 when some are left."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flag = parser.add_argument
  flag("--work", default="runs/tiny", metavar="DIR", help="runs, data and weights on the way")
  flag("--out", default="benchmarks/shapes", metavar="DIR", help="figures and pictures")
  flag("--assets", default="hfjax/assets/tiny", metavar="DIR", help="the model that is packed")
  flag("--only", nargs="+", choices=STEPS, default=STEPS, metavar="STEP", help=", ".join(STEPS))
  flag("--clips", type=int, default=18_000, metavar="N", help="that the teacher learns from")
  flag("--trajectories", type=int, default=6_000, metavar="N", help="that the student begins with")
  flag("--scores", nargs="+", choices=SCORES, default=SCORES, metavar="NAME",
       help=f"that the step score makes: {', '.join(SCORES)}")  # fmt: skip
  flag("--set", nargs="*", default=[], metavar="STAGE.KEY=VALUE", help="changes a stage's config")
  flag("--minutes", type=float, default=0, help="after which it stops; 0 for no limit")
  flag("--devices", type=int, default=1, metavar="N", help="GPUs of this machine")
  flag("--processes", type=int, default=1, metavar="N", help="that share what can be shared")
  flag("--commit", help="to record in figures, where git is not there")
  flag("--smoke", action="store_true", help="all steps, hardly any training")
  flag("--quiet", action="store_true")
  args = parser.parse_args(argv)
  for name in ("devices", "processes", "clips", "trajectories"):
    if getattr(args, name) < 1:
      parser.error(f"--{name} is {getattr(args, name)}; give 1 or more.")
  chain = Chain(args)
  if len(chain.places) < args.devices:
    parser.error(
      f"{args.devices} devices are asked for, and CUDA_VISIBLE_DEVICES names {len(chain.places)}; "
      "give as many."
    )
  try:
    for name in STEPS:
      if name in args.only:
        getattr(chain, name)()
  except Stopped as e:
    print(f"make_tiny: {e}", file=sys.stderr)
    return 1
  print("make_tiny: all that was asked for is done.")
  return 0


if __name__ == "__main__":
  sys.exit(main())
