"""What is decided: the Recognizer as a Gymnasium environment."""
