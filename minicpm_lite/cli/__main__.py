"""``python -m minicpm_lite.cli``, which is ``minicpm-lite``; torchrun starts it so."""

import sys

from . import main

sys.exit(main())
