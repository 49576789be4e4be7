"""A file for each command of the command line: parse, call, print; cli.py registers them. `serve` is in serve/."""
