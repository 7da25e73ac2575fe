"""`python -m trainers` is `kdtrain`."""

import sys

from trainers.cli import main

sys.exit(main())
