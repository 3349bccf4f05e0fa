"""Reports: pages of runs and X-ARES results, comparisons of runs, model cards."""
