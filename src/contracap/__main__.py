"""`python -m contracap`, which `torchrun -m` needs as well."""

import sys

from contracap.cli import main

sys.exit(main())
