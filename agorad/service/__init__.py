"""agorad as a service of the system: units, their installation and removal."""
