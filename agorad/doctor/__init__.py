"""``agoractl doctor``: looks at a node's settings, machine, process and line, and says what to do.

Each module looks at one of these and yields findings; ``diagnose`` puts them in order. Everything works
with the daemon down, and nothing that is looked at is changed.
"""
