"""The paper's own question at a size that a CPU affords: which model predicts best, with equally many parameters."""
