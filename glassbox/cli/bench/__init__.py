"""`glassbox bench`: what glassbox costs a server on this machine. `serving` measures it."""
