"""Dashboards, alerting rules, the stack that runs them, and the reference of metrics: all of it text made by code.

`files.render()` gives every generated file; `command.dashboards` writes or checks them. What is not generated: the
runbooks of `docs/runbooks/`. Needs the extra `dashboards`; nothing of the server imports it.
"""
