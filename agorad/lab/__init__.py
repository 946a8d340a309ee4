"""A lab: nodes in network namespaces of this machine, with lines between them that behave like home lines."""
