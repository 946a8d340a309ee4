"""What a node does about itself when something is wrong with it: docs/supervision.md.

Rules (one file a kind of trouble) are told of events and of what was seen at regular looks, and answer with
reactions; they know neither trio nor the node, and time is an argument. ``watch`` looks, asks them, and
does what they say.
"""
