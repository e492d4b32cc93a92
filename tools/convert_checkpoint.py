"""Converts checkpoints: `python tools/convert_checkpoint.py SRC DST`.

SRC is a file or folder of weights: original Wan folders, Diffusers folders, the .pt files of
trainers (Self-Forcing, LongLive, Hybrid Forcing), hfjax folders, runs of hfjax's training (their
--workdir). DST becomes an hfjax folder with one folder per model (dit, vae, umt5, taehv), or, with
--to, weights under original or Diffusers names. Nothing is written unless everything is converted.
"""

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from hfjax.convert import checkpoint, lora, write
from hfjax.convert.registry import KINDS
from hfjax.convert.source import CheckpointError, printable, user_path
from hfjax.models.geometry import VARIANTS
from hfjax.models.sampling_presets import SAMPLING_PRESETS


def convert(args: argparse.Namespace):
  """Reads all of SRC's models, then writes them; CheckpointError with a sentence if it cannot."""
  source, target = user_path(args.source), user_path(args.target)
  with write.replace_folder(target, args.overwrite, source) as folder:
    checkpoint.check_layout(target, args.to)
    parts = checkpoint.open_parts(
      source, args.model, args.variant, args.ema, args.preset, args.step
    )
    for spec in args.lora:
      parts = lora.merge(parts, *lora.parse(spec))
    rows = [checkpoint.entries(part, args.to, args.dtype)[0] for part in parts]
    total = sum(entry.nbytes for row in rows for entry in row)
    for part in parts:
      print(f"{part.kind.name}: {part.config}")
      for note in part.notes:
        print(f"{part.kind.name}: {printable(note)}")
    write.check_space(folder, total)
    with tqdm(total=total, unit="B", unit_scale=True, disable=args.quiet) as bar:
      for part in parts:
        bar.set_description(part.kind.name)
        place = folder / checkpoint.part_folder(part.kind, args.to)
        place.mkdir(exist_ok=True)
        checkpoint.write_part(part, place, args.to, args.dtype, bar.update)
    if any(part.kind.name == "umt5" for part in parts):
      checkpoint.copy_tokenizer(source, folder, args.to)
  print(f"Wrote {args.target}, {total / 1e9:.2f} GB.", flush=True)


def main(argv: list[str] | None = None) -> int:
  """Command line; the exit status: 0, 2 with a sentence, 130 when interrupted."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("source", metavar="SRC", help="file or folder of weights")
  parser.add_argument("target", metavar="DST", help="folder to make")
  parser.add_argument("--model", default="auto", choices=("auto", *KINDS), help="which model")
  parser.add_argument("--dtype", choices=checkpoint.CASTS, help="dtype to write; kept by default")
  parser.add_argument("--variant", choices=VARIANTS, help="semantics the weights were trained with")
  parser.add_argument("--preset", choices=SAMPLING_PRESETS, help="how they are to be sampled")
  parser.add_argument("--to", default="hfjax", choices=("hfjax", "original", "diffusers"))
  parser.add_argument("--ema", action="store_true", help="take moving averages of the weights")
  parser.add_argument("--step", type=int, metavar="N", help="of a run of training; else its newest")
  parser.add_argument(
    "--lora", action="append", default=[], metavar="FILE[@STRENGTH]",
    help="safetensors to merge into the transformer; repeatable",
  )  # fmt: skip
  parser.add_argument("--overwrite", action="store_true", help="replace models that DST has")
  parser.add_argument("--quiet", action="store_true", help="no progress bar")
  args = parser.parse_args(argv)
  try:
    convert(args)
  except CheckpointError as e:
    print(f"convert_checkpoint: {e}", file=sys.stderr)
    return 2
  except BrokenPipeError:  # whoever reads the output has left
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
  except OSError as e:
    # What copies folders gives a list of (from, to, reason).
    reason = e.args[0][0][2] if isinstance(e, shutil.Error) else f"{e.strerror} ({e.filename})"
    text = CheckpointError(f"{reason}; mend that, and convert again.")
    print(f"convert_checkpoint: {text}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(
      f"convert_checkpoint: interrupted; {args.target} is as it was, or whole.", file=sys.stderr
    )
    return 130
  return 0


if __name__ == "__main__":
  # What asks the process to end is treated like Ctrl-C, so that no half-written folder stays.
  for name in ("SIGTERM", "SIGHUP"):
    if hasattr(signal, name):
      signal.signal(getattr(signal, name), signal.default_int_handler)
  sys.exit(main())
