"""WSL2: what Windows has to do so that peers reach a node in it, and how it is told to."""
