"""One domain: the Trainer and what stands beside it."""
