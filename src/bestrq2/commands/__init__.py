"""The commands: one documented function each, shared by the command line and Python.

A file imports nothing heavy at its top, so that help and refused flags are quick; the function imports the room that
does the work. `main(argv)` parses the command line, calls the function and prints its result.
"""
