"""`python -m pipeline.sweep`."""

import sys

from pipeline.sweep.run import main

sys.exit(main())
