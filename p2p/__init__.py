"""Peers that find, trust and reach each other. Imports neither torch nor `stage` nor `agorad`."""
