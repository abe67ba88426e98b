"""Looking at what was measured, from outside of the server: read a run, and show it.

`scrape` and `windows` read a run (a `/metrics` page, JSONL files) into the arrays of `measured`; the other modules
show them: `tables` and `frame` in a terminal, `charts` and `page` as pictures and as a report, `compare` two runs.
Nothing here runs in a server or imports vLLM.
"""
