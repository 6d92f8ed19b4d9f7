"""`python -m llmtrain`, and so `torchrun -m llmtrain train RECIPE`."""

import sys

from llmtrain.cli import main

sys.exit(main())
