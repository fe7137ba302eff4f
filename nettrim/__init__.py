"""Prune trained PyTorch networks by convex optimisation, with a certificate for every answer."""
