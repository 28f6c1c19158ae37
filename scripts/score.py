"""Run `vista score` from a checkout: python scripts/score.py [KEY=VALUE ...]."""

import sys

from vista.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
