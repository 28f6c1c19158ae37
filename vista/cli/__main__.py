"""`python -m vista.cli`."""

import sys

from vista.cli.main import main

sys.exit(main())
