"""This module runs the command line for ``python -m clipfast``."""

import sys

from .cli.main import main

sys.exit(main())
