"""Who decides: the LSTM Controller, and policies that are not learned."""
