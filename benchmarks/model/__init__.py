"""Methods on whole networks."""
