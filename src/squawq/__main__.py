"""python -m squawq"""

from squawq.cli import entry

entry()
