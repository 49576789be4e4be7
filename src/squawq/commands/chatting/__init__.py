"""The parts of `squawq chat`: talk.py has the loop."""
