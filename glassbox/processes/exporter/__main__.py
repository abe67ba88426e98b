"""`python -m glassbox.processes.exporter`: the exporter process of a server, started by one of its workers."""

import sys

from glassbox.processes.exporter.loop import main

sys.exit(main())
