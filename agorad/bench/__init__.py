"""Measurements that drive the program's own kernels and classes: what ``agoractl bench`` runs."""
