"""How good embeddings are: linear and k-NN probes on labelled tasks, beside baselines that could win."""
