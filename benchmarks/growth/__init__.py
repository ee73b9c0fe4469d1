"""How the cost of a step grows with each dimension of a run."""
