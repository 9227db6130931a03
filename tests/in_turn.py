"""Several command lines one after another in one process, or in as many as they ask for: `in_turn.py FILE`."""

import json
import os
import sys
from pathlib import Path

from sdprune.__main__ import main

for port, words in json.loads(Path(sys.argv[1]).read_text()):
    os.environ["MASTER_PORT"] = str(port)  # another one each time: a process may not meet those that are just leaving
    if code := main(words):
        sys.exit(code)
