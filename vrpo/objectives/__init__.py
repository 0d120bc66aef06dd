"""From ELBO vectors to a loss: pure functions, no tokens."""
