"""`python -m nnfwd` is the command line."""

import sys

from nnfwd.cli import main

sys.exit(main())
