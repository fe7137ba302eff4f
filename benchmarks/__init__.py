"""What nettrim is measured by; not part of the package."""
