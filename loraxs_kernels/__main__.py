"""python -m loraxs_kernels: the `loraxs` command."""

import sys

from .cli import main

sys.exit(main())
