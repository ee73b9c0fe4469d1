"""The paper's tables: what training each row costs (docs/reproduce.md), and what finished runs gave beside it."""
