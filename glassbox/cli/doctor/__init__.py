"""`glassbox doctor`: looks at an installation and at a running server from outside.

Each module looks at one area and answers with findings; `checks.py` has all of them in their order, `report.py` the
words. Whatever is looked at may be broken or hostile: everything is read with a bound of time and size, what can crash
(the import of vLLM) runs in a process of its own, and no control character of it is printed.
"""
