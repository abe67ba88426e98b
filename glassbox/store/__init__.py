"""What the processes of a server leave each other in the run directory: snapshots and their merge, traces, notes."""
