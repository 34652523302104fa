"""`python -m cqd_jax.cli`: the console command."""

import sys

from cqd_jax.cli.main import main

sys.exit(main())
