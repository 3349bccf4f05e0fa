"""X-ARES: its tasks, results of a model on them, and how both published averages are taken."""
