"""One layer as a convex program: tensors in, evidence out."""
