"""Run the command line: `python -m llm_ext.cli`."""

from __future__ import annotations

import sys

from llm_ext.cli import main

sys.exit(main())
