"""DPT: discriminative probing and tuning (arXiv 2403.04321)."""
