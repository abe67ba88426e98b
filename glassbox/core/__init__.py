"""What every room may use: tables, histograms, logs, errors, files, this machine. It imports no other room.

A thing enters only if two rooms that may not meet need it.
"""
