"""One drop-in per public codebase: its loss or log-probabilities from hidden states. See README.md."""
