"""What surrounds a step: batch-norm statistics, random-number replay, deferred interrupts, torch.compile."""
