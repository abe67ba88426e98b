"""Looking at what was measured, from outside of the server: read a run, and show it.

`scrape` and `windows` read a run (a `/metrics` page, JSONL files) into the arrays of `measured`. The others show it:
`watch`, `frame` and `live` in a terminal, `charts` as pictures, `report` and `notable` as a page; `compare` takes two.
Nothing here runs in a server or imports vLLM.
"""
