"""Makes videos from prompts: `python -m hfjax.sample --weights=DIR --prompt="..."`.

Without --weights, the small model that comes with hfjax makes them, which knows moving shapes:
`--prompt="a small red ball moves left while a large blue star spins, on stripes"`.

Each video is written while it is made, and can be watched meanwhile. Ctrl-C ends it after the chunk
that is under way, and says how to go on; a second one stops at once. Beside each video lies a JSON
file that says how it was made.

Exit status: 0 if all is well, 1 if something failed on the way, 2 if the command makes no sense.
"""

import signal
import sys


def main(argv: list[str] | None = None) -> int:
  """Command line; the exit status."""
  from hfjax.sampling import command  # takes seconds

  return command.main(sys.argv[1:] if argv is None else argv, __doc__ or "")


if __name__ == "__main__":
  # Until there is something to keep, both end the process at once.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  sys.exit(main())
