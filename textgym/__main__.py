"""`python -m textgym`: the `textgym` command, for `torchrun -m textgym` say."""

import sys

from textgym.cli import main

sys.exit(main())
