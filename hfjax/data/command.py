"""What the tools that write data have in common: flags, progress, messages."""

import argparse
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from hfjax.data.rejects import DataError
from hfjax.data.shards import Written


def add_flags(parser: argparse.ArgumentParser):
  """Flags of every tool that writes shards."""
  parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
  parser.add_argument(
    "--process", default="0/1", metavar="I/N",
    help="this is process I of N, counted from 0, which share the work",
  )  # fmt: skip
  parser.add_argument(
    "--per_shard", type=int, default=0, metavar="N", help="examples of a file; as 128 MiB have"
  )
  parser.add_argument(
    "--on_bad", choices=("fail", "skip"), default="fail", help="bad examples end the run, or not"
  )
  parser.add_argument("--quiet", action="store_true", help="no progress bar")


def options(args: argparse.Namespace, tool: str, argv: Sequence[str], unit: str) -> dict[str, Any]:
  """What those flags mean to writers; DataError on what makes no sense."""
  match = re.fullmatch(r"(\d+)/(\d+)", args.process)
  if match is None:
    raise DataError(f"The process is {args.process!r}; give its number and how many, as in 0/4.")
  if args.per_shard < 0:
    raise DataError(f"A file is to have {args.per_shard} examples; give 1 or more.")
  return {
    "process": (int(match[1]), int(match[2])),
    "per_shard": args.per_shard,
    "on_bad": args.on_bad,
    "progress": None if args.quiet else Progress(unit),
    "command": shlex.join(["python", f"tools/{tool}.py", *_without_process(argv)]),
  }


def size(text: str) -> tuple[int, int]:
  """Columns and rows of a flag such as 832x480; DataError on another."""
  match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text)
  if match is None:
    raise DataError(f"The size is {text!r}; give columns and rows of pixels, such as 832x480.")
  return int(match[1]), int(match[2])


def numbers(text: str) -> tuple[float, ...]:
  """Numbers of a flag such as 1000,750; DataError on another."""
  try:
    return tuple(float(part) for part in text.split(","))
  except ValueError as e:
    raise DataError(f"{text!r} are no numbers; give them as in 1000,750,500,250.") from e


class Progress:
  """Examples done, rate and time left, on one line; finished shards of before do not count."""

  def __init__(self, unit: str):
    self.unit = unit
    self.bar: tqdm | None = None

  def __call__(self, done: int, total: int):
    """So many of this process's examples are done; the first time, by earlier runs."""
    if self.bar is None:
      self.bar = tqdm(total=total, initial=done, unit=f" {self.unit}")
    self.bar.update(done - self.bar.n)
    if done == total:
      self.bar.close()


def run(tool: str, act: Callable[[], Written]) -> int:
  """The exit status of a tool: 0, 1 if the disk fails, 2 with a sentence, 130 when interrupted."""
  for name in ("SIGTERM", "SIGHUP"):  # as Ctrl-C
    if hasattr(signal, name):
      signal.signal(getattr(signal, name), signal.default_int_handler)
  kept = "Finished files are kept: the same command goes on."
  try:
    written = act()
  except ValueError as e:
    # Those of the data, of weights and of videos are sentences; so are those of sizes.
    print(f"{tool}: {e}", file=sys.stderr)
    return 2
  except OSError as e:
    where = f" ({e.filename})" if e.filename else ""
    print(f"{tool}: {e.strerror or e}{where}; mend that. {kept}", file=sys.stderr)
    return 1
  except RuntimeError as e:  # of JAX
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    text = "the device has too little memory; make --batch or --size smaller"
    print(f"{tool}: {text}. {kept}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print(f"\n{tool}: interrupted. {kept}", file=sys.stderr)
    return 130
  if report := written.rejects.report():
    print(f"{tool}: {report}", file=sys.stderr)
  if written.missing:
    print(f"Done here; {written.missing} files of {written.folder} are still to come from others.")
  else:
    print(f"Wrote {written.folder}: {written.examples} examples.")
  return 0


def _without_process(argv: Sequence[str]) -> list[str]:
  """A command line that does what all processes do."""
  rest, words = [], iter(argv)
  for word in words:
    if word == "--process":
      next(words, None)
    elif not word.startswith("--process="):
      rest.append(word)
  return rest
