"""X-ARES (github.com/jimbozhang/xares): a model through the benchmark's own harness."""
