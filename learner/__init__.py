"""How it improves: R2D2 losses, sequences, replay in Redis, the learner."""
