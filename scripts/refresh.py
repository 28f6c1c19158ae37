"""Run `vista refresh` from a checkout: python scripts/refresh.py [KEY=VALUE ...]."""

import sys

from vista.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["refresh", *sys.argv[1:]]))
