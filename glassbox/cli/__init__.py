"""The command `glassbox`: commands, demo, bench and the generated dashboards."""
