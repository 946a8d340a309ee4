"""A whole swarm on this machine: laid out in one folder, started, watched, stopped and accounted for."""
