"""What a batch asks of a model: the objective, adapters."""
