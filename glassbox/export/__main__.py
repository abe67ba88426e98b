"""`python -m glassbox.export`: the exporter process of a server, started by one of its workers."""

import sys

from glassbox.export.process import main

sys.exit(main())
