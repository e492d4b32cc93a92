"""Draws clips of moving shapes: `python tools/make_shapes.py --out DIR --count N`.

Writes a dataset of captions with their videos, uint8, 128 x 128 pixels, 16 frames a second. Each
clip depends on its number, --split and --seed alone. What is cut short goes on with the same
command; --process 0/4 to 3/4 share the work.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hfjax.data import command

NAME = "make_shapes"


def main(argv: list[str] | None = None) -> int:
  """Command line; the exit status."""
  argv = sys.argv[1:] if argv is None else argv
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flag = parser.add_argument
  flag("--count", type=int, required=True, help="clips")
  flag("--split", choices=("train", "held_out"), default="train", help="they share no scene")
  flag("--seed", type=int, default=0, help="of scenes, videos and captions")
  flag("--frames", type=int, default=81, help="frames of each clip")
  command.add_flags(parser)
  args = parser.parse_args(argv)

  def act():
    from hfjax.data import shapes, shards

    options = command.options(args, NAME, argv, "clips")
    clips = shapes.Shapes(args.split, args.count, args.seed, args.frames)
    shape = (args.frames, shapes.SIZE, shapes.SIZE, 3)
    about = {"world": shapes.VERSION, "split": args.split, "seed": args.seed, "fps": shapes.FPS}
    plan = shards.Plan(
      "clips", args.count, {"video": (shape, "uint8")}, about, options.pop("per_shard"),
      options.pop("command"),
    )  # fmt: skip
    make = lambda start, stop, reject: (clips[i] for i in range(start, stop))
    return shards.write(args.out, plan, make, **options)

  return command.run(NAME, act)


if __name__ == "__main__":
  sys.exit(main())
