"""Print what a delta file holds: ``python -m selective_lite.ship FILE``."""

import argparse
import sys

from .describe import describe
from .file import DeltaError

parser = argparse.ArgumentParser(
    prog="python -m selective_lite.ship", description="Print what a delta file holds."
)
parser.add_argument("file")
try:
    print(describe(parser.parse_args().file))
except (DeltaError, OSError) as error:
    sys.exit(str(error))
