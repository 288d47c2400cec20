"""Where it plays: a pure rollout, and its thin Ray shell."""
