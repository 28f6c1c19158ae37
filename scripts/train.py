"""Run `vista train` from a checkout: python scripts/train.py [KEY=VALUE ...]."""

import sys

from vista.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
