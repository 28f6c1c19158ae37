"""`vista evaluate` for those who launch from a checkout: python scripts/evaluate.py [KEY=VALUE ...]."""

import sys

from vista.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
