"""Memory and time of a distillation before it runs; the formulas are in docs/estimate.md."""
